"""What output weights aim at: the same runs in more steps, whose latents are nearer to the exact.

A sampler solves an ordinary differential equation in some steps, and errs by that. The weights
of a plan can aim past it, at a reference run of the same noise with many more steps: then they take
back what the sampler's own steps lose as well.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.timestep import Run, Timestep
from calicache.graph_passes.sampler.recover import RecordedSampler, Reference
from calicache.graph_passes.sampler.update import latent_channels, relative_errors
from calicache.graph_passes.settings.recipe import FITTED

NEIGHBOURS = 4  # a cubic through the nearest recorded values
SAME_NOISE = 0.1  # relative: samplers scale one noise by a little, other seeds are 1.4 apart
BEYOND = 1e-3  # of the reference's timesteps: rounding

Curve = Mapping[float, Tensor]  # values by timestep


def aim_at(
    recorded: RecordedSampler, recording: Recording, reference: Recording
) -> RecordedSampler:
    """The runs with the reference's latents, outputs and results in the place of their own.

    Where no step of the reference stands at a timestep, its values there are those of the cubic
    through the four nearest.

    Args:
        recorded: runs of one length, of `recording`.
        recording: all runs, with the calls of every step in one.
        reference: the same runs in more steps, in that form too.

    Raises:
        PlanError: the reference has other runs, no more steps, or does not cover their timesteps.
    """
    clock = shared_clock(recording, reference)
    length = len(recorded.runs[0])
    places = [k for k, run in enumerate(recording.runs) if len(run) == length]
    for run, end, place in zip(recorded.runs, recorded.ends, places, strict=True):
        _check_run(run, reference.runs[place], recorded.steps.latent, recording.dependence, place)
        _check_end(end, reference.ends[place], place)
    runs = [
        _resampled(run, reference.runs[place], clock, recorded.steps.latent)
        for run, place in zip(recorded.runs, places, strict=True)
    ]
    outputs = [
        (known[0], *_resampled_outputs(run[1:], reference, place, clock, recorded.steps.latent))
        for run, known, place in zip(runs, recorded.outputs, places, strict=False)
    ]
    ends = [
        None if end is None else _like(reference.ends[place], end)
        for end, place in zip(recorded.ends, places, strict=True)
    ]
    return replace(
        recorded,
        runs=tuple(runs),
        outputs=tuple(outputs),
        ends=tuple(ends),
        reference=Reference(reference.steps, _off(recorded.ends, ends)),
    )


def shared_clock(recording: Recording, reference: Recording) -> Timestep:
    """What counts down as many runs of both.

    Raises:
        PlanError: another input does in each, or none, or there are other runs.
    """
    own, other = recording.timestep, reference.timestep
    if own is None or other is None or (own.name, own.descends) != (other.name, other.descends):
        here, there = (clock.name if clock else "none" for clock in (own, other))
        raise _refused("runs that one input counts down in both", f"{here} here, {there} there")
    if len(reference.runs) != len(recording.runs):
        raise _refused(f"{len(recording.runs)} runs", str(len(reference.runs)))
    return own


def fitted_to(reference: Reference | None) -> str:
    """How output weights were made, for `Recipe.correction`."""
    if reference is None:
        return FITTED
    off = reference.off
    text = "" if off is None else f", from which the recorded runs are {off:.3g} off"
    return f"fitted to a reference of {reference.steps} steps{text}"


def _resampled(run: Run, finer: Run, clock: Timestep, latent: str) -> list[dict[str, Tensor]]:
    """The calls of a run with the reference's latents; the first one keeps its noise."""
    # Where a step calls twice, as Heun's method does, the last latent of a timestep is the better.
    curve = {clock.value(call): call[latent] for call in finer}
    first, *others = run
    values = _along(curve, others, clock)
    moved = (
        {**call, latent: _like(value, call[latent])}
        for call, value in zip(others, values, strict=True)
    )
    return [dict(first), *moved]


def _resampled_outputs(
    calls: Run, reference: Recording, place: int, clock: Timestep, latent: str
) -> tuple[Tensor, ...]:
    """The reference's outputs at the timesteps of calls, with the latent's channels alone."""
    finer, outputs = reference.runs[place], reference.run_outputs[place]
    curve = {
        clock.value(call): latent_channels(output, call[latent])
        for call, output in zip(finer, outputs, strict=True)
        if output is not None
    }
    if len(curve) < len({clock.value(call) for call in finer}):
        raise _refused(f"the model's outputs in run {place}", "none for some")
    values = _along(curve, calls, clock)
    return tuple(_like(value, call[latent]) for call, value in zip(calls, values, strict=True))


def _along(curve: Curve, calls: Run, clock: Timestep) -> Iterator[Tensor]:
    """Values of a curve at the timesteps of calls."""
    times = sorted(curve)
    slack = BEYOND * (times[-1] - times[0])
    for call in calls:
        wanted = clock.value(call)
        if not times[0] - slack <= wanted <= times[-1] + slack:
            raise _refused(
                f"steps on both sides of {clock.name} {wanted:g}",
                f"steps from {times[-1]:g} to {times[0]:g}",
            )
        yield curve[wanted] if wanted in curve else _between(curve, times, wanted)


def _between(curve: Curve, times: Sequence[float], wanted: float) -> Tensor:
    """Lagrange's formula through the nearest values, in float64."""
    first = min(bisect_left(times, wanted) - NEIGHBOURS // 2, len(times) - NEIGHBOURS)
    near = times[max(first, 0) :][:NEIGHBOURS]
    value = torch.zeros_like(curve[near[0]], dtype=torch.float64)
    for time in near:
        weight = 1.0
        for other in near:
            weight *= 1.0 if other == time else (wanted - other) / (time - other)
        value += weight * curve[time]
    return value


def _like(value: Tensor | None, own: Tensor) -> Tensor:
    assert value is not None
    return value.to(own.device, own.dtype)


def _off(ends: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> float | None:
    """Mean relative error of recorded results against the reference's."""
    pairs = [(a, b) for a, b in zip(ends, exact, strict=True) if a is not None and b is not None]
    errors = [error for own, aim in pairs for error in relative_errors(own, aim)]
    return fmean(errors) if errors else None


def _check_run(
    run: Run, finer: Run, latent: str, dependence: Mapping[str, Dependence], place: int
) -> None:
    """Refuse a run that is not the same one in more steps."""
    if len(finer) <= len(run):
        raise _refused(f"more than {len(run)} steps in run {place}", str(len(finer)))
    for name, own in run[0].items():
        other = finer[0][name].to(own.device)
        if own.shape != other.shape:
            raise _refused(f"{name} of {tuple(own.shape)} in run {place}", str(tuple(other.shape)))
        if name == latent:
            off = float((other - own).double().norm() / own.double().norm())
            if off > SAME_NOISE:
                raise _refused(f"the noise of run {place}", f"another, {off:.2g} apart")
        elif dependence[name] <= Dependence.RUN and not torch.equal(own, other):
            raise _refused(f"the {name} of run {place}", "another")


def _check_end(own: Tensor | None, finer: Tensor | None, place: int) -> None:
    """Refuse a run whose result is not known, where that of the recorded run is."""
    if own is not None and (finer is None or finer.shape != own.shape):
        got = "none" if finer is None else f"one of {tuple(finer.shape)}"
        raise _refused(f"a result of {tuple(own.shape)} for run {place}", got)


def _refused(expected: str, got: str) -> PlanError:
    return PlanError(
        "reference",
        expected=expected,
        got=got,
        fix="Record the same runs in the same order, with the same noise and conditions and many "
        "more steps.",
    )
