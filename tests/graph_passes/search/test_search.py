"""Plan.search as a user calls it: what is promised, measured again with the user's own sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from methods import sample_dpm
from model import FashionDiT, FashionDiTConfig
from support.models import sample_dit, shake
from support.pipelines.tiny import CASES, PipelineCase
from support.search.searches import (
    assert_same_plan,
    each,
    euler,
    flicker,
    record_runs,
    sample_errors,
)
from torch import Tensor, nn
from weights import DIT_WEIGHTS, load_weights

from calicache.graph_passes import (
    LatencyTable,
    OptimizedModel,
    Plan,
    Recording,
    StepMode,
    optimize,
    record,
    spread_schedule,
)
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.settings.choices import BranchKind
from calicache.graph_passes.settings.front import ErrorSummary, FrontPoint
from calicache.graph_passes.settings.latency import BranchChoice, LatencyRow, group_of

pytestmark = pytest.mark.slow

R, C, U, F = StepMode
SEARCHED, CHOICE, REPORT = 0, 1, 2  # seeds of three runs, by what the search does with them
# The same sums in float32 in another order, which cheap steps carry on.
ROUNDING: Any = {"rel": 2e-3, "abs": 2e-6}
FAINT = 1e-5

Sampler = Callable[[nn.Module, int], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A model, its sampler by seed, and three recorded runs."""

    model: nn.Module
    sample: Sampler
    recording: Recording

    @staticmethod
    def of(model: nn.Module, sample: Sampler) -> Case:
        with record(model) as recording:
            for seed in (SEARCHED, CHOICE, REPORT):
                recording.finish(sample(model, seed))
        return Case(model, sample, recording)

    def errors(self, fast: nn.Module, seed: int) -> list[float]:
        """Of every sample, under the user's own sampler."""
        return sample_errors(self.sample(fast, seed), full_run(self, seed))


@cache
def full_run(case: Case, seed: int) -> Tensor:
    return case.sample(case.model, seed)


@cache
def toy() -> Case:
    """A DiT of one block, whose weights are random and large enough to make errors."""
    torch.manual_seed(0)
    model = shake(FashionDiT(FashionDiTConfig(width=32, depth=1, frequency_channels=32)), 0.3)
    return Case.of(model, lambda m, seed: sample_dit(m, batch=3, seed=seed, steps=8))


