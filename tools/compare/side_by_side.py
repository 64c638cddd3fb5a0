"""One recorded run beside the same run of an artifact: latents and seconds of every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calicache.export.session.session import Session
from calicache.graph_passes.common.errors import CompareError, NoSampler
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.signature import CallSignature
from calicache.graph_passes.recording.timestep import Run
from calicache.graph_passes.sampler.update import (
    SamplerSteps,
    find_latent,
    find_sampler_steps,
    latent_channels,
    recorded_next,
)
from calicache.tools.compare.artifact_tables import FirstStep
from calicache.tools.compare.recorded_runs import RecordedRun, RecordedRuns

OnStep = Callable[[], None]


@dataclass(frozen=True, slots=True)
class SideBySide:
    """What came of one run.

    Attributes:
        full: the recorded result, (B, ...).
        cached: the artifact's, alike.
        errors: relative L2 error of every sample's latent after each step, (T, B); None where
            the steps cannot be seen.
        full_seconds: of the full model by step; None where the artifact has no such step.
        cached_seconds: of the artifact by step; one number where the steps cannot be seen.
    """

    full: Tensor
    cached: Tensor
    errors: tuple[tuple[float, ...], ...] | None
    full_seconds: tuple[float, ...] | None
    cached_seconds: tuple[float, ...]


def run_steps(
    session: Session,
    run: RecordedRun,
    dependence: Mapping[str, Dependence],
    first_step: FirstStep,
    on_step: OnStep,
) -> SideBySide:
    """The full model, then the cached run, in the layouts `step` and `pair`.

    Step 0 of an artifact is a REFRESH that reads nothing kept: given the call of any step it
    makes the full model's output. Its time includes that of writing the caches. The sampler's
    update is recovered from these outputs and the recorded latents, as in planning, and then
    applied to the cached run's outputs in float32, outside of the time measured.

    Args:
        session: of the artifact.
        run: of the artifact's form.
        dependence: class of every tensor argument.
        first_step: weights of step 0.
        on_step: called after every step of either.

    Raises:
        CompareError: the latents are no fixed weighted sums of earlier ones and the outputs.
    """
    try:
        latent, outputs, full_seconds = _run_full(session, run, dependence, first_step, on_step)
        sampler = find_sampler_steps(latent, [run.whole], [outputs], [run.end])
    except NoSampler as refusal:
        raise CompareError(
            "sampler",
            expected="recorded latents that are fixed weighted sums of earlier ones and of the "
            "artifact's own full outputs",
            got=refusal.reason,
            fix="Compare with a recording of the weights that were exported, under a "
            "deterministic sampler (DDIM without clip_sample, Euler, flow matching, "
            "DPM-Solver++ 2M).",
        ) from refusal
    wanted = [
        recorded_next(run.whole, run.end, step, latent, sampler.parts)
        for step in range(len(run.whole))
    ]
    reached, cached_seconds = _run_cached(session, run, sampler, on_step)
    errors = tuple(relative_errors(*pair) for pair in zip(reached, wanted, strict=True))
    return SideBySide(
        wanted[-1].float(), reached[-1], errors, tuple(full_seconds), tuple(cached_seconds)
    )


def _run_full(
    session: Session,
    run: RecordedRun,
    dependence: Mapping[str, Dependence],
    first_step: FirstStep,
    on_step: OnStep,
) -> tuple[str, list[Tensor], list[float]]:
    """The latent's name, the plain model's output at every recorded call, and its seconds."""
    latent, outputs, seconds = "", list[Tensor](), list[float]()
    for calls, whole in zip(run.calls, run.whole, strict=True):
        output, spent = _call(session, 0, calls)
        if not outputs:
            latent = find_latent(whole, output, dependence)
        own = latent_channels(output, whole[latent])
        outputs.append(first_step.plain_output(own, whole[latent].float()))
        seconds.append(spent)
        on_step()
    return latent, outputs, seconds


def _run_cached(
    session: Session, run: RecordedRun, sampler: SamplerSteps, on_step: OnStep
) -> tuple[list[Tensor], list[float]]:
    """The latents after every step, one copy each, and the seconds of every step."""
    latent, before = sampler.latent, list[Tensor]()
    recorded = run.whole[0][latent]
    x = recorded.float()
    reached, seconds = list[Tensor](), list[float]()
    for step, calls in enumerate(run.calls):
        rows = x.to(recorded.dtype).chunk(len(calls))
        moved = [{**call, latent: own} for call, own in zip(calls, rows, strict=True)]
        output, spent = _call(session, step, moved)
        now = sampler.terms(x, latent_channels(output, x))
        x, before = sampler.next_latent(step, now, before), now
        reached.append(x.chunk(sampler.parts)[0])
        seconds.append(spent)
        on_step()
    return reached, seconds


def warm_up(session: Session, run: RecordedRun) -> None:
    """Run one step of every mode: the first one of each takes longer than all others."""
    schedule = session.manifest.schedule
    for mode in sorted(set(schedule)):  # REFRESH first: the others read what it keeps
        _call(session, schedule.index(mode), run.calls[0])


def run_whole(
    session: Session, run: RecordedRun, latent: str, scale: float, on_step: OnStep
) -> SideBySide:
    """A whole run in the layout `sampler`, from the recorded noise.

    Args:
        session: of the artifact.
        run: of the artifact's form.
        latent: the model's input that holds x.
        scale: of the noise in the model's first call.
        on_step: called once, after the run.

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
    first = run.whole[0]
    inputs: dict[str, Any] = {spec.name: first[spec.name] for spec in record.inputs}
    noise = (first[latent][:rows].float() / scale).numpy()
    begun = time.perf_counter()
    made = torch.from_numpy(session.sample(noise, **inputs))
    spent = time.perf_counter() - begun
    on_step()
    return SideBySide(end, made, None, None, (spent,))


