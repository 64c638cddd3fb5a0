"""An artifact beside the full model along recorded runs: error and time of every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from pydantic import ConfigDict, computed_field
from torch import Tensor

from calicache.export.artifact.manifest import Layout, Manifest
from calicache.export.session.session import Session
from calicache.graph_passes.common.environment import Environment, environment
from calicache.graph_passes.common.progress import Meter, OnProgress
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.sampler.update import relative_errors
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.front import ErrorSummary
from calicache.tools.compare.pictures import (
    Decoder,
    ImageMeasures,
    NoPictures,
    Pictures,
    make_pictures,
    measure_functions,
    measure_pictures,
    picture_kind,
)
from calicache.tools.compare.recorded_runs import RecordedRun, matching_runs
from calicache.tools.compare.side_by_side import (
    Classes,
    SideBySide,
    full_share,
    run_steps,
    run_whole,
    warm_up,
)
from calicache.tools.inspect.facts import Mode

WHOLE_RUN = (
    "the layout sampler runs all steps in one call: no error and no time by step; the full run is "
    "reckoned from what ONNX Runtime's profile says of a REFRESH step"
)


@dataclass(frozen=True, slots=True)
class StepComparison:
    """One step over all runs.

    Attributes:
        step: index in the run.
        mode: what the artifact does.
        error: relative L2 error of the latent after it against the recorded one, over samples.
        full_seconds, cached_seconds: medians over the runs.
    """

    step: int
    mode: Mode
    error: ErrorSummary | None
    full_seconds: float | None
    cached_seconds: float | None


@dataclass(frozen=True, slots=True)
class ModeTime:
    """Seconds of a step in one mode: medians over its steps in all runs."""

    mode: Mode
    steps: int
    full_seconds: float | None
    cached_seconds: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A full and an optimised run side by side. Everything but the seconds is deterministic.

    Errors are relative L2 errors of single samples' latents against the recorded ones. Seconds
    are those of the model alone, without the sampler's arithmetic.

    Attributes:
        layout, schedule: of the artifact.
        macs_share: MACs of a run against the full model's.
        provider: of ONNX Runtime.
        runs, samples: how many were compared.
        steps, modes: errors are None where `no_steps` says why, seconds also.
        final: error of the results.
        full_seconds: of a whole run of the full model in ONNX Runtime, median over the runs. Every
            step is the artifact's own REFRESH, which also writes the caches; in the layout
            `sampler`, as long as a profile says that these take.
        cached_seconds: of a whole run of the artifact, median over the runs.
        no_steps: why there are no errors and times of steps; None where there are.
        measures: PSNR and SSIM of the results; None where `no_measures` says why.
        environment: machine and versions.
        full, cached: all results, (samples, ...) float32.
        pictures: the results as pictures, where `measures` are there.
    """

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)

    layout: Layout
    schedule: tuple[Mode, ...]
    macs_share: float
    provider: str
    runs: int
    samples: int
    steps: tuple[StepComparison, ...]
    modes: tuple[ModeTime, ...]
    final: ErrorSummary
    full_seconds: float
    cached_seconds: float
    no_steps: str | None
    measures: ImageMeasures | None
    no_measures: str | None
    environment: Environment
    full: Tensor = field(repr=False, compare=False)
    cached: Tensor = field(repr=False, compare=False)
    pictures: Pictures | None = field(repr=False, compare=False)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def speedup(self) -> float:
        """Seconds of the full run over those of the artifact's."""
        return self.full_seconds / self.cached_seconds