@cache
def multistep() -> Case:
    """The same under DPM-Solver++ 2M, which looks back a step."""

    def sample(model: nn.Module, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return sample_dpm(model, torch.randn(3, 1, 28, 28, generator=draw), torch.arange(3), 8)

    return Case.of(toy().model, sample)


@cache
def trained() -> Case:
    """The sample model: 6 images, 15 steps."""
    model = load_weights(FashionDiT(), DIT_WEIGHTS)
    return Case.of(model, lambda m, seed: sample_dit(m, batch=6, seed=seed, steps=15))


@cache
def plan_for(make: Callable[[], Case], budget: float) -> Plan:
    return Plan.search(make().model, make().recording, budget=budget)


def choice_of(plan: Plan) -> FrontPoint:
    assert plan.front is not None
    return plan.front.points[plan.front.choice]


def assert_summary(summary: ErrorSummary | None, errors: list[float]) -> None:
    assert summary is not None
    assert summary.samples == len(errors)
    assert summary.mean == pytest.approx(fmean(errors), **ROUNDING)
    assert summary.worst == pytest.approx(max(errors), **ROUNDING)
    if min(errors) > FAINT:  # below, what a bound is made of is the spread of rounding
        assert summary.bound == pytest.approx(ErrorSummary.of(errors).bound, rel=0.02, abs=2e-6)


def assert_kept(case: Case, plan: Plan, budget: float) -> None:
    """Budget, cost and held-out error of a plan are true."""
    point, fast = choice_of(plan), optimize(case.model, plan)
    assert plan.schedule == point.schedule
    assert plan.recipe.output_weights == point.output_weights
    assert plan.front is not None
    assert plan.recipe.latent == plan.front.latent == "hidden_states"
    assert fast.compiled.cost.run_share(plan.schedule) <= budget + 1e-9
    assert fast.compiled.cost.run_share(plan.schedule) == pytest.approx(point.cost, rel=1e-9)
    assert_summary(plan.front.held_out, case.errors(fast, REPORT))
    assert_summary(point.error, case.errors(fast, CHOICE))


@pytest.mark.parametrize(
    ("make", "budget"), [(toy, 0.26), (toy, 0.5), (toy, 0.9), (multistep, 0.5)]
)
def test_budget_and_errors_are_those_of_the_users_sampler(
    make: Callable[[], Case], budget: float
) -> None:
    plan = plan_for(make, budget)
    assert_kept(make(), plan, budget)
    assert plan.front is not None
    assert (plan.front.unit, plan.front.request) == ("MACs", f"budget {budget:g}")
    within = [point for point in plan.front.points if point.cost <= budget]
    assert choice_of(plan).error.mean == min(point.error.mean for point in within)


@pytest.mark.slow
@pytest.mark.parametrize("make", [toy, multistep])
def test_every_point_of_the_front_is_a_plan(make: Callable[[], Case], tmp_path: Path) -> None:
    plan = plan_for(make, 0.5)
    assert plan.front is not None
    points = plan.front.points
    assert len(points) > 1
    for one, other in pairwise(points):
        assert one.cost < other.cost
        assert one.error.mean > other.error.mean
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert_same_plan(loaded, plan)
    for place, point in enumerate(points):
        chosen = loaded.take(place)
        fast = optimize(make().model, chosen)
        assert fast.compiled.cost.run_share(chosen.schedule) == pytest.approx(point.cost, rel=1e-9)
        assert_summary(point.error, make().errors(fast, CHOICE))


def test_trained_model_keeps_the_budget() -> None:
    assert_kept(trained(), plan_for(trained, 0.5), 0.5)


@pytest.mark.parametrize(
    ("mode", "order", "refreshes"),
    [(U, 0, 7), (F, 2, 7), (C, 2, 5)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_no_uniform_plan_of_that_cost_is_better(mode: StepMode, order: int, refreshes: int) -> None:
    case, budget, steps = trained(), 0.5, trained().recording.steps
    schedule = spread_schedule(steps, refreshes, mode=mode)
    fitted = case.recording.take_runs([SEARCHED])
    plan = Plan.from_trajectory(case.model, fitted, schedule=schedule, order=order, rank=28)
    fast = optimize(case.model, plan)
    assert fast.compiled.cost.run_share(schedule) <= budget
    assert fast.compiled.cost.run_share(spread_schedule(steps, refreshes + 1, mode=mode)) > budget
    assert choice_of(plan_for(trained, budget)).error.mean <= fmean(case.errors(fast, CHOICE))


def test_new_samples_keep_the_error() -> None:
    case, wanted = trained(), 0.06
    plan = Plan.search(case.model, case.recording, max_error=wanted)
    point = choice_of(plan)
    assert point.cost < 1
    assert point.error.bound <= wanted
    assert plan.front is not None
    assert plan.front.request == f"max_error {wanted:g}"
    # The cheapest of those that were found.
    assert all(p.error.bound > wanted for p in plan.front.points if p.cost < point.cost)
    fast = optimize(case.model, plan)
    errors = [error for seed in (100, 101, 102) for error in case.errors(fast, seed)]
    assert sum(error < wanted for error in errors) >= 0.95 * len(errors)


def test_error_that_no_plan_keeps_is_refused_with_one_that_is_kept() -> None:
    case = toy()
    with pytest.raises(PlanError) as caught:
        Plan.search(case.model, each(case.recording), max_error=1e-9)
    assert (caught.value.where, caught.value.got) == ("max_error", "1e-09")
    told = float(caught.value.expected.split()[0])
    plan = Plan.search(case.model, each(case.recording), max_error=told)
    assert choice_of(plan).error.bound <= told


def test_effort_tries_more(tmp_path: Path) -> None:
    case = toy()
    tried = []
    for effort in (1, 2):
        folder = tmp_path / str(effort)
        plan = Plan.search(case.model, case.recording, budget=0.5, effort=effort, path=folder)
        assert choice_of(plan).cost <= 0.5
        tried.append({path.name for path in folder.glob("fit-*.json")})
    assert len(tried[1]) > len(tried[0])


def test_same_inputs_give_the_same_plan() -> None:
    case = toy()
    assert_same_plan(Plan.search(case.model, case.recording, budget=0.5), plan_for(toy, 0.5))


def test_runs_to_report_with_have_no_part_in_the_plan() -> None:
    model, _ = flicker()
    recording = record_runs(model, seeds=(0, 1, 2, 3))
    plans = [Plan.search(model, each(recording, (0, 1, last)), max_error=0.5) for last in (2, 3)]
    assert_same_plan(*plans, held_out=False)
    reported = [plan.front.held_out for plan in plans if plan.front]
    assert reported[0] != reported[1]
    for last, plan, summary in zip((2, 3), plans, reported, strict=True):
        errors = sample_errors(euler(optimize(model, plan), last), euler(model, last))
        assert_summary(summary, list(errors) * 5)


def test_calibration_is_found_where_forecasts_fail() -> None:
    model, recording = flicker()
    plan = Plan.search(model, recording, budget=0.5)  # rank 8 everywhere is exact, at 0.3 a step
    assert plan.front is not None
    assert C in plan.schedule
    assert choice_of(plan).error.mean < 1e-4
    assert not any(choice_of(plan).ranks[name] == 0 for name in plan.statistics)
    needed = {n for p in plan.front.points for n, rank in p.ranks.items() if rank}
    assert set(plan.statistics) == needed  # those of branches as a whole, seen too, are dropped
    fast = optimize(model, plan)
    assert fast.compiled.cost.run_share(plan.schedule) == pytest.approx(
        choice_of(plan).cost, rel=1e-9
    )
    assert {t.name: t.rank for t in fast.compiled.targets} == choice_of(plan).ranks
    errors = sample_errors(euler(fast, REPORT), euler(model, REPORT))
    assert_summary(plan.front.held_out, errors)


def test_int8_is_found_where_seconds_say_so() -> None:
    """A table that measured nothing else of CALIBRATE steps; forecasts fail on this model."""
    model, recording = flicker()
    plain = Plan.from_trajectory(model, recording, rank=0, correct=False)
    groups = {group_of(name) for name in branch_names(optimize(model, plain))}
    rows = tuple(LatencyRow(group, BranchChoice.INT8, 1000, 0.1, 0.06) for group in groups)
    table = LatencyTable(plain.binding.weights_hash, "a runtime", 2, 0.1, 0.001, rows)
    plan = Plan.search(model, recording, budget=0.75, latency=table)
    assert C in plan.schedule
    fast = optimize(model, plan)
    assert {target.branch for target in fast.compiled.targets} == {BranchKind.INT8}
    assert plan.statistics == {}
    assert plan.front is not None
    assert choice_of(plan).cost <= 0.75
    errors = sample_errors(euler(fast, REPORT), euler(model, REPORT))
    assert_summary(plan.front.held_out, errors)
    schedule = ("RRRF" * recording.steps)[: recording.steps]  # takes 0.75 as well
    forecast = optimize(model, Plan.from_trajectory(model, recording, schedule=schedule))
    others = sample_errors(euler(forecast, REPORT), euler(model, REPORT))
    assert fmean(errors) < 0.1 * fmean(others)


def branch_names(fast: OptimizedModel) -> list[str]:
    return [branch.name for branch in fast.compiled.analysis.sites.branches]


def build(case: PipelineCase) -> Any:
    """With Euler's method, as in test_batched."""
    pipe = case.build()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name) for case in CASES if case.calls == 2],
)
def test_guidance_by_two_calls(case: PipelineCase) -> None:
    pipe = build(case)
    with record(pipe.transformer) as recording:
        for seed in (SEARCHED, CHOICE, REPORT):
            recording.finish(case.latents(pipe, "A dog", seed))
    plan = Plan.search(pipe.transformer, recording, budget=0.5)
    fast = optimize(pipe.transformer, plan)
    assert fast.compiled.cost.run_share(plan.schedule) == pytest.approx(
        choice_of(plan).cost, rel=1e-9
    )
    own = build(case)
    own.transformer = fast
    got = case.latents(own, "A dog", REPORT)
    assert plan.front is not None
    assert_summary(plan.front.held_out, sample_errors(got, recording.ends[-1]))
