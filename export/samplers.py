"""The denoising loop as tables: what the `sampler` layout does between two calls of the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.common.errors import ExportError, NoSampler
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.sampler.recover import RecordedSampler, recover_sampler
from calicache.graph_passes.sampler.update import SamplerSteps, find_sampler_steps, recorded_next

CONSTANT_GUIDANCE, SAME_SAMPLER = 1e-5, 1e-3
ROW = 4  # numbers of one update


@dataclass(frozen=True, slots=True)
class Sampler:
    """A deterministic sampler: x_{k+1} = a_k x_k + b_k e_k + c_k x_{k-1} + d_k e_{k-1}.

    e is one output for every sample, made from the parts of the guided batch: u + s (c - u)
    with c the part at `conditional`, or sum_p mix_kp e_p where no one scale s fits.

    Attributes:
        latent: the model's input that holds x.
        parts: copies of x in one batch.
        conditional: the part that guidance moves towards; None where `mix` holds.
        guidance: s as it was recorded.
        mix: (T, parts), rows sum to 1.
        scales: (T,); the model gets scale_k x_k.
        updates: (T, 4), rows a, b, c, d.
        inputs: the model's inputs that change with the step alone, (T, *shape) each.
    """

    latent: str
    parts: int
    conditional: int | None
    guidance: float | None
    mix: tuple[tuple[float, ...], ...]
    scales: tuple[float, ...]
    updates: tuple[tuple[float, ...], ...]
    inputs: Mapping[str, Tensor]

    @property
    def looks_back(self) -> bool:
        """Whether any step needs the latent and the output before."""
        return any(row[2] or row[3] for row in self.updates)


def read_sampler(optimized: OptimizedModel, recording: Recording, scheduler: Any = None) -> Sampler:
    """Tables of the sampler that made a recording.

    Args:
        optimized: whose plan was made from the recording.
        recording: recorded runs; with results from `Recording.finish`, or else
        scheduler: the diffusers scheduler that made them, after `set_timesteps`.

    Raises:
        ExportError: the sampler adds noise, or its update is no fixed weighted sum of latents
            and outputs; the last update is known from nowhere; the scheduler is another one.
    """
    try:
        return _read_sampler(optimized, recording, scheduler)
    except NoSampler as refusal:
        raise _refused(refusal.reason) from refusal


def _read_sampler(optimized: OptimizedModel, recording: Recording, scheduler: Any) -> Sampler:
    optimized, recording = optimized.by_step(), recording.by_step()
    length, dependence = len(optimized.plan.schedule), optimized.plan.binding.dependence
    recorded = recover_sampler(optimized.compiled.captured, recording, dependence, length)
    conditional, guidance, mix = _guidance(recorded)
    guided = _guided(recorded, mix)
    scales = (1.0,) * length
    if scheduler is not None:
        replayed, scales = replay_scheduler(scheduler, length)
        _check_same(recorded, guided, replayed, scales)
    elif any(end is None for end in recorded.ends):
        raise ExportError(
            "sampler",
            expected="the sampler's last update",
            got="a recording without its result, and no scheduler",
            fix="Call recording.finish(latents) after the recorded run, or pass the scheduler.",
        )
    else:
        replayed = _refit(recorded, guided)
    return Sampler(
        latent=recorded.steps.latent,
        parts=recorded.steps.parts,
        conditional=conditional,
        guidance=guidance,
        mix=mix,
        scales=scales,
        updates=tuple(_row(weights) for weights in replayed.weights),
        inputs=_step_inputs(optimized, recorded),
    )


def replay_scheduler(scheduler: Any, length: int) -> tuple[SamplerSteps, tuple[float, ...]]:
    """Weights of a diffusers scheduler's `step`, found by running it on random numbers.

    Args:
        scheduler: after `set_timesteps`; it is copied, not changed.
        length: steps that it should have.

    Returns:
        The weights by step, and the scale of the model's input by step.

    Raises:
        ExportError: it has another number of steps, or its `step` is no fixed weighted sum.
    """
    name = type(scheduler).__name__
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
            given = fresh.scale_model_input(x, now) if hasattr(fresh, "scale_model_input") else x
            scales.append(float((given * x).sum() / (x * x).sum()))
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


def _guidance(
    recorded: RecordedSampler,
) -> tuple[int | None, float | None, tuple[tuple[float, ...], ...]]:
    """The conditional part and its scale, if one scale fits; the shares of the parts by step."""
    parts, last = recorded.steps.parts, len(recorded.steps.weights)
    mix = [_shares(weights[1 : 1 + parts]) for weights in recorded.steps.weights]
    mix += [mix[-1]] * (len(recorded.runs[0]) - last)  # the last update may not be known
    if parts == 2:
        at = max((0, 1), key=lambda part: median(abs(row[part]) for row in mix))
        scale = _one_scale(recorded, at)
        worst = max(_moved_by(recorded, step, mix[step][at] - scale) for step in range(last))
        rounding = torch.finfo(recorded.runs[0][0][recorded.steps.latent].dtype).eps
        if worst <= max(CONSTANT_GUIDANCE, rounding):
            pair = (scale, 1 - scale) if at == 0 else (1 - scale, scale)
            return at, scale, (pair,) * len(mix)
    return None, None, tuple(mix)


def _shares(weights: Sequence[float]) -> tuple[float, ...]:
    total = sum(weights)
    if len(weights) == 1:
        return (1.0,)
    if not total:
        raise _refused("outputs of zero in the recording, which tell nothing of guidance")
    return tuple(weight / total for weight in weights)


def _one_scale(recorded: RecordedSampler, at: int) -> float:
    """The guidance scale that fits all steps of the first run best."""
    steps, run, outputs = recorded.steps, recorded.runs[0], recorded.outputs[0]
    signal = power = 0.0
    before: list[Tensor] = []
    for step, weights in enumerate(steps.weights):
        x, first, second = steps.terms(run[step][steps.latent].double(), outputs[step].double())
        towards, base = (first - second, second) if at == 0 else (second - first, first)
        of_e = weights[1] + weights[2]
        reached = weights[0] * x + of_e * base
        for weight, term in zip(weights[3:], before, strict=False):
            reached = reached + weight * term
        wanted = recorded_next(run, recorded.ends[0], step, steps.latent, 2).double()
        signal += float((of_e * towards * (wanted - reached)).sum())
        power += float((of_e * towards).square().sum())
        before = [x, first, second]
    return signal / power if power else 1.0


def _moved_by(recorded: RecordedSampler, step: int, change: float) -> float:
    """How far another guidance scale moves the next latent, relative to it."""
    weights = recorded.steps.weights[step]
    first, second = recorded.outputs[0][step].chunk(2)
    moved = sum(weights[1:3]) * change * (first - second)
    x = recorded_next(recorded.runs[0], recorded.ends[0], step, recorded.steps.latent, 2)
    return float(moved.norm() / x.norm())


def _guided(recorded: RecordedSampler, mix: Sequence[Sequence[float]]) -> list[list[Tensor]]:
    """One output for every sample, by run and step."""
    parts = recorded.steps.parts
    return [
        [
            torch.stack([w * p.double() for w, p in zip(row, e.chunk(parts), strict=True)]).sum(0)
            for row, e in zip(mix, outputs, strict=True)
        ]
        for outputs in recorded.outputs
    ]


def _refit(recorded: RecordedSampler, guided: Sequence[Sequence[Tensor]]) -> SamplerSteps:
    """The update's weights once more, with the parts' shares fixed."""
    latent, parts = recorded.steps.latent, recorded.steps.parts
    runs = [[{latent: call[latent].chunk(parts)[0]} for call in run] for run in recorded.runs]
    ends = [
        None if end is None else end[: len(run[0][latent])]
        for run, end in zip(runs, recorded.ends, strict=True)
    ]
    return find_sampler_steps(latent, runs, guided, ends, parts=1)


def _check_same(
    recorded: RecordedSampler,
    guided: Sequence[Sequence[Tensor]],
    replayed: SamplerSteps,
    scales: Sequence[float],
) -> None:
    """The scheduler makes the recorded latents out of the recorded outputs."""
    latent, parts = recorded.steps.latent, recorded.steps.parts
    run, outputs, end = recorded.runs[0], guided[0], recorded.ends[0]
    after = (*scales[1:], 1.0)  # no model scales the result
    before: list[Tensor] = []
    for step in range(len(run) - (end is None)):
        now = [run[step][latent].chunk(parts)[0].double() / scales[step], outputs[step]]
        reached = replayed.next_latent(step, now, before) * after[step]
        wanted = recorded_next(run, end, step, latent, parts).double()
        left = float((reached - wanted).norm() / wanted.norm())
        if not left <= SAME_SAMPLER:
            raise ExportError(
                "scheduler",
                expected="the one that made the recording",
                got=f"another: it misses the latent of step {step + 1} by {left:.1e}",
                fix="Pass the pipeline's own scheduler after the recorded run.",
            )
        before = now


def _row(weights: Sequence[float]) -> tuple[float, ...]:
    return (*weights, *(0.0,) * (ROW - len(weights)))


def _step_inputs(optimized: OptimizedModel, recorded: RecordedSampler) -> dict[str, Tensor]:
    tables = {}
    for name, kind in optimized.plan.binding.dependence.items():
        if name == recorded.steps.latent or kind < Dependence.STEP:
            continue
        table = torch.stack([call[name].cpu() for call in recorded.runs[0]])
        others = (torch.stack([call[name].cpu() for call in run]) for run in recorded.runs[1:])
        if kind is Dependence.LATENT or any(not torch.equal(table, other) for other in others):
            raise _refused(f"input {name} is not the same in every run, so no table can hold it")
        tables[name] = table
    return tables


def _refused(reason: str) -> ExportError:
    return ExportError(
        "sampler",
        expected="a deterministic sampler: each latent a fixed weighted sum of what came before",
        got=reason,
        fix="Use such a sampler (DDIM without clip_sample, Euler, flow matching, DPM-Solver++ 2M), "
        "or the `step` layout.",
    )