def sampler_latent(session: Session, recorded: RecordedRuns) -> str:
    """The model's input that holds x in the layout `sampler`.

    Raises:
        CompareError: no input, or several, can be it.
    """
    manifest = session.manifest
    record = manifest.sampler
    assert record is not None
    shape = (record.parts * record.noise.shape[0], *record.noise.shape[1:])
    found = [
        spec.name
        for spec in manifest.inputs
        if spec.shape == shape and recorded.dependence[spec.name] is Dependence.LATENT
    ]
    if len(found) != 1:
        raise CompareError(
            "latent",
            expected=f"one input of the shape {shape} that changes as the latent does",
            got=", ".join(found) or "none in the recording",
            fix="Compare an artifact with a recording of its own model and sampler.",
        )
    return found[0]


def time_model(
    model: nn.Module, steps: Sequence[Run], signature: CallSignature
) -> tuple[float, ...]:
    """Seconds of the torch model at every recorded step.

    Args:
        model: the one that was recorded, on any device.
        steps: recorded calls of it, one or several a step.
        signature: of one call.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    seconds = []
    for calls in steps:
        given = [
            signature.unflatten([call[spec.name].to(device) for spec in signature.tensors])
            for call in calls
        ]
        begun = time.perf_counter()
        with torch.no_grad():
            for arguments in given:
                model(**arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return tuple(seconds)


def relative_errors(got: Tensor, wanted: Tensor) -> tuple[float, ...]:
    """Relative L2 error of every sample (B, ...)."""
    exact = wanted.double().flatten(1)
    off = (got.double().flatten(1) - exact).norm(dim=1)
    errors: list[float] = (off / exact.norm(dim=1)).tolist()
    return tuple(errors)


def _call(session: Session, step: int, calls: Run) -> tuple[Tensor, float]:
    """First outputs of all calls of a step in one batch, in float32, and the seconds they took."""
    begun = time.perf_counter()
    made = [session.step(step, call, **inputs) for call, inputs in enumerate(calls)]
    spent = time.perf_counter() - begun
    return torch.cat([torch.from_numpy(output).float() for output in made]), spent
