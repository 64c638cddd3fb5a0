"""Steps timed in eager PyTorch, as an optimised model would run them here: a short probe."""

from __future__ import annotations

import glob
import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.api.speed.cases import (
    Case,
    StepTimes,
    joint_cases,
    latency_cases,
    latency_schedule,
)
from calicache.graph_passes.common.arguments import of_kind, whole_number
from calicache.graph_passes.common.environment import environment
from calicache.graph_passes.common.errors import BenchError
from calicache.graph_passes.common.progress import Meter, OnProgress
from calicache.graph_passes.factors.factors import blank_factors
from calicache.graph_passes.recording.binding import bind
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.rewriting.compile import Assignment, Compiled, compile_graphs
from calicache.graph_passes.rewriting.workspace import Workspace
from calicache.graph_passes.settings.choices import SiteMode, StepMode, Weighting
from calicache.graph_passes.settings.latency import BranchChoice, LatencyRow, LatencyTable, group_of
from calicache.graph_passes.settings.recipe import Recipe
from calicache.graph_passes.settings.schedule import MAX_ORDER
from calicache.graph_passes.sites.analysis import Analysis

LEAST_SECONDS = 1e-9  # a clock may stand still between two looks


def measure_eager(
    model: nn.Module,
    recording: Recording,
    *,
    order: int = MAX_ORDER,
    ranks: Sequence[int] | None = None,
    repeats: int = 3,
    workspace: Workspace | None = None,
    on_progress: OnProgress | None = None,
) -> LatencyTable:
    """Measure what single steps take in eager PyTorch on this machine.

    A row is timed for every treatment of all branches at once: calibrated layer by layer and as
    one map, each at two ranks, and reused. What it gains or loses is shared out over the groups of
    branches by their arithmetic. Branches in int8 are left out: in eager PyTorch they multiply in
    floating point, and save nothing. Seconds do not depend on the values of factors, so no
    statistics are collected.

    Args:
        model: in eval mode; the one that was recorded.
        recording: a run of `order` + 2 steps or more, which is what the steps are fed with.
        order: of the anchors: 0, 1 or 2.
        ranks: of the calibration branches; a smaller and a larger one by the width where None.
        repeats: timed steps of every kind, of which the fastest counts.
        workspace: of a plan for this model: what was made there is not made again.
        on_progress: told how many rows are measured.

    Raises:
        CalicacheError: a run that is too short, repeats below 1, or a stage refuses.
    """
    of_kind("recording", recording, Recording, BenchError)
    whole_number("repeats", repeats, BenchError, 1)
    meter = Meter(0.0, on_progress)
    run = max(recording.runs, key=len)
    schedule = latency_schedule(len(run), order)
    recipe = Recipe(schedule=schedule, rank=0, order=order, weighting=Weighting.COVARIANCE)
    binding = bind(model, recording)
    meter.stage("capture the model")
    analysis = (workspace or Workspace()).analysis(model, binding)
    every = latency_cases(analysis.captured, analysis.sites, ranks, keeps=bool(analysis.run_values))
    floats = (case for case in every if case.choice is not BranchChoice.INT8)
    cases = list(joint_cases(floats, analysis.captured, analysis.sites))
    meter.expect(1 + len(cases))
    stand = _Stand(model, Plan(binding, recipe, {}), run, repeats)
    times: list[StepTimes] = []
    for case in (None, *cases):
        meter.stage("time steps")
        times.append(stand.measure(None if case is None else _compiled(analysis, recipe, case)))
        meter.add()
    return _table(analysis, recipe.order, cases, times)


