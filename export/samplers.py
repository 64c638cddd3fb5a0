"""The sampler that made a recording, and diffusers schedulers replayed into the same tables."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.common.arguments import of_kind
from calicache.graph_passes.common.errors import ExportError, NoSampler
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.sampler.guidance import recover_guidance
from calicache.graph_passes.sampler.recover import RecordedSampler, recover_sampler
from calicache.graph_passes.sampler.tables import (
    SamplerTables,
    guided_outputs,
    recover_tables,
    sampler_tables,
)
from calicache.graph_passes.sampler.update import SamplerSteps, find_sampler_steps, recorded_next

SAME_SAMPLER = 1e-3


def read_sampler(
    optimized: OptimizedModel, recording: Recording, scheduler: Any = None
) -> SamplerTables:
    """Tables of the sampler that made a recording.

    Args:
        optimized: whose plan was made from the recording.
        recording: recorded runs; with results from `Recording.finish`, or else
        scheduler: the diffusers scheduler that made them, after `set_timesteps`.

    Raises:
        ExportError: the sampler adds noise, or its update is no fixed weighted sum of latents
            and outputs; the last update is known from nowhere; the scheduler is another one.
    """
    of_kind("optimized", optimized, OptimizedModel, ExportError)
    of_kind("recording", recording, Recording, ExportError)
    try:
        return _read_sampler(optimized, recording, scheduler)
    except NoSampler as refusal:
        raise _refused(refusal.reason) from refusal


def _read_sampler(optimized: OptimizedModel, recording: Recording, scheduler: Any) -> SamplerTables:
    compiled, recording = optimized.by_step().compiled, recording.by_step()
    length, dependence = len(compiled.recipe.schedule), compiled.analysis.binding.dependence
    recorded = recover_sampler(compiled.captured, recording, dependence, length)
    if scheduler is not None:
        steps, scales = replay_scheduler(scheduler, length)
        guidance = recover_guidance(recorded)
        _check_same(recorded, guided_outputs(recorded, guidance)[0], steps, scales)
        return sampler_tables(recorded, dependence, guidance, steps, scales)
    if any(end is None for end in recorded.ends):
        raise ExportError(
            "sampler",
            expected="the sampler's last update",
            got="a recording without its result, and no scheduler",
            fix="Call recording.finish(latents) after the recorded run, or pass the scheduler.",
        )
    return recover_tables(recorded, dependence)


def replay_scheduler(scheduler: Any, length: int) -> tuple[SamplerSteps, tuple[float, ...]]:
    """Weights of a diffusers scheduler's `step`, recovered by running it on random numbers.

    Args:
        scheduler: after `set_timesteps`; it is copied, not changed.
        length: steps that it should have.

    Returns:
        The weights by step, and the scale of the model's input by step.

    Raises:
        ExportError: it is none, has another number of steps, or its `step` is no fixed weighted
            sum.
    """
    name = type(scheduler).__name__
    if not all(hasattr(scheduler, part) for part in ("timesteps", "step")):
        raise ExportError(
            "scheduler",
            expected="a diffusers scheduler after set_timesteps",
            got=f"a value of the class {name}",
            fix="Pass the pipeline's own scheduler, or leave it out.",
        )
    if len(scheduler.timesteps) != length:
        raise ExportError(
            f"scheduler {name}",
            expected=f"{length} timesteps, as in the plan",
            got=str(len(scheduler.timesteps)),
            fix="Call set_timesteps with the recorded number of steps.",
        )
    fresh = _as_before_a_run(scheduler)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 4, 4, generator=draw, dtype=torch.float64)
    run, outputs, scales = [], [], []
    with torch.random.fork_rng(devices=[]):
        # The scheduler's own noise, if any, must not be the numbers that stand for x and e.
        torch.manual_seed(1)
        for now in fresh.timesteps:
            scaled = fresh.scale_model_input(x, now) if hasattr(fresh, "scale_model_input") else x
            scales.append(float((scaled * x).sum() / (x * x).sum()))
            output = torch.randn(x.shape, generator=draw, dtype=torch.float64)
            run.append({"x": x})
            outputs.append(output)
            x = fresh.step(output, now, x).prev_sample.double()
    try:
        steps = find_sampler_steps("x", [run], [outputs], [x], parts=1)
    except NoSampler as refusal:
        raise _refused(f"{name}: {refusal.reason}") from refusal
    return steps, tuple(scales)


def _as_before_a_run(scheduler: Any) -> Any:
    """A copy without what a finished run leaves behind."""
    fresh = copy.deepcopy(scheduler)
    left = dict.fromkeys(("_step_index", "sample", "last_sample", "dt", "prev_derivative"))
    for field, value in {**left, "lower_order_nums": 0, "this_order": 0}.items():
        if hasattr(fresh, field):
            setattr(fresh, field, value)
    if hasattr(fresh, "model_outputs"):
        fresh.model_outputs = [None] * len(fresh.model_outputs)
    return fresh


def _check_same(
    recorded: RecordedSampler,
    outputs: Sequence[Tensor],
    replayed: SamplerSteps,
    scales: Sequence[float],
) -> None:
    """The scheduler makes the first run's latents out of its guided outputs."""
    latent, parts = recorded.steps.latent, recorded.steps.parts
    run, end = recorded.runs[0], recorded.ends[0]
    after = (*scales[1:], 1.0)  # no model scales the result
    before: list[Tensor] = []
    for step in range(len(run) - (end is None)):
        now = [run[step][latent].chunk(parts)[0].double() / scales[step], outputs[step]]
        replayed_next = replayed.next_latent(step, now, before) * after[step]
        following = recorded_next(run, end, step, latent, parts).double()
        left = float((replayed_next - following).norm() / following.norm())
        if not left <= SAME_SAMPLER:
            raise ExportError(
                "scheduler",
                expected="the one that made the recording",
                got=f"another: it misses the latent of step {step + 1} by {left:.1e}",
                fix="Pass the pipeline's own scheduler after the recorded run.",
            )
        before = now


def _refused(reason: str) -> ExportError:
    return ExportError(
        "sampler",
        expected="a deterministic sampler: each latent a fixed weighted sum of what came before",
        got=reason,
        fix="Use such a sampler (DDIM without clip_sample, Euler, flow matching, DPM-Solver++ 2M), "
        "or the `step` layout.",
    )
