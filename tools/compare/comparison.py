"""An artifact beside the full model along recorded runs: error and time of every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from calicache.export.artifact.manifest import Layout, Manifest
from calicache.export.session.session import Session
from calicache.graph_passes.common.environment import environment
from calicache.graph_passes.common.errors import CompareError
from calicache.graph_passes.common.hashing import hash_weights
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.front import ErrorSummary
from calicache.tools.compare.artifact_tables import read_first_step, read_latent_scale
from calicache.tools.compare.image_measures import (
    Decoder,
    ImageMeasures,
    NoPictures,
    Pictures,
    check_measures,
    make_pictures,
    measure_pictures,
    picture_kind,
)
from calicache.tools.compare.recorded_runs import RecordedRun, RecordedRuns, matching_runs
from calicache.tools.compare.side_by_side import (
    SideBySide,
    relative_errors,
    run_steps,
    run_whole,
    sampler_latent,
    time_model,
    warm_up,
)

WHOLE_RUN = (
    "the layout sampler runs all steps in one call and holds no full model: "
    "no error by step, and no time of a step or of the full model"
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
    mode: StepMode
    error: ErrorSummary | None
    full_seconds: float | None
    cached_seconds: float | None


@dataclass(frozen=True, slots=True)
class ModeTime:
    """Seconds of a step in one mode: medians over its steps in all runs."""

    mode: StepMode
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
            step is the artifact's own REFRESH, which also writes the caches.
        cached_seconds: of a whole run of the artifact, median over the runs.
        torch_seconds: of the torch model's calls in a run, where a model was given.
        no_steps: why there are no errors and times of steps; None where there are.
        measures: PSNR and SSIM of the results; None where `no_measures` says why.
        environment: machine and versions.
        full, cached: all results, (samples, ...) float32.
        pictures: the results as pictures, where `measures` are there.
    """

    layout: Layout
    schedule: tuple[StepMode, ...]
    macs_share: float
    provider: str
    runs: int
    samples: int
    steps: tuple[StepComparison, ...]
    modes: tuple[ModeTime, ...]
    final: ErrorSummary
    full_seconds: float | None
    cached_seconds: float
    torch_seconds: float | None
    no_steps: str | None
    measures: ImageMeasures | None
    no_measures: str | None
    environment: Mapping[str, Mapping[str, str | int]]
    full: Tensor = field(repr=False, compare=False)
    cached: Tensor = field(repr=False, compare=False)
    pictures: Pictures | None = field(repr=False, compare=False)

    @property
    def speedup(self) -> float | None:
        """Seconds of the full run over those of the artifact's."""
        return None if self.full_seconds is None else self.full_seconds / self.cached_seconds


def compare(
    artifact: Path | str,
    recording: Recording,
    *,
    runs: int | None = None,
    model: nn.Module | None = None,
    decoder: Decoder | None = None,
    provider: str = "CPUExecutionProvider",
    on_step: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Run an artifact along recorded runs of the full model.

    In the layouts `step` and `pair` the full model is run too: step 0 of the artifact, given the
    recorded call of any step. Full and cached runs take turns. In the layout `sampler` the
    artifact runs from the recorded noise, under the guidance scale that was exported.

    Args:
        artifact: folder written by `export_onnx`.
        recording: whole runs of the exported model, each ended by `finish`.
        runs: how many of them, from the first; None takes all.
        model: the torch model that was exported, to be timed along the recorded calls as well.
        decoder: latents (B, ...) to images (B, C, H, W) in -1 .. 1; None takes results of 1 or
            3 channels for images and others for latents.
        provider: of ONNX Runtime.
        on_step: called as on_step(done, total), for a progress bar.

    Raises:
        CompareError: the two do not belong together, or the sampler adds noise.
        CalicacheError: the artifact is damaged, or refuses an input.
    """
    session = Session(artifact, provider)
    recorded = matching_runs(session.manifest, recording, runs)
    if model is not None:
        _check_model(model, session.manifest)
    if not isinstance(picture_kind(recorded.runs[0].end.shape, decoder), NoPictures):
        check_measures()
    meter = _Meter(session.manifest, recorded, model, on_step)
    beside, torch_seconds = [], []
    run_beside = _runner(artifact, session, recorded, meter.add)
    if model is not None:  # its first call takes longer than all others
        time_model(model, recorded.runs[0].calls[:1], recorded.signature)
    for run in recorded.runs:
        beside.append(run_beside(run))
        if model is not None:
            torch_seconds.append(sum(time_model(model, run.calls, recorded.signature)))
            meter.add()
    return _summary(session.manifest, provider, beside, torch_seconds, decoder)


def _runner(
    artifact: Path | str, session: Session, recorded: RecordedRuns, on_step: Callable[[], None]
) -> Callable[[RecordedRun], SideBySide]:
    """What runs one recorded run side by side, in the artifact's layout."""
    if session.manifest.layout is Layout.SAMPLER:
        latent = sampler_latent(session, recorded)
        scale = read_latent_scale(artifact, session.manifest)
        return lambda run: run_whole(session, run, latent, scale, on_step)
    first_step = read_first_step(artifact, session.manifest)
    warm_up(session, recorded.runs[0])
    return lambda run: run_steps(session, run, recorded.dependence, first_step, on_step)


class _Meter:
    """Counts what is done, for a progress bar."""

    def __init__(
        self,
        manifest: Manifest,
        recorded: RecordedRuns,
        model: nn.Module | None,
        on_step: Callable[[int, int], None] | None,
    ) -> None:
        whole = manifest.layout is Layout.SAMPLER
        one = (1 if whole else 2 * len(manifest.schedule)) + (model is not None)
        self._done, self._total, self._on_step = 0, one * len(recorded.runs), on_step

    def add(self) -> None:
        self._done += 1
        if self._on_step:
            self._on_step(self._done, self._total)


def _check_model(model: nn.Module, manifest: Manifest) -> None:
    found = hash_weights(model)
    if found != manifest.weights_hash:
        raise CompareError(
            "model",
            expected=f"the weights that were exported, {manifest.weights_hash[:16]}",
            got=found[:16],
            fix="Give the model that the artifact was made from.",
        )


def _summary(
    manifest: Manifest,
    provider: str,
    beside: Sequence[SideBySide],
    torch_seconds: Sequence[float],
    decoder: Decoder | None,
) -> Comparison:
    full, cached = (torch.cat([getattr(b, name) for b in beside]) for name in ("full", "cached"))
    made = make_pictures(full, cached, decoder)
    pictures = made if isinstance(made, Pictures) else None
    totals = [sum(run.full_seconds) for run in beside if run.full_seconds is not None]
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
        full_seconds=median(totals) if totals else None,
        cached_seconds=median(sum(run.cached_seconds) for run in beside),
        torch_seconds=median(torch_seconds) if torch_seconds else None,
        no_steps=WHOLE_RUN if manifest.layout is Layout.SAMPLER else None,
        measures=None if pictures is None else measure_pictures(pictures),
        no_measures=made.reason if isinstance(made, NoPictures) else None,
        environment=environment(),
        full=full,
        cached=cached,
        pictures=pictures,
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
    seen = [run for run in beside if run.full_seconds is not None]
    if not seen:
        return None, None
    full = [run.full_seconds[k] for run in seen if run.full_seconds for k in places]
    return median(full), median(run.cached_seconds[k] for run in seen for k in places)
