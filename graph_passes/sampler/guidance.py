"""How a sampler weighs the parts of a guided batch: one guidance scale, or shares by step.

A guided sampler uses one output for every sample, u + s (c - u) with c the conditional part and u
the other, or in general sum_p share_p e_p with shares of sum 1. Recovered weights of a step hold
these shares times the weight of the guided output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from calicache.graph_passes.common.errors import NoSampler
from calicache.graph_passes.sampler.recover import RecordedSampler
from calicache.graph_passes.sampler.update import recorded_next

UNMOVED = 1e-5  # how far one scale for all steps may move a latent, relative to it


@dataclass(frozen=True, slots=True)
class Guidance:
    """What the sampler makes of the parts of a batch.

    Attributes:
        conditional: the part that guidance moves towards; None where no one scale fits.
        scale: s as it was recorded; None alike.
        shares: of the parts, (T, parts); rows sum to 1.
    """

    conditional: int | None
    scale: float | None
    shares: tuple[tuple[float, ...], ...]


def recover_guidance(recorded: RecordedSampler) -> Guidance:
    """The guidance of recorded runs; a scale where one for all steps moves no latent.

    Shares that differ do not matter where the parts' outputs are the same, so it is the latents
    that decide here, not the weights as in `constant_shares`.

    Raises:
        NoSampler: outputs of zero, which tell nothing.
    """
    parts, weights = recorded.steps.parts, recorded.steps.weights
    shares = [_shares(row[1 : 1 + parts]) for row in weights]
    shares += [shares[-1]] * (len(recorded.runs[0]) - len(weights))  # of a last update unknown
    if parts == 2:
        conditional = max((0, 1), key=lambda part: median(abs(row[part]) for row in shares))
        scale = _one_scale(recorded, conditional)
        changes = [row[conditional] - scale for row in shares[: len(weights)]]
        worst = max(_moved_by(recorded, step, change) for step, change in enumerate(changes))
        rounding = torch.finfo(recorded.runs[0][0][recorded.steps.latent].dtype).eps
        if worst <= max(UNMOVED, rounding):
            pair = (scale, 1 - scale) if conditional == 0 else (1 - scale, scale)
            return Guidance(conditional, scale, (pair,) * len(shares))
    return Guidance(None, None, tuple(shares))


def constant_shares(
    weights: Sequence[Sequence[float]], parts: int, tolerance: float
) -> tuple[float, ...] | None:
    """Shares of sum 1, if outputs never count but as their weighted sum; None if they do.

    Args:
        weights: of the sampler's update by step, see `SamplerSteps`.
        parts: of the batch.
        tolerance: how far a weight may be off, relative to the largest one of its output.
    """
    rows = torch.tensor(
        [row[at + 1 : at + 1 + parts] for row in weights for at in range(0, len(row), 1 + parts)],
        dtype=torch.float64,
    )
    sums = rows.sum(dim=1)
    shares = rows.sum(dim=0) / sums.sum()
    off = (rows - sums[:, None] * shares).abs().amax(dim=1)
    alike = bool((off <= tolerance * rows.abs().amax(dim=1)).all())  # not where a sum is 0 or NaN
    return tuple(shares.tolist()) if alike else None


def weighted_sum(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """sum_k weight_k value_k in float64."""
    return torch.stack([w * v.double() for w, v in zip(weights, values, strict=True)]).sum(dim=0)


def _shares(weights: Sequence[float]) -> tuple[float, ...]:
    total = sum(weights)
    if len(weights) == 1:
        return (1.0,)
    if not total:
        raise NoSampler("outputs of zero in the recording, which tell nothing of guidance")
    return tuple(weight / total for weight in weights)


def _one_scale(recorded: RecordedSampler, conditional: int) -> float:
    """The guidance scale that fits all steps of the first run best."""
    steps, run, outputs = recorded.steps, recorded.runs[0], recorded.outputs[0]
    signal = power = 0.0
    before: list[Tensor] = []
    for step, weights in enumerate(steps.weights):
        x, *both = steps.terms(run[step][steps.latent].double(), outputs[step].double())
        base = both[1 - conditional]
        of_e = weights[1] + weights[2]
        unguided = weights[0] * x + of_e * base
        for weight, term in zip(weights[3:], before, strict=False):
            unguided = unguided + weight * term
        following = recorded_next(run, recorded.ends[0], step, steps.latent, 2).double()
        towards = of_e * (both[conditional] - base)
        signal += float((towards * (following - unguided)).sum())
        power += float(towards.square().sum())
        before = [x, *both]
    return signal / power if power else 1.0


def _moved_by(recorded: RecordedSampler, step: int, change: float) -> float:
    """How far another guidance scale moves the next latent, relative to it."""
    weights = recorded.steps.weights[step]
    first, second = recorded.outputs[0][step].chunk(2)
    moved = sum(weights[1:3]) * change * (first - second)
    x = recorded_next(recorded.runs[0], recorded.ends[0], step, recorded.steps.latent, 2)
    return float(moved.norm() / x.norm())
