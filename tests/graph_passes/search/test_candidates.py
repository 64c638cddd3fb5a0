"""Families and candidates of a plan search: costs against `optimize`, budgets, odd models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model import FashionDiT, FashionDiTConfig
from support.models import sample_dit
from support.search.searches import (
    STEPS,
    Flicker,
    assert_same_plan,
    each,
    euler,
    flicker,
    record_runs,
    refuses,
    sample_errors,
)
from torch import Tensor, nn

from calicache.graph_passes import Plan, Recording, StepMode, Weighting, optimize, record
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.recording.binding import bind
from calicache.graph_passes.rewriting.workspace import PlanningTask, Workspace
from calicache.graph_passes.sampler.replay import Answer, Replay
from calicache.graph_passes.search.allocate import MULTIPLE, Allocation
from calicache.graph_passes.search.candidates import (
    SearchState,
    begin,
    find_candidates,
    find_proposals,
    step_answers,
    summarise,
)
from calicache.graph_passes.search.costs import TargetSurvey
from calicache.graph_passes.search.families import Family, find_families, probe_schedule
from calicache.graph_passes.search.ground import Ground, prepare_ground
from calicache.graph_passes.search.journal import Journal
from calicache.graph_passes.search.search import undominated
from calicache.graph_passes.settings.front import FrontPoint
from calicache.graph_passes.settings.latency import EVERY, BranchChoice, LatencyRow, LatencyTable
from calicache.graph_passes.settings.recipe import Recipe
from calicache.graph_passes.settings.request import SearchRequest
from calicache.graph_passes.settings.schedule import MAX_ORDER

R, C, U, F = StepMode
GROUP = "blocks.*"
CHOICE = 1  # the seed that plans are chosen with, of three
ROUNDING: Any = {"rel": 1e-3, "abs": 2e-6}  # float32 sums, in graphs of other batch and order
PLAIN, FULL, REFRESH = 2.0, 1.96, 2.02  # seconds; a full step is faster where values are kept


def request(
    budget: float = 0.5, latency: LatencyTable | None = None, effort: int = 1
) -> SearchRequest:
    return SearchRequest(budget, None, latency, effort, ("*",), ())


def ground_of(model: nn.Module, recording: Recording) -> Ground:
    task = PlanningTask(model, recording, bind(model, recording), Workspace(), Meter(1.0))
    return prepare_ground(task, request(), Journal(None))


@cache
def rich() -> Flicker:
    """Of more directions than CALIBRATE steps can afford: every level has ranks of its own."""
    return Flicker(rank=32).eval()


@cache
def families_of_rich(effort: int = 3) -> tuple[Ground, list[Family], TargetSurvey]:
    model = rich()
    ground = ground_of(model, record_runs(model))
    families, survey = find_families(ground, request(budget=0.6, effort=effort))
    assert survey is not None
    return ground, families, survey


@cache
def state_of_rich() -> SearchState:
    ground, families, _ = families_of_rich()
    return begin(ground, families)


def real_share(
    model: nn.Module,
    ground: Ground,
    allocation: Allocation | None,
    survey: TargetSurvey,
    modes: Sequence[StepMode],
) -> float:
    """MACs of a schedule in the compiled model."""
    recipe = Recipe(
        schedule=tuple(modes),
        rank=MULTIPLE,
        order=MAX_ORDER,
        weighting=Weighting.COVARIANCE,
        rules=allocation.rules if allocation else (),
        ranks=dict(allocation.ranks) if allocation else {},
    )
    plan = Plan(ground.binding, recipe, survey.moments)
    return optimize(model, plan).compiled.cost.run_share(modes)


def test_families_are_of_one_kind_each() -> None:
    _, families, _ = families_of_rich()
    assert [family.spec.name for family in families[:2]] == ["forecast", "reuse"]
    assert [set(family.modes) for family in families[:2]] == [{R, F}, {R, U, F}]
    calibrated = families[2:]
    assert len(calibrated) >= 2
    assert all(set(family.modes) == {R, C, U, F} for family in calibrated)
    allocations = [family.spec.allocation for family in calibrated]
    ranks = [allocation.ranks for allocation in allocations if allocation]
    assert len(ranks) == len(calibrated)
    assert all(one != other for k, one in enumerate(ranks) for other in ranks[:k])


@pytest.mark.parametrize("steps", [5, 6, 8, 35, 50])
def test_cheap_steps_are_probed_once_after_every_refresh_at_lags_in_turn(steps: int) -> None:
    schedule = probe_schedule(steps)
    assert len(schedule) == steps
    refreshes = [k for k, mode in enumerate(schedule) if mode is R]
    assert refreshes == list(range(0, steps, 3))
    lags = [k % 3 for k, mode in enumerate(schedule) if mode is C]
    assert lags == [1, 2] * (len(lags) // 2) + [1] * (len(lags) % 2)
    assert set(schedule) == {R, C, F}


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_cost_of_any_schedule_is_what_optimize_counts(data: st.DataObject) -> None:
    ground, families, survey = families_of_rich()
    family = data.draw(st.sampled_from(families), label="family")
    rest = st.lists(st.sampled_from(family.modes), min_size=STEPS - 1, max_size=STEPS - 1)
    modes = (R, *data.draw(rest, label="modes"))
    allocation = family.spec.allocation if C in modes else None
    expected = real_share(rich(), ground, allocation, survey, modes)
    share = family.shares.run_share(modes, max(family.spec.orders))
    assert share == pytest.approx(expected, rel=1e-9)
    assert share >= family.least_share(STEPS) - 1e-9


@pytest.mark.slow
def test_cost_of_few_calibrate_steps_at_high_ranks_is_what_optimize_counts() -> None:
    model = Flicker(width=256, rank=96).eval()
    ground = ground_of(model, record_runs(model))
    families, survey = find_families(ground, request(budget=0.9))
    assert survey is not None
    modes = (*[R] * (STEPS - 1), C)
    expected = real_share(model, ground, families[-1].spec.allocation, survey, modes)
    assert families[-1].shares.run_share(modes, 2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("budget", [0.126, 0.3, 0.6, 0.97])
def test_candidates_keep_the_budget_and_come_by_error(budget: float) -> None:
    ground, families, _ = families_of_rich()
    candidates, _ = find_candidates(ground, families, state_of_rich(), budget, 5)
    assert 1 <= len(candidates) <= 5
    assert all(candidate.cost <= budget for candidate in candidates)
    for candidate in candidates:
        # The family that was proposed is the one that was run: its CALIBRATE steps are what costs.
        family, order = candidate.family, candidate.order
        assert candidate.cost == family.shares.run_share(candidate.schedule, order)
        assert set(candidate.schedule) <= set(family.modes)
        assert order in family.spec.orders
        assert len(candidate.fit.weights) == STEPS
    assert [m.error for m in candidates] == sorted(m.error for m in candidates)
    assert len({candidate.schedule for candidate in candidates}) == len(candidates)


def test_every_family_that_may_be_better_is_measured() -> None:
    ground, families, _ = families_of_rich()
    trust = {family.spec.name: 1e-9 for family in families}  # far better than rehearsed
    state = replace(state_of_rich(), trust=trust)
    candidates, _ = find_candidates(ground, families, state, 0.6, len(families))
    calibrated = {m.family.spec.name for m in candidates if C in m.schedule}
    # Families whose best schedules are the same are measured once.
    assert len({m.schedule for m in candidates}) == len(candidates)
    assert len(calibrated) >= 2


def test_families_that_were_far_worse_than_rehearsed_are_not_measured_again() -> None:
    ground, families, _ = families_of_rich()
    trust = {family.spec.name: 1e9 for family in families[1:]}
    state = replace(state_of_rich(), trust=trust)
    candidates, after = find_candidates(ground, families, state, 0.6, 4)
    assert {m.family.spec.name for m in candidates} == {"forecast"}
    assert len(candidates) == 4  # the rest are what the best became
    assert set(after.trust) == {family.spec.name for family in families}
    assert state.trust == trust  # a state is a value: what was passed stays as it was


def test_summaries_are_made_once_and_on_the_runs_for_choosing() -> None:
    ground, families, _ = families_of_rich()
    candidates, state = find_candidates(ground, families, state_of_rich(), 0.3, 2)
    assert state.summaries == {}
    once = summarise(ground, state, candidates)
    assert set(once.summaries) == {candidate.key for candidate in candidates}
    assert all(once.summary(c).samples == ground.choice_samples for c in candidates)
    again = summarise(ground, once, candidates)
    assert all(again.summary(c) is once.summary(c) for c in candidates)


@pytest.mark.parametrize("budget", [0.3, 0.6])
def test_families_start_from_what_the_one_before_came_to(budget: float) -> None:
    ground, families, _ = families_of_rich()
    proposals = find_proposals(ground, families, state_of_rich(), budget)
    assert len(proposals) == len(families)
    alone = find_proposals(ground, families[:1], state_of_rich(), budget)[0]
    # The same schedule in more coordinates, all 0: float64 rounding.
    assert all(proposal.error <= alone.error * (1 + 1e-9) for proposal in proposals)
    assert [p.error for p in proposals] == sorted(p.error for p in proposals)


def test_no_candidate_below_the_least() -> None:
    ground, families, _ = families_of_rich()
    least = min(family.least_share(STEPS) for family in families)
    state = state_of_rich()
    assert find_candidates(ground, families, state, 0.99 * least, 3) == ([], state)


def test_answers_spread_from_the_steps_where_they_were_measured() -> None:
    fit = Replay((), (), {1: Answer(0.5, 1.0), 3: Answer(1.5, 0.0)})
    expected = [(0.5, 1.0), (0.5, 1.0), (1.0, 0.5), (1.5, 0.0), (1.5, 0.0)]
    assert [(a.gain, a.spread) for a in step_answers(fit, 5)] == expected
    unknown = step_answers(Replay((), (), {}), 3)
    assert unknown == (Answer(1.0, 0.0),) * 3


def table(rows: dict[BranchChoice, tuple[float, float]], forecast: float) -> LatencyTable:
    """Seconds by hand: (REFRESH, CALIBRATE step) where both branches are so treated."""
    model, recording = flicker()
    own = Plan.from_trajectory(model, recording, weighting="none", correct=False)
    latency_rows = [LatencyRow(EVERY, BranchChoice.FULL, 0, REFRESH, FULL)]
    latency_rows += [LatencyRow(GROUP, choice, 0, *seconds) for choice, seconds in rows.items()]
    return LatencyTable(
        own.binding.weights_hash, "by hand", 2, PLAIN, forecast, tuple(latency_rows)
    )


def by_hand(point: FrontPoint, latency: LatencyTable) -> float:
    """Share of the seconds of a run, where CALIBRATE steps calibrate all layers."""
    seconds = {row.choice: row for row in latency.rows}
    refresh, total = latency.plain, 0.0
    for mode, choice in ((C, BranchChoice.LINEAR), (U, BranchChoice.REUSE)):
        if mode in point.schedule:
            refresh += seconds[choice].refresh - latency.plain
            total += seconds[choice].step * point.schedule.count(mode)
    total += refresh * point.schedule.count(R) + latency.forecast * point.schedule.count(F)
    return total / (len(point.schedule) * latency.plain)


def points_of(plan: Plan) -> Iterator[tuple[Plan, FrontPoint]]:
    assert plan.front is not None
    for place, point in enumerate(plan.front.points):
        yield plan.take(place), point


@pytest.mark.parametrize(
    ("linear", "reuse", "names", "modes"),
    [
        (1.0, 1.2, ["forecast", "reuse", "calibrate-0.45"], {R, C, U, F}),
        (1.0, 2.1, ["forecast", "calibrate-0.45"], {R, C, F}),
        (1.0, PLAIN, ["forecast", "calibrate-0.45"], {R, C, F}),
        (2.1, 2.2, ["forecast"], {R, F}),
    ],
)
def test_modes_that_are_slower_than_plain_steps_have_no_family(
    linear: float, reuse: float, names: list[str], modes: set[StepMode]
) -> None:
    rows = {BranchChoice.LINEAR: (REFRESH, linear), BranchChoice.REUSE: (REFRESH, reuse)}
    families, _ = find_families(ground_of(*flicker()), request(latency=table(rows, forecast=0.01)))
    assert [family.spec.name for family in families[: len(names)]] == names
    assert {mode for family in families for mode in family.modes} == modes


def test_plans_that_others_beat_in_time_and_error_are_not_chosen_from() -> None:
    ground, families, _ = families_of_rich()
    candidates, state = find_candidates(ground, families, state_of_rich(), 0.5, 3)
    state = summarise(ground, state, candidates)
    one, *others = candidates
    slow = replace(one, cost=one.cost + 0.01)  # the same plan at another cost
    assert undominated(state, [slow, one]) == [one]
    assert undominated(state, [one, one]) == [one, one]
    kept = undominated(state, candidates)
    assert kept
    assert all(
        not (o.cost <= c.cost and state.summary(o).mean < state.summary(c).mean)
        for c in kept
        for o in (one, *others)
    )


@pytest.mark.slow
def test_calibration_that_saves_no_time_is_not_used() -> None:
    dear = (PLAIN, PLAIN)
    latency = table(dict.fromkeys(BranchChoice, dear), forecast=0.01)
    plan = Plan.search(*flicker(), budget=0.5, latency=latency)
    assert plan.front is not None
    assert plan.front.unit == "by hand"
    for _, point in points_of(plan):
        assert set(point.schedule) == {R, F}
        assert point.cost == pytest.approx(by_hand(point, latency), rel=1e-9)
    assert plan.front.points[plan.front.choice].cost <= 0.5
    assert plan.statistics == {}


@pytest.mark.slow
def test_costs_are_shares_of_the_measured_seconds() -> None:
    rows = {BranchChoice.LINEAR: (2.1, 0.5), BranchChoice.REUSE: (2.04, 1.5)}
    latency = table(rows, forecast=1.9)
    model, _ = flicker()
    plan = Plan.search(*flicker(), budget=0.5, latency=latency)
    assert plan.front is not None
    assert plan.schedule.count(C) >= STEPS // 2
    for plan_of_point, point in points_of(plan):
        assert point.cost == pytest.approx(by_hand(point, latency), rel=1e-9)
        errors = sample_errors(euler(optimize(model, plan_of_point), CHOICE), euler(model, CHOICE))
        assert fmean(errors) == pytest.approx(point.error.mean, **ROUNDING)
    assert plan.front.points[plan.front.choice].cost <= 0.5


@pytest.mark.slow
def test_time_that_no_mode_saves_is_refused() -> None:
    latency = table({}, forecast=PLAIN)
    with refuses("latency", "less time than the plain model's", "got 1.000 of the full run's time"):
        Plan.search(*flicker(), max_error=10.0, latency=latency)


@pytest.mark.slow
def test_error_is_kept_where_every_plan_is_dear() -> None:
    latency = table({}, forecast=0.95 * PLAIN)  # above 0.95 of the full run in any case
    model, recording = flicker()
    plan = Plan.search(model, each(recording), max_error=10.0, latency=latency)
    assert plan.front is not None
    assert all(0.95 < point.cost < 1 for point in plan.front.points)
    with pytest.raises(PlanError, match=r"^plan: max_error: expected [\d.e-]+ or more, which"):
        Plan.search(model, each(recording), max_error=1e-9, latency=latency)


class Single(nn.Module):
    """A gated branch that is one layer, and so bears its name; a layer between, a last branch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.between, self.b = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + torch.cos(timestep)[:, None, None] * self.a(x)
        x = torch.tanh(self.between(x))
        return x + self.b(x)


