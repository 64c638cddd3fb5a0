"""Output weights fitted along the corrected trajectory.

Every step's output becomes m = w_0 e + sum_j w_j E_j + w_x x, with e the step's own output, E_j
those of the newest REFRESH and CALIBRATE steps, and x the latent. The weights are chosen so that
the sampler's next latent comes as near as it can to the recorded one, or to that of a reference
with more steps: that takes back what earlier steps did wrong, where a fit to the step's true output
would only keep its own error small.

The next latent is linear in m. With b_p the sampler's weights of the parts of an output, a
feature f moves it by a = sum_p b_p f_p for one unit of its weight. With x^_{k+1} what plain
weights reach, the change c of the weights solves

    r = x_{k+1} - x^_{k+1},
    min |sum_j a_j c_j - r|^2 + RIDGE sum_j |a_j|^2 c_j^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from calicache.graph_passes.common.ranks import ALONE, Ranks
from calicache.graph_passes.sampler.least_squares import NormalEquations
from calicache.graph_passes.sampler.update import SamplerSteps

Features = tuple[list[Tensor], list[Tensor | None]]


def fit_step(
    sampler: SamplerSteps,
    step: int,
    features: Sequence[Features],
    before: Sequence[Sequence[Tensor]],
    recorded: Sequence[Tensor],
    plain: tuple[float, ...],
    ranks: Ranks = ALONE,
) -> tuple[float, ...]:
    """Least squares for the distance of x_{k+1} to the recorded one, around plain weights.

    Args:
        sampler: how the next latent is made.
        step: k.
        features: of every own run: the terms of x, and what is mixed, None where there is none.
        before: of every own run: the terms of the step before.
        recorded: of every own run: the recorded x_{k+1}, one copy (B, ...).
        plain: weights to start from (order + 3).
        ranks: the processes that share the runs.

    Returns:
        The weights; plain ones where outputs do not move the latent, as in the last step of a
        sampler that ends on its own estimate of x_0.
    """
    runs = zip(features, before, recorded, strict=True)
    fits = ranks.in_order([_run_fit(sampler, step, *run, plain) for run in runs])
    equations = reduce(add, (fit.equations for fit in fits))
    solution = equations.solution(sum(fit.energy for fit in fits))
    changes = dict(zip(fits[0].mixed, solution.tolist(), strict=True))
    return tuple(weight + changes.get(k, 0.0) for k, weight in enumerate(plain))


@dataclass(frozen=True, slots=True)
class _RunFit:
    """What one run adds to the least squares of a step, on the CPU.

    Attributes:
        equations: of the features that are mixed.
        energy: |x_{k+1}|^2.
        mixed: places of these features.
    """

    equations: NormalEquations
    energy: float
    mixed: tuple[int, ...]


def _run_fit(
    sampler: SamplerSteps,
    step: int,
    features: Features,
    before: Sequence[Tensor],
    recorded: Tensor,
    plain: tuple[float, ...],
) -> _RunFit:
    terms, outputs = features
    plain_terms = [terms[0], *sampler.output_terms(mix(plain, outputs))]
    reached = sampler.next_latent(step, plain_terms, before).double().chunk(sampler.parts)[0]
    residual = (recorded.double() - reached).flatten()
    columns = [_move(sampler, step, value) for value in outputs if value is not None]
    equations = NormalEquations.of(torch.stack(columns), residual)
    return _RunFit(
        NormalEquations(equations.gram.cpu(), equations.moment.cpu()),
        float(recorded.double().square().sum()),
        tuple(k for k, value in enumerate(outputs) if value is not None),
    )


def _move(sampler: SamplerSteps, step: int, output: Tensor) -> Tensor:
    """A = sum_p b_p f_p of one feature, flat."""
    scales = sampler.weights[step][1 : 1 + sampler.parts]
    parts = sampler.output_terms(output)
    return reduce(add, (b * f.double() for b, f in zip(scales, parts, strict=True))).flatten()


def mix(weights: Sequence[float], outputs: Sequence[Tensor | None]) -> Tensor:
    """sum_k w_k outputs_k over the outputs that are not None and have a weight."""
    total: Tensor | None = None
    for weight, value in zip(weights, outputs, strict=False):
        if value is not None and weight:
            total = weight * value if total is None else total + weight * value
    assert total is not None
    return total
