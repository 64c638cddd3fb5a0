"""Recorded runs that an artifact can be run along, or why it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from calicache.export.artifact.manifest import Layout, Manifest
from calicache.graph_passes.common.errors import CompareError
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.recording.timestep import Run

_NOT_IN_NUMPY = "bfloat16"


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """One recorded denoising.

    Attributes:
        calls: of the model, by step; several where a step calls it several times.
        whole: the same with all calls of a step in one batch.
        end: the run's result, (B, ...) or with all parts of the guided batch.
    """

    calls: tuple[Run, ...]
    whole: Run
    end: Tensor


def matching_runs(
    manifest: Manifest, recording: Recording, count: int | None = None
) -> tuple[RecordedRun, ...]:
    """The recorded runs, after a check that an artifact can be run along them.

    A recording does not tell its model's weights: those cannot be checked here.

    Args:
        manifest: of the artifact.
        recording: whole runs, each ended by `finish`.
        count: how many of the runs, from the first; None takes all.

    Raises:
        CompareError: other inputs, steps or calls per step than the artifact's, a run without
            its result, or fewer runs than asked for.
        NoSampler: the calls of a step cannot be seen as one batch.
    """
    calls, by_step = recording.calls_per_step, manifest.layout is Layout.SAMPLER
    if not by_step and calls != manifest.calls_per_step:
        raise CompareError(
            "calls per step",
            expected=f"{manifest.calls_per_step}, as in the artifact",
            got=f"{calls} in the recording",
            fix="Compare with a recording of the same guidance, or plan and export for this one.",
        )
    whole = recording.by_step()
    _check_inputs(manifest.inputs, (whole if by_step else recording).signature.tensors)
    chosen = _check_count(len(whole.runs), count)
    recorded = zip(recording.denoisings, whole.runs, whole.ends, strict=True)
    runs = []
    for place, (denoising, run, end) in enumerate(list(recorded)[:chosen]):
        result = _check_run(place, run, end, len(manifest.schedule))
        steps = (denoising[k : k + calls] for k in range(0, len(denoising), calls))
        runs.append(RecordedRun(tuple(steps), run, result))
    return tuple(runs)


def _check_inputs(own: Sequence[TensorSpec], recorded: Sequence[TensorSpec]) -> None:
    forms = {spec.name: spec for spec in recorded}
    names = [spec.name for spec in own]
    if set(names) != set(forms):
        raise CompareError(
            "inputs",
            expected=", ".join(names),
            got=f"{', '.join(forms)} in the recording",
            fix="Compare an artifact with a recording of its own model.",
        )
    for spec in own:
        if spec != forms[spec.name]:
            raise CompareError(
                f"input {spec.name}",
                expected=f"{spec}, as in the artifact",
                got=f"{forms[spec.name]} in the recording",
                fix="Record with this shape and dtype, or export for the recorded ones "
                "(export_onnx(fast.for_call(...), ...) for another batch size).",
            )
        if spec.dtype == _NOT_IN_NUMPY:
            raise CompareError(
                f"input {spec.name}",
                expected="a dtype that NumPy has, to hand it to ONNX Runtime",
                got=str(spec),
                fix="Record, plan and export in float32 or float16.",
            )


def _check_count(recorded: int, asked: int | None) -> int:
    count = recorded if asked is None else asked
    if not 1 <= count <= recorded:
        raise CompareError(
            "runs",
            expected=f"1 .. {recorded}, the recorded runs",
            got=str(count),
            fix="Ask for fewer, or record more.",
        )
    return count


def _check_run(place: int, run: Run, end: Tensor | None, steps: int) -> Tensor:
    if len(run) != steps:
        raise CompareError(
            f"run {place}",
            expected=f"{steps} steps, as in the artifact's schedule",
            got=f"{len(run)} in the recording",
            fix="Compare with whole runs of this many steps, or plan and export for theirs.",
        )
    if end is None:
        raise CompareError(
            f"run {place}",
            expected="its result, which the final error is measured against",
            got="none in the recording",
            fix="Call recording.finish(latents) after every recorded run.",
        )
    return end