@dataclass(frozen=True, slots=True)
class _Stand:
    """Times the steps of a plan: as many REFRESH steps as are kept, and a cheap one."""

    model: nn.Module
    plan: Plan
    run: Sequence[Any]
    repeats: int

    def measure(self, compiled: Compiled | None) -> StepTimes:
        """Of what was compiled; of FORECAST steps where None."""
        kept = self.plan.recipe.order + 1
        cheap = StepMode.FORECAST if compiled is None else StepMode.CALIBRATE
        recipe = replace(self.plan.recipe, schedule=(*(StepMode.REFRESH,) * kept, cheap))
        fast = OptimizedModel(self.model, replace(self.plan, recipe=recipe), compiled)
        device = next(iter(self.model.parameters())).device
        signature = self.plan.binding.signature
        calls = [
            signature.unflatten([call[spec.name].to(device) for spec in signature.tensors])
            for call in self.run[: kept + 1]
        ]
        rounds: list[StepTimes] = []
        for _ in range(1 + self.repeats):
            with fast.start_run():
                seconds = [seconds_of(fast, call) for call in calls]
            plain = [seconds_of(self.model, call) for call in calls[-2:]]
            rounds.append(StepTimes(plain[-1], seconds[-2], seconds[-1]))
        timed = rounds[1:]  # the first one warms up
        return StepTimes(
            min(times.plain for times in timed),
            min(times.refresh for times in timed),
            min(times.cheap for times in timed),
        )


def seconds_of(model: nn.Module, call: dict[str, Any]) -> float:
    """Seconds that a call takes until its result is there."""
    start = time.perf_counter()
    with torch.no_grad():
        model(**call)
    wait()
    return max(time.perf_counter() - start, LEAST_SECONDS)


def wait() -> None:
    """Until an accelerator has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def runtime_of(model: nn.Module) -> str:
    """What runs a model here, in words."""
    device = next((value.device.type for value in model.parameters()), "cpu")
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return f"PyTorch {torch.__version__}, eager, {device} ({name})"


def _compiled(analysis: Analysis, recipe: Recipe, case: Case) -> Compiled:
    own = replace(recipe, rank=case.rank, rules=case.rules)
    factors = {t.name: blank_factors(analysis.captured, t) for t in case.targets if t.corrects}
    return compile_graphs(analysis, own, Assignment(case.targets), factors)


def _table(
    analysis: Analysis, order: int, cases: Sequence[Case], times: Sequence[StepTimes]
) -> LatencyTable:
    """What was measured, the forecast first, as if all plain steps were equally long."""
    plain = min(row.plain for row in times)
    forecast, *measured = (row.scaled(plain) for row in times)
    pairs = list(zip(cases, measured, strict=True))
    full = next((row for case, row in pairs if case.choice is BranchChoice.FULL), None)
    facts = {name: str(value) for part in environment().values() for name, value in part.items()}
    return LatencyTable(
        weights_hash=analysis.binding.weights_hash,
        runtime=runtime_of(analysis.captured.module),
        order=order,
        plain=plain,
        forecast=forecast.cheap,
        rows=tuple(
            row
            for case, row_times in pairs
            for row in _rows(analysis, case, row_times, full or StepTimes(plain, plain, plain))
        ),
        environment=facts,
    )


def _rows(analysis: Analysis, case: Case, times: StepTimes, full: StepTimes) -> list[LatencyRow]:
    """A row of every group, whose changes add up to what was measured of all together."""
    if case.choice is BranchChoice.FULL:
        return [LatencyRow(case.group, case.choice, 0, times.refresh, times.cheap)]
    branches = {rule.pattern for rule in case.rules if rule.mode is not SiteMode.FULL}
    members = [b for b in analysis.sites.branches if glob.escape(b.name) in branches]
    branch_of = {site.name: site.branch for site in analysis.sites.linears}
    macs: Counter[str] = Counter()
    calibration: Counter[str] = Counter()
    for branch in members:
        macs[group_of(branch.name)] += sum(analysis.macs.get(node, 0) for node in branch.nodes)
    for target in case.targets:
        owner = branch_of[target.sites[0]]
        assert owner is not None  # layers outside of branches are computed in full
        calibration[group_of(owner)] += target.calibrate_macs
    total = macs.total()
    shares = {g: own / total if total else 1 / len(macs) for g, own in macs.items()}
    return [
        LatencyRow(
            group,
            case.choice,
            calibration[group],
            full.refresh + (times.refresh - full.refresh) * share,
            full.cheap + (times.cheap - full.cheap) * share,
        )
        for group, share in shares.items()
    ]
