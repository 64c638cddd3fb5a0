"""The sampler's own update, recovered from a recording: no adapter, no knowledge of its class.

A deterministic sampler makes the next latent from what it has by fixed numbers: for DDIM or
an Euler step x_{k+1} = a_k x_k + b_k e_k; with guidance batched, one b for each part of the
batch; for a two-step solver such as DPM-Solver++ 2M also x_{k-1} and e_{k-1}. These numbers
are found by least squares, and a sampler that adds noise shows by what is left over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calicache.graph_passes.common.errors import NoSampler
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.timestep import Call, Run

TOLERANCE, ROUNDING = 1e-3, 1e-5
MAX_PARTS = 4


@dataclass(frozen=True, slots=True)
class SamplerSteps:
    """How x_{k+1} is a weighted sum of latents and outputs, by step.

    The last step is there only where the recorded runs were finished with their results.

    Attributes:
        latent: name of the model's input that holds x.
        parts: copies of x in one batch: 2 for batched guidance.
        weights: by step: of x_k, of e_k's parts, then of x_{k-1} and e_{k-1}'s parts, if used.
    """

    latent: str
    parts: int
    weights: tuple[tuple[float, ...], ...]

    def terms(self, latent: Tensor, output: Tensor) -> list[Tensor]:
        """Give x and the parts of e that the weights of one step are for, each (B / parts, ...)."""
        x = latent.chunk(self.parts)[0]
        return [x, *self.output_terms(output)]

    def output_terms(self, output: Tensor) -> list[Tensor]:
        """The parts of e alone, without channels that x does not have."""
        return list(output.chunk(self.parts))

    def next_latent(self, step: int, terms: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
        """Give x_{k+1} for the whole batch, from the terms of this step and the one before."""
        weights = self.weights[step]
        used = [*terms, *before][: len(weights)]
        x = sum(weight * term for weight, term in zip(weights, used, strict=True))
        return torch.cat([x] * self.parts)  # type: ignore[list-item]


def find_latent(call: Call, output: Tensor, classes: Mapping[str, Dependence]) -> str:
    """The floating-point input that the sampler makes from the output: of its shape, or less wide.

    Raises:
        NoSampler: no input is, or several.
    """
    candidates = [
        name
        for name, value in call.items()
        if classes[name] is Dependence.LATENT
        and value.is_floating_point()
        and _holds_channels(output, value)
    ]
    if len(candidates) != 1:
        shape = tuple(output.shape)
        raise NoSampler(f"{len(candidates)} inputs have the output's shape {shape}")
    return candidates[0]


def latent_channels(output: Tensor, latent: Tensor) -> Tensor:
    """The output's channels that the latent has: a learned variance is cut off.

    Raises:
        NoSampler: the output's shape differs in more than further channels.
    """
    if not _holds_channels(output, latent):
        raise NoSampler(
            f"an output of shape {tuple(output.shape)} is unlike the latent {tuple(latent.shape)}"
        )
    return output if output.shape == latent.shape else output[:, : latent.shape[1]]


def _holds_channels(output: Tensor, latent: Tensor) -> bool:
    if output.ndim != latent.ndim or output.ndim < 2:
        return output.shape == latent.shape
    rest = output.shape[:1] + output.shape[2:]
    return rest == latent.shape[:1] + latent.shape[2:] and output.shape[1] >= latent.shape[1]


def recorded_next(run: Run, end: Tensor | None, step: int, latent: str, parts: int) -> Tensor:
    """The recorded x_{k+1}, one copy (B, ...); after the last call the run's result."""
    rows = run[step][latent].shape[0] // parts
    following = run[step + 1][latent] if step + 1 < len(run) else end
    assert following is not None
    return following[:rows]


def relative_errors(value: Tensor, exact: Tensor) -> tuple[float, ...]:
    """Relative L2 error of every sample (B, ...), in float64."""
    right = exact.double().flatten(1)
    off = (value.double().flatten(1) - right).norm(dim=1)
    errors: list[float] = (off / right.norm(dim=1)).tolist()
    return tuple(errors)


