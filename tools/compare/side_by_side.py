"""One recorded run beside the same run of an artifact: latents and seconds of every step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calicache.export.artifact.folder import read_manifest
from calicache.export.artifact.manifest import Manifest
from calicache.export.session.session import Session
from calicache.graph_passes.common.errors import CompareError
from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.timestep import Run
from calicache.graph_passes.sampler.update import (
    SamplerSteps,
    find_latent,
    find_sampler_steps,
    latent_channels,
    recorded_next,
    relative_errors,
)
from calicache.graph_passes.settings.choices import StepMode
from calicache.tools.compare.operators import AROUND, profile
from calicache.tools.compare.recorded_runs import RecordedRun

Classes = Mapping[str, Dependence]
_LEAST_OWN = 0.1  # weight of the plain output in step 0, to divide by


@dataclass(frozen=True, slots=True)
class SideBySide:
    """What came of one run.

    Attributes:
        full: the recorded result, (B, ...).
        cached: the artifact's, alike.
        errors: relative L2 error of every sample's latent after each step, (T, B); None where
            the steps cannot be seen.
        full_seconds: of the full model by step; one number where the steps cannot be seen.
        cached_seconds: of the artifact, alike.
    """

    full: Tensor
    cached: Tensor
    errors: tuple[tuple[float, ...], ...] | None
    full_seconds: tuple[float, ...]
    cached_seconds: tuple[float, ...]


def run_steps(session: Session, run: RecordedRun, dependence: Classes, meter: Meter) -> SideBySide:
    """The full model, then the cached run, in the layouts `step` and `pair`.

    Step 0 of an artifact is a REFRESH that reads nothing kept: given the call of any step it
    makes the full model's output. Its time includes that of writing the caches. The sampler's
    update is recovered from these outputs and the recorded latents, as in planning, and then
    applied to the cached run's outputs in float32, outside of the time measured.

    Args:
        session: of the artifact.
        run: of the artifact's form.
        dependence: class of every tensor argument.
        meter: counts every step of either.

    Raises:
        NoSampler: the latents are no fixed weighted sums of earlier ones and the outputs: the
            sampler adds noise, or the recording is of other weights.
        CompareError: step 0 does not make the plain output.
    """
    latent, outputs, full_seconds = _run_full(session, run, dependence, meter)
    sampler = find_sampler_steps(latent, [run.whole], [outputs], [run.end])
    exact = [
        recorded_next(run.whole, run.end, step, latent, sampler.parts)
        for step in range(len(run.whole))
    ]
    latents, cached_seconds = _run_cached(session, run, sampler, meter)
    errors = tuple(relative_errors(*pair) for pair in zip(latents, exact, strict=True))
    return SideBySide(
        exact[-1].float(), latents[-1], errors, tuple(full_seconds), tuple(cached_seconds)
    )


def _run_full(
    session: Session, run: RecordedRun, dependence: Classes, meter: Meter
) -> tuple[str, list[Tensor], list[float]]:
    """The latent's name, the plain model's output at every recorded call, and its seconds."""
    latent, outputs, seconds = "", list[Tensor](), list[float]()
    for calls, whole in zip(run.calls, run.whole, strict=True):
        output, spent = _call(session, 0, calls)
        latent = latent or find_latent(whole, output, dependence)
        own = latent_channels(output, whole[latent])
        outputs.append(plain_output(session.manifest, own, whole[latent].float()))
        seconds.append(spent)
        meter.add()
    return latent, outputs, seconds


def plain_output(manifest: Manifest, output: Tensor, latent: Tensor) -> Tensor:
    """The plain model's output e, from what step 0 made of it: own e + rest x, nothing else kept.

    Where output weights were fitted, their row of step 0 is 1 and 0 up to the rounding of the
    recording, which in half precision is 1e-3.

    Args:
        manifest: with the output weights.
        output: of step 0, float32, with the latent's channels alone.
        latent: x, alike.

    Raises:
        CompareError: e has next to no part in step 0.
    """
    own, *_, rest = manifest.output_weights[0] if manifest.output_weights else (1.0, 0.0)
    if abs(own) < _LEAST_OWN:
        raise CompareError(
            "output weights",
            expected="a step 0 that returns the plain model's output",
            got=f"one with a weight of {own:.2g} for it",
            fix="Make the plan again from the recording, and export it.",
        )
    return (output - rest * latent) / own


def _run_cached(
    session: Session, run: RecordedRun, sampler: SamplerSteps, meter: Meter
) -> tuple[list[Tensor], list[float]]:
    """The latents after every step, one copy each, and the seconds of every step."""
    latent, before = sampler.latent, list[Tensor]()
    noise = run.whole[0][latent]
    x = noise.float()
    latents, seconds = list[Tensor](), list[float]()
    for step, calls in enumerate(run.calls):
        rows = x.to(noise.dtype).chunk(len(calls))
        moved = [{**call, latent: own} for call, own in zip(calls, rows, strict=True)]
        output, spent = _call(session, step, moved)
        now = sampler.terms(x, latent_channels(output, x))
        x, before = sampler.next_latent(step, now, before), now
        latents.append(x.chunk(sampler.parts)[0])
        seconds.append(spent)
        meter.add()
    return latents, seconds


def warm_up(session: Session, run: RecordedRun) -> None:
    """Run one step of every mode: the first one of each takes longer than all others."""
    schedule = session.manifest.schedule
    for mode in sorted(set(schedule)):  # REFRESH first: the others read what it keeps
        _call(session, schedule.index(mode), run.calls[0])


def full_share(path: Path | str, provider: str, run: RecordedRun) -> float:
    """A run of REFRESH steps alone against the artifact's own, in the layout `sampler`.

    Both are added up from the times of operators in one profile; what is computed once for all
    steps is part of both.
    """
    times = profile(path, lambda session: _sample(session, run), runs=1, provider=provider)
    schedule = read_manifest(path).schedule
    spent: dict[str, float] = defaultdict(float)
    for entry in times:
        spent[entry.mode] += entry.milliseconds
    own = spent[AROUND] + sum(spent[mode.name] for mode in schedule)
    full = spent[AROUND] + len(schedule) * spent[StepMode.REFRESH.name]
    return full / own


def run_whole(session: Session, run: RecordedRun, share: float, meter: Meter) -> SideBySide:
    """A whole run in the layout `sampler`, from the recorded noise.

    Args:
        session: of the artifact.
        run: of the artifact's form.
        share: what a full run takes of this one's time.
        meter: counts the run.

    Raises:
        CompareError: the recorded result is no latent of the sampler's.
    """
    record = session.manifest.sampler
    assert record is not None
    rows = record.noise.shape[0]
    end = run.end[:rows].float()
    if tuple(end.shape) != record.noise.shape:
        raise CompareError(
            "result",
            expected=f"latents {record.noise.shape}",
            got=str(tuple(run.end.shape)),
            fix="Call recording.finish with the latents, before they are decoded.",
        )
    begun = time.perf_counter()
    cached = _sample(session, run)
    spent = time.perf_counter() - begun
    meter.add()
    return SideBySide(end, cached, None, (share * spent,), (spent,))


def _sample(session: Session, run: RecordedRun) -> Tensor:
    record, first = session.manifest.sampler, run.whole[0]
    assert record is not None
    inputs: dict[str, Any] = {spec.name: first[spec.name] for spec in record.inputs}
    noise = first[record.latent][: record.noise.shape[0]].float() / record.scale
    return torch.from_numpy(session.sample(noise, **inputs))


def _call(session: Session, step: int, calls: Run) -> tuple[Tensor, float]:
    """First outputs of all calls of a step in one batch, in float32, and the seconds they took."""
    begun = time.perf_counter()
    outputs = [session.step(step, call, **inputs) for call, inputs in enumerate(calls)]
    spent = time.perf_counter() - begun
    return torch.cat([torch.from_numpy(output).float() for output in outputs]), spent
