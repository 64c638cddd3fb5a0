"""Where along a run the error of an optimised model arises: by residual branch and step.

The cached sampler runs beside the recorded one, each on its own latents. After every residual
branch the streams that it joins are compared with those of the plain model in the recorded call of
the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.common.errors import CompareError, NoSampler
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.step_calls import batch_calls, batch_size
from calicache.graph_passes.recording.timestep import Call
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.sampler.recover import RecordedSampler, recover_sampler
from calicache.graph_passes.sampler.update import SamplerSteps, latent_channels
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.recipe import PlanSettings

LATENTS, OUTPUT = "latents", "output"


@dataclass(frozen=True, slots=True)
class SiteErrors:
    """Relative L2 errors against the recorded runs.

    Attributes:
        sites: `latents` that go into a step, residual branches in graph order, and the `output`.
        schedule: mode of every step.
        errors: by site and step; None where the step does not compute the site.
        result: of the last latents; None where the runs' results were not recorded.
    """

    sites: tuple[str, ...]
    schedule: tuple[StepMode, ...]
    errors: tuple[tuple[float | None, ...], ...]
    result: float | None


def site_errors(
    optimized: OptimizedModel,
    recording: Recording,
    on_step: Callable[[int, int], None] | None = None,
) -> SiteErrors:
    """Run the optimised model along recorded runs and compare it branch by branch.

    Args:
        optimized: of the model that was recorded.
        recording: whole runs of a deterministic sampler, as long as the plan's schedule.
        on_step: called as on_step(done, total), for a progress bar.

    Raises:
        CompareError: the sampler's update cannot be told from the recording.
    """
    model = optimized.by_step()
    recorded = _recorded_sampler(model, optimized.plan.settings, recording)
    sums = _Sums()
    steps, joins = len(model.plan.schedule), _joins(model)
    total = steps * len(recorded.runs)
    result: float | None = None
    for number, run in enumerate(recorded.runs):
        walk = _Walk(model.captured, model.variant_set, model.plan.schedule, recorded.steps, joins)
        for step in range(steps):
            walk.advance(step, run[step], recorded.outputs[number][step], sums)
            if on_step:
                on_step(number * steps + step + 1, total)
        end = recorded.ends[number]
        if end is not None and walk.x is not None:
            sums.add("result", 0, walk.x.chunk(recorded.steps.parts)[0], end)
            result = sums.relative("result", 0)
    names = (LATENTS, *joins.values(), OUTPUT)
    sites = tuple(dict.fromkeys(names))
    rows = tuple(tuple(sums.relative(site, step) for step in range(steps)) for site in sites)
    return SiteErrors(sites, model.plan.schedule, rows, result)


class _Sums:
    """Squares of differences and of what they are relative to, by site and step."""

    def __init__(self) -> None:
        self.squares: dict[tuple[str, int], list[float]] = {}

    def add(self, site: str, step: int, value: Tensor, exact: Tensor) -> None:
        """Add one value of a run."""
        rows = exact[: value.shape[0]]  # the result may hold every guidance part
        entry = self.squares.setdefault((site, step), [0.0, 0.0])
        entry[0] += float((value.double() - rows.double()).square().sum())
        entry[1] += float(rows.double().square().sum())

    def relative(self, site: str, step: int) -> float | None:
        """Give the relative error over all runs; None where nothing was added."""
        if (site, step) not in self.squares:
            return None
        off, size = self.squares[site, step]
        return float((off / size if size else off) ** 0.5)


@dataclass(slots=True)
class _Walk:
    """One run of the cached sampler."""

    captured: CapturedGraph
    variant_set: VariantSet
    schedule: Sequence[StepMode]
    sampler: SamplerSteps
    joins: Mapping[str, str]
    x: Tensor | None = None
    before: Sequence[Tensor] = ()
    kept: tuple[dict[str, Tensor], ...] = ()

    def advance(self, step: int, recorded: Call, output: Tensor, sums: _Sums) -> None:
        """Run one step, compare it with the recorded call, and go on to the next latent."""
        sampler, call = self.sampler, dict(recorded)
        _, exact = _tapped(self.captured.module, self.joins, list(call.values()))
        self.x = call[sampler.latent] if self.x is None else self.x.to(call[sampler.latent].dtype)
        sums.add(LATENTS, step, self.x, call[sampler.latent])
        call[sampler.latent] = self.x
        outputs, found = self._run_variant(step, list(call.values()))
        for node, value in found.items():
            sums.add(self.joins[node], step, value, exact[node])
        own = latent_channels(outputs, self.x)
        sums.add(OUTPUT, step, own, output)
        if step < len(sampler.weights):
            terms = [self.x.chunk(sampler.parts)[0], *sampler.output_terms(own)]
            self.x = sampler.next_latent(step, terms, self.before)
            self.before = terms

    def _run_variant(self, step: int, tensors: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        variant_set, mode = self.variant_set, self.schedule[step]
        variant = variant_set.variants[mode]
        values = variant_set.read(variant.reads, self.kept, step, tensors[0].device)
        results, found = _tapped(variant.module, self.joins, [*tensors, *values])
        if mode is StepMode.REFRESH:
            names = [cache.name for cache in variant_set.caches]
            fresh = dict(zip(names, results[variant_set.outputs :], strict=True))
            self.kept = (fresh, *self.kept)[: variant_set.history]
        return results[0], found


class _Tap(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, names: Collection[str]) -> None:
        super().__init__(module)
        self.names, self.values = names, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.values[n.name] = value
        return value


def _tapped(
    module: fx.GraphModule, names: Collection[str], tensors: Sequence[Tensor]
) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
    tap = _Tap(module, names)
    with torch.no_grad():
        results: Sequence[Tensor] = tap.run(*tensors)
    return results, tap.values


def _joins(model: OptimizedModel) -> dict[str, str]:
    """Branch names by node of the stream after them; two joins of one branch are numbered."""
    names: dict[str, str] = {}
    for branch in model.sites.branches:
        for number, join in enumerate(branch.joins):
            names[join] = branch.name if not number else f"{branch.name} ({number + 1})"
    order = [node.name for node in model.captured.graph.nodes]
    return dict(sorted(names.items(), key=lambda entry: order.index(entry[0])))


def _recorded_sampler(
    batched: OptimizedModel, settings: PlanSettings, recording: Recording
) -> RecordedSampler:
    try:
        if recording.calls_per_step > 1:
            batch = batch_size(settings.signature, settings.dependence)
            recording = batch_calls(recording, batch)
        steps = len(settings.schedule)
        return recover_sampler(batched.captured, recording, settings.dependence, steps)
    except NoSampler as refusal:
        raise CompareError(
            "sampler",
            expected="whole runs of a deterministic sampler, recorded with this model",
            got=refusal.reason,
            fix="Record with the sampler and the steps that the plan is for.",
        ) from refusal