def compare(
    path: Path | str,
    recording: Recording,
    *,
    runs: int | None = None,
    decoder: Decoder | None = None,
    provider: str = "CPUExecutionProvider",
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Run an artifact along recorded runs of the full model.

    In the layouts `step` and `pair` the full model is run too: step 0 of the artifact, given the
    recorded call of any step. Full and cached runs take turns. In the layout `sampler` the
    artifact runs from the recorded noise, under the guidance scale that was exported.

    Args:
        path: the artifact, a folder written by `export_onnx`.
        recording: whole runs of the exported model, each ended by `finish`.
        runs: how many of them, from the first; None takes all.
        decoder: latents (B, ...) to images (B, C, H, W) in -1 .. 1; None takes results of 1 or
            3 channels for images and others for latents.
        provider: of ONNX Runtime.
        on_progress: told how many steps were run.

    Raises:
        CompareError: the two do not belong together.
        NoSampler: the sampler adds noise, or the recording is of other weights.
        CalicacheError: the artifact is damaged, or refuses an input.
    """
    session = Session(path, provider=provider)
    recorded = matching_runs(session.manifest, recording, runs)
    if not isinstance(picture_kind(recorded[0].end, decoder), NoPictures):
        measure_functions()  # before anything is run
    if session.manifest.layout is Layout.SAMPLER:
        beside = _run_whole(session, path, provider, recorded, on_progress)
    else:
        beside = _run_steps(session, recorded, recording.dependence, on_progress)
    return _summary(session.manifest, provider, beside, decoder)


def _run_steps(
    session: Session, runs: Sequence[RecordedRun], classes: Classes, on_progress: OnProgress | None
) -> list[SideBySide]:
    meter = Meter(2 * len(session.manifest.schedule) * len(runs), on_progress)
    meter.stage("run full and optimised")
    warm_up(session, runs[0])  # the first call of everything takes longer than all others
    return [run_steps(session, run, classes, meter) for run in runs]


def _run_whole(
    session: Session,
    path: Path | str,
    provider: str,
    runs: Sequence[RecordedRun],
    on_progress: OnProgress | None,
) -> list[SideBySide]:
    meter = Meter(1 + len(runs), on_progress)
    meter.stage("profile a REFRESH step")
    share = full_share(path, provider, runs[0])
    meter.add()
    meter.stage("run the artifact")
    return [run_whole(session, run, share, meter) for run in runs]


def _summary(
    manifest: Manifest, provider: str, beside: Sequence[SideBySide], decoder: Decoder | None
) -> Comparison:
    full, cached = (torch.cat([getattr(b, name) for b in beside]) for name in ("full", "cached"))
    pictures = make_pictures(full, cached, decoder)
    return Comparison(
        layout=manifest.layout,
        schedule=manifest.schedule,
        macs_share=manifest.run_share,
        provider=provider,
        runs=len(beside),
        samples=len(full),
        steps=tuple(_steps(manifest.schedule, beside)),
        modes=tuple(_modes(manifest.schedule, beside)),
        final=ErrorSummary.of(relative_errors(cached, full)),
        full_seconds=median(sum(run.full_seconds) for run in beside),
        cached_seconds=median(sum(run.cached_seconds) for run in beside),
        no_steps=WHOLE_RUN if manifest.layout is Layout.SAMPLER else None,
        measures=None if isinstance(pictures, NoPictures) else measure_pictures(pictures),
        no_measures=pictures.reason if isinstance(pictures, NoPictures) else None,
        environment=environment(),
        full=full,
        cached=cached,
        pictures=None if isinstance(pictures, NoPictures) else pictures,
    )


def _steps(schedule: Sequence[StepMode], beside: Sequence[SideBySide]) -> Iterator[StepComparison]:
    for step, mode in enumerate(schedule):
        errors = [run.errors[step] for run in beside if run.errors is not None]
        yield StepComparison(
            step,
            mode,
            ErrorSummary.of([error for one in errors for error in one]) if errors else None,
            *_seconds(beside, [step]),
        )


def _modes(schedule: Sequence[StepMode], beside: Sequence[SideBySide]) -> Iterator[ModeTime]:
    for mode in sorted(set(schedule)):
        places = [step for step, other in enumerate(schedule) if other is mode]
        yield ModeTime(mode, len(places), *_seconds(beside, places))


def _seconds(
    beside: Sequence[SideBySide], places: Sequence[int]
) -> tuple[float | None, float | None]:
    """Medians over some steps of all runs, full and cached; None where steps are not seen."""
    if any(run.errors is None for run in beside):
        return None, None
    full = median(run.full_seconds[k] for run in beside for k in places)
    return full, median(run.cached_seconds[k] for run in beside for k in places)