def find_sampler_steps(
    latent: str,
    runs: Sequence[Run],
    outputs: Sequence[Sequence[Tensor]],
    ends: Sequence[Tensor | None],
    parts: int | None = None,
) -> SamplerSteps:
    """Fit the update of every step over some runs of one length.

    Args:
        latent: name of the input that holds x.
        runs: recorded calls.
        outputs: e for every call of every run, with x's channels alone.
        ends: results of the runs, as far as they are known.
        parts: copies of x in one batch; None counts them.

    Raises:
        NoSampler: a latent is no fixed weighted sum of what came before, or a run's result is no
            latent.
    """
    parts = parts or _count_parts([call[latent] for run in runs for call in run])
    shape = SamplerSteps(latent, parts, ())
    for run, end in zip(runs, ends, strict=True):
        x = run[-1][latent]
        if end is not None and not _is_end_of(end, x, parts):
            raise NoSampler(
                f"a run's result has the shape {tuple(end.shape)}, its latent {tuple(x.shape)}"
            )
    steps = len(runs[0]) - any(end is None for end in ends)
    # Recorded in half precision, the latents themselves are rounded.
    tolerance = max(TOLERANCE, torch.finfo(runs[0][0][latent].dtype).eps)
    weights: list[tuple[float, ...]] = []
    for step in range(steps):
        terms = [_terms(shape, run, outs, step) for run, outs in zip(runs, outputs, strict=True)]
        following = [
            recorded_next(run, end, step, latent, parts)
            for run, end in zip(runs, ends, strict=True)
        ]
        row, left = _solve([now for now, _ in terms], following)
        # Look back wherever rounding does not explain what is left: a two-step solver is nearly
        # one of one step where its outputs change little.
        if left > ROUNDING and step > 0:
            longer, less = _solve([now + before for now, before in terms], following)
            row, left = (longer, less) if less < left / 10 else (row, left)
        if not left <= tolerance:
            raise NoSampler(
                f"step {step} to {step + 1} is no fixed weighted sum of latents and outputs "
                "(a sampler that adds noise, clips, or looks back further)"
            )
        weights.append(row)
    return SamplerSteps(latent, parts, tuple(weights))


def _is_end_of(end: Tensor, x: Tensor, parts: int) -> bool:
    return end.shape[1:] == x.shape[1:] and end.shape[0] in (x.shape[0] // parts, x.shape[0])


def _terms(
    shape: SamplerSteps, run: Run, outputs: Sequence[Tensor], step: int
) -> tuple[list[Tensor], list[Tensor]]:
    now = shape.terms(run[step][shape.latent], outputs[step])
    before = shape.terms(run[step - 1][shape.latent], outputs[step - 1]) if step else []
    return now, before


def _solve(
    terms: Sequence[Sequence[Tensor]], following: Sequence[Tensor]
) -> tuple[tuple[float, ...], float]:
    """Least squares in float64, and the share of the following latents that is left over."""
    matrix = torch.stack(
        [
            torch.cat([run[k].double().flatten().cpu() for run in terms])
            for k in range(len(terms[0]))
        ],
        1,
    )
    latents = torch.cat([value.double().flatten().cpu() for value in following])[:, None]
    # The SVD-based driver gives the smallest weights where guidance parts are (nearly) equal.
    solution = torch.linalg.lstsq(matrix, latents, rcond=1e-9, driver="gelsd").solution
    left = float((matrix @ solution - latents).norm() / latents.norm())
    return tuple(solution[:, 0].tolist()), left


def _count_parts(latents: Sequence[Tensor]) -> int:
    """How many equal copies of x every batch holds."""
    for parts in range(MAX_PARTS, 1, -1):
        if all(_repeats(value, parts) for value in latents):
            return parts
    return 1


def _repeats(value: Tensor, parts: int) -> bool:
    if value.shape[0] % parts:
        return False
    first, *others = value.chunk(parts)
    return all(torch.equal(first, other) for other in others)
