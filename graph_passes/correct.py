"""Output weights fitted along the corrected trajectory.

Every step's output becomes w_0 e + sum_j w_j E_j, with e the step's own output and E_j those of
the kept REFRESH steps. The weights are chosen so that the sampler's next latent comes as near
as it can to the recorded one: that takes back what earlier steps did wrong, where a fit to
the step's true output would only keep its own error small. One sweep runs the cached sampler
and fits, applies and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from calicache.graph_passes.branches import SiteRejection
from calicache.graph_passes.capture import CapturedGraph, graph_outputs
from calicache.graph_passes.dependence import Dependence
from calicache.graph_passes.record import Run, Trajectory
from calicache.graph_passes.rewrite import Rewritten
from calicache.graph_passes.sampler_step import (
    SamplerSteps,
    find_latent,
    find_sampler_steps,
    match_channels,
)
from calicache.graph_passes.schedule import StepMode, Table, output_table

RIDGE = 1e-6


def fit_outputs(
    captured: CapturedGraph,
    rewritten: Rewritten,
    trajectory: Trajectory,
    dependence: Mapping[str, Dependence],
    schedule: Sequence[StepMode],
    order: int,
    on_step: Callable[[int, int], None] | None = None,
) -> Table | SiteRejection:
    """Weights of own and kept outputs by step, (T, order + 2).

    Args:
        captured: the plain graph.
        rewritten: its variants, without output weights.
        trajectory: the recorded runs; those of the schedule's length are used.
        dependence: class of every tensor argument.
        schedule: mode of every step.
        order: of the anchors; order + 1 refreshes are kept.
        on_step: called as on_step(done, total), for a progress bar.

    Returns:
        The table, or why there is none: the sampler's update cannot be told from the recording.
    """
    returned = graph_outputs(captured.graph)
    meta = returned[0].meta.get("val") if isinstance(returned[0], fx.Node) else None
    if len(returned) != 1 or not (isinstance(meta, Tensor) and meta.is_floating_point()):
        reason = f"the model returns {len(returned)} values, not one floating-point tensor"
        return SiteRejection("sampler", "", reason)
    runs = [
        [{name: value.to(captured.device) for name, value in call.items()} for call in run]
        for run in trajectory.runs
        if len(run) == len(schedule)
    ]
    if not runs or len(schedule) < 2:
        reason = f"no recorded run has the plan's {len(schedule)} steps"
        return SiteRejection("sampler", "", reason)
    total = len(runs) * len(schedule) + len(schedule)
    outputs: list[list[Tensor]] = []
    latent: str | SiteRejection = ""
    for run in runs:
        outputs.append([])
        for call in run:
            output = _run_plain(captured, list(call.values()))
            if not latent:
                latent = find_latent(call, output, dependence)
            if isinstance(latent, SiteRejection):
                return latent
            own = match_channels(output, call[latent])
            assert own is not None
            outputs[-1].append(own)
            if on_step:
                on_step(sum(len(done) for done in outputs), total)
    assert isinstance(latent, str)
    sampler = find_sampler_steps(latent, runs, outputs)
    if isinstance(sampler, SiteRejection):
        return sampler
    plain = output_table(schedule, order)
    sweep = _Sweep(rewritten, sampler, schedule, plain, [_Denoising(run) for run in runs])
    rows = []
    for step in range(len(schedule)):
        rows.append(sweep.advance(step))
        if on_step:
            on_step(total - len(schedule) + step + 1, total)
    return tuple(rows)


@dataclass(slots=True)
class _Denoising:
    """One run of the cached sampler along the recorded one."""

    recorded: Run
    x: Tensor | None = None
    before: Sequence[Tensor] = ()
    kept: tuple[dict[str, Tensor], ...] = ()
    outputs: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class _Sweep:
    rewritten: Rewritten
    sampler: SamplerSteps
    schedule: Sequence[StepMode]
    plain: Table
    runs: Sequence[_Denoising]

    def advance(self, step: int) -> tuple[float, ...]:
        """Run one step of all runs, fit its weights, apply them."""
        features = [self._features(run, step) for run in self.runs]
        plain = self.plain[step]
        if step == len(self.sampler.weights):  # what the last output becomes was not recorded
            return plain
        weights = self._fit(step, features, plain)
        for run, (terms, outputs) in zip(self.runs, features, strict=True):
            mixed = _mix(weights, outputs)
            now = [terms[0], *self.sampler.output_terms(mixed)]
            run.x = self.sampler.next_latent(step, now, run.before)
            run.before = now
        return weights

    def _features(self, run: _Denoising, step: int) -> tuple[list[Tensor], list[Tensor | None]]:
        """Terms of x, and the outputs to mix: own (None on FORECAST), then the kept ones."""
        call = dict(run.recorded[step])
        latent = self.sampler.latent
        run.x = call[latent] if run.x is None else run.x.to(call[latent].dtype)
        call[latent] = run.x
        mode = self.schedule[step]
        own: Tensor | None = None
        kept: list[Tensor | None] = [*run.outputs]
        if mode is not StepMode.FORECAST:
            raw = self._run_variant(run, mode, step, list(call.values()))
            own = match_channels(raw, run.x)
            assert own is not None
            if mode is StepMode.REFRESH:
                run.outputs = (own, *run.outputs)[: self.rewritten.history]
        return [run.x.chunk(self.sampler.parts)[0]], [own, *kept]

    def _run_variant(
        self, run: _Denoising, mode: StepMode, step: int, tensors: Sequence[Tensor]
    ) -> Tensor:
        variant = self.rewritten.variants[mode]
        device = tensors[0].device
        values = self.rewritten.read(variant.reads, run.kept, step, device)
        with torch.no_grad():
            results = variant.module(*tensors, *values)
        if mode is StepMode.REFRESH:
            names = [cache.name for cache in self.rewritten.caches]
            fresh = dict(zip(names, results[self.rewritten.outputs :], strict=True))
            run.kept = (fresh, *run.kept)[: self.rewritten.history]
        first = results[0]
        assert isinstance(first, Tensor)
        return first

    def _fit(
        self,
        step: int,
        features: Sequence[tuple[list[Tensor], list[Tensor | None]]],
        plain: tuple[float, ...],
    ) -> tuple[float, ...]:
        """Least squares for the distance of x_{k+1} to the recorded one, around `plain`."""
        there = [k for k, value in enumerate(features[0][1]) if value is not None]
        gram = torch.zeros(len(there), len(there), dtype=torch.float64)
        moment = torch.zeros(len(there), dtype=torch.float64)
        for run, (terms, outputs) in zip(self.runs, features, strict=True):
            now = [terms[0], *self.sampler.output_terms(_mix(plain, outputs))]
            reached = self.sampler.next_latent(step, now, run.before)
            missed = run.recorded[step + 1][self.sampler.latent].double() - reached.double()
            scales = self.sampler.weights[step][1 : 1 + self.sampler.parts]
            moves = []
            for k in there:
                value = outputs[k]
                assert value is not None
                parts = self.sampler.output_terms(value)
                moves.append(sum(s * p.double() for s, p in zip(scales, parts, strict=True)))
            matrix = torch.stack([m.flatten() for m in moves], 1)  # type: ignore[union-attr]
            gram += matrix.T @ matrix
            moment += matrix.T @ missed.chunk(self.sampler.parts)[0].flatten()
        gram += RIDGE * torch.diag(gram.diagonal())
        change = torch.linalg.lstsq(gram, moment[:, None]).solution[:, 0].tolist()
        weights = list(plain)
        for k, value in zip(there, change, strict=True):
            weights[k] += value
        return tuple(weights)


def _mix(weights: Sequence[float], outputs: Sequence[Tensor | None]) -> Tensor:
    total: Tensor | None = None
    for weight, value in zip(weights, outputs, strict=False):
        if value is not None and weight:
            total = weight * value if total is None else total + weight * value
    assert total is not None
    return total


def _run_plain(captured: CapturedGraph, tensors: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        first = captured.module(*tensors)[0]
    assert isinstance(first, Tensor)
    return first
