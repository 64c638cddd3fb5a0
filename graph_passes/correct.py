"""Output weights fitted along the corrected trajectory.

Every step's output becomes w_0 e + sum_j w_j E_j, with e the step's own output and E_j those of
the kept REFRESH steps. The weights are chosen so that the sampler's next latent comes as near
as it can to the recorded one: that takes back what earlier steps did wrong, where a fit to
the step's true output would only keep its own error small. One sweep runs the cached sampler
and fits, applies and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calicache.graph_passes.recover import RecordedSampler
from calicache.graph_passes.rewrite import Rewritten
from calicache.graph_passes.sampler_step import SamplerSteps, match_channels, recorded_next
from calicache.graph_passes.schedule import StepMode, Table, output_table
from calicache.graph_passes.timestep import Run

RIDGE = 1e-6


def fit_outputs(
    rewritten: Rewritten,
    recorded: RecordedSampler,
    schedule: Sequence[StepMode],
    order: int,
    on_step: Callable[[int, int], None] | None = None,
) -> Table:
    """Weights of own and kept outputs by step, (T, order + 2).

    Args:
        rewritten: the variants, without fitted output weights.
        recorded: from `recover_sampler`, for runs as long as the schedule.
        schedule: mode of every step.
        order: of the anchors; order + 1 refreshes are kept.
        on_step: called as on_step(done, total), for a progress bar.
    """
    plain = output_table(schedule, order)
    runs = [_Denoising(*run) for run in zip(recorded.runs, recorded.ends, strict=True)]
    sweep = _Sweep(rewritten, recorded.steps, schedule, plain, runs)
    rows = []
    for step in range(len(schedule)):
        rows.append(sweep.advance(step))
        if on_step:
            on_step(step + 1, len(schedule))
    return tuple(rows)


@dataclass(slots=True)
class _Denoising:
    """One run of the cached sampler along the recorded one."""

    recorded: Run
    end: Tensor | None
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
            latent, parts = self.sampler.latent, self.sampler.parts
            wanted = recorded_next(run.recorded, run.end, step, latent, parts)
            missed = wanted.double() - reached.double().chunk(parts)[0]
            scales = self.sampler.weights[step][1 : 1 + self.sampler.parts]
            moves = []
            for k in there:
                value = outputs[k]
                assert value is not None
                shares = self.sampler.output_terms(value)
                moves.append(sum(s * p.double() for s, p in zip(scales, shares, strict=True)))
            matrix = torch.stack([m.flatten() for m in moves], 1)  # type: ignore[union-attr]
            gram += matrix.T @ matrix
            moment += matrix.T @ missed.flatten()
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
