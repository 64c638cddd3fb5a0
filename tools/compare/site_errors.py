"""Where along a run the error of an optimised model arises: by residual branch and step.

The cached sampler runs beside the recorded one, each on its own latents. After every residual
branch the streams that it joins are compared with those of the plain model in the recorded call of
the same step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, fx

from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.common.progress import Meter, OnProgress
from calicache.graph_passes.graph.tap import Tap
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.rewriting.compile import Compiled
from calicache.graph_passes.sampler.kept import Kept, run_step
from calicache.graph_passes.sampler.recover import RecordedSampler, recover_sampler
from calicache.graph_passes.sampler.update import latent_channels
from calicache.graph_passes.settings.choices import StepMode

LATENTS, OUTPUT = "latents", "output"
_RESULT = "result"


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
    optimized: OptimizedModel, recording: Recording, on_progress: OnProgress | None = None
) -> SiteErrors:
    """Run the optimised model along recorded runs and compare it branch by branch.

    Args:
        optimized: of the model that was recorded.
        recording: whole runs of a deterministic sampler, as long as the plan's schedule.
        on_progress: told how many steps were run.

    Raises:
        NoSampler: the sampler's update cannot be told from the recording.
    """
    model, schedule = optimized.by_step(), optimized.plan.schedule
    binding, steps = model.plan.binding, range(len(schedule))
    recorded = recover_sampler(
        model.compiled.captured, recording.by_step(), binding.dependence, len(schedule)
    )
    sums, joins = _Sums(), _joins(model.compiled)
    meter = Meter(len(schedule) * len(recorded.runs), on_progress)
    meter.stage("compare branch by branch")
    for number in range(len(recorded.runs)):
        _run_cached(model.compiled, recorded, number, joins, sums, meter)
    sites = tuple(dict.fromkeys((LATENTS, *joins.values(), OUTPUT)))
    rows = tuple(tuple(sums.relative(site, step) for step in steps) for site in sites)
    return SiteErrors(sites, schedule, rows, sums.relative(_RESULT, 0))


@dataclass(frozen=True, slots=True)
class _Sums:
    """Squares of differences and of what they are relative to, by site and step."""

    squares: dict[tuple[str, int], list[float]] = field(default_factory=dict)

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


def _run_cached(
    compiled: Compiled,
    recorded: RecordedSampler,
    number: int,
    joins: dict[str, str],
    sums: _Sums,
    meter: Meter,
) -> None:
    """One run of the cached sampler, every step compared with the recorded call."""
    sampler, end, variant_set = recorded.steps, recorded.ends[number], compiled.variant_set
    x: Tensor | None = None
    before: Sequence[Tensor] = ()
    kept: Kept = {}
    for step, call in enumerate(recorded.runs[number]):
        exact_x = call[sampler.latent]
        x = exact_x if x is None else x.to(exact_x.dtype)
        sums.add(LATENTS, step, x, exact_x)
        values, exact = dict[str, Tensor](), dict[str, Tensor]()
        _run_tapped(joins, exact, compiled.captured.module, list(call.values()))
        mode, tensors = compiled.recipe.schedule[step], list({**call, sampler.latent: x}.values())
        run = partial(_run_tapped, joins, values)
        output, kept = run_step(variant_set, mode, kept, step, tensors, run)
        for node, value in values.items():
            sums.add(joins[node], step, value, exact[node])
        own = latent_channels(output, x)
        sums.add(OUTPUT, step, own, recorded.outputs[number][step])
        if step < len(sampler.weights):
            now = sampler.terms(x, own)
            x, before = sampler.next_latent(step, now, before), now
        meter.add()
    if end is not None and x is not None:
        sums.add(_RESULT, 0, x.chunk(sampler.parts)[0], end)


def _run_tapped(
    names: Collection[str],
    values: dict[str, Tensor],
    module: fx.GraphModule,
    tensors: Sequence[Tensor],
) -> Sequence[Tensor]:
    """What a graph returns; the values of some of its nodes are put into a dict."""
    with torch.no_grad():
        results: Sequence[Tensor] = Tap(module, names, values.__setitem__).run(*tensors)
    return results


def _joins(compiled: Compiled) -> dict[str, str]:
    """Branch names by node of the stream after them; two joins of one branch are numbered."""
    names = {
        join: branch.name if not number else f"{branch.name} ({number + 1})"
        for branch in compiled.analysis.sites.branches
        for number, join in enumerate(branch.joins)
    }
    order = [node.name for node in compiled.captured.graph.nodes]
    return dict(sorted(names.items(), key=lambda entry: order.index(entry[0])))