@pytest.mark.slow
def test_branches_of_one_layer_can_be_searched() -> None:
    model = Single().eval()
    plan = Plan.search(model, record_runs(model), budget=0.6, effort=3)
    assert {site.branch for site in optimize(model, plan).compiled.analysis.sites.linears} == {
        "a",
        None,
        "b",
    }
    for plan_of_point, point in points_of(plan):
        fast = optimize(model, plan_of_point)
        assert fast.compiled.cost.run_share(point.schedule) == pytest.approx(point.cost, rel=1e-9)
        errors = sample_errors(euler(fast, CHOICE), euler(model, CHOICE))
        assert fmean(errors) == pytest.approx(point.error.mean, **ROUNDING)


@pytest.mark.slow
def test_outputs_that_any_plan_gives_exactly_take_the_cheapest() -> None:
    config = FashionDiTConfig(width=32, depth=1, frequency_channels=32)
    model = FashionDiT(config).eval()  # adaLN-Zero: gives nothing before it is trained
    with record(model) as recording:
        for seed in range(3):
            recording.finish(sample_dit(model, seed=seed))
    plan = Plan.search(model, recording, budget=0.5)
    assert plan.front is not None
    (point,) = plan.front.points  # no other is better
    assert point.error.worst < 1e-6
    assert point.cost == pytest.approx(1 / len(plan.schedule))
    assert_same_plan(Plan.search(model, each(recording), max_error=0.1), plan)


class Plain(nn.Module):
    """No residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x) + timestep[:, None, None]))


@pytest.mark.parametrize("kind", [Plain, Flicker])
def test_forecasts_need_nothing_to_calibrate(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    plan = Plan.search(model, record_runs(model), budget=0.5, exclude=("*",))
    assert plan.statistics == {}
    for plan_of_point, point in points_of(plan):
        assert set(point.schedule) == {R, F}
        fast = optimize(model, plan_of_point)
        assert fast.compiled.cost.run_share(point.schedule) == pytest.approx(point.cost, rel=1e-9)
