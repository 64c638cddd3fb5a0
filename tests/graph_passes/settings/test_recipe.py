"""Ranks by target and the front of a search: written, read back, taken point by point."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model import FashionDiT
from support.models import sample_dit
from support.search.fronts import front_of

from calicache.graph_passes import (
    Front,
    Granularity,
    Plan,
    SiteMode,
    SiteRule,
    StepMode,
    Weighting,
    optimize,
)
from calicache.graph_passes.api.plan_file import PLAN_FILE
from calicache.graph_passes.common.disk.documents import sum_of
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.settings.choices import member
from calicache.graph_passes.settings.recipe import Recipe
from calicache.graph_passes.settings.schedule import anchor_table, output_table

R, C, U, F = StepMode
COSTS, ERRORS = (0.2, 0.35, 0.5, 0.8), (0.3, 0.1, 0.02, 0.001)
RULES = (
    SiteRule("blocks.0.attn", SiteMode.REUSE),
    SiteRule("blocks.0.mlp", SiteMode.CALIBRATE, granularity=Granularity.BRANCH),
    SiteRule("blocks.1.mlp", SiteMode.FULL),
)
RANKS = {"blocks.0.mlp": 8, "blocks.1.attn.q+k+v": 16, "blocks.1.attn.proj": 0}
OF_A_POINT = ("schedule", "order", "rules", "ranks", "output_weights")


@pytest.fixture(scope="module")
def front() -> Front:
    """Four points; rules and ranks at those that calibrate."""
    base = front_of(COSTS, ERRORS, choice=2)
    points = [
        replace(point, rules=RULES, ranks=RANKS) if C in point.schedule else point
        for point in base.points
    ]
    assert [C in point.schedule for point in points] == [True, False, True, False]
    return replace(base, points=tuple(points))


@pytest.fixture(scope="module")
def searched(dit: FashionDiT, dit_recording: Any, front: Front) -> Plan:
    """A plan as a search makes one: statistics of what its points calibrate."""
    plan = Plan.from_trajectory(
        dit, dit_recording, schedule=(R, C, R, C, R, C), rank=8, rules=RULES, correct=False
    )
    return replace(plan, front=front).take(2)


def reloaded(plan: Plan) -> Plan:
    with tempfile.TemporaryDirectory() as folder:
        plan.save(Path(folder) / "plan")
        return Plan.load(Path(folder) / "plan")


def refuses(message: str) -> pytest.RaisesExc[PlanError]:
    return pytest.raises(PlanError, match=f"^{re.escape(message)}$")


# --- ranks by target ----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(ranks=st.dictionaries(st.text(max_size=20), st.integers(0, 2**40), max_size=6))
def test_any_ranks_survive_saving(dit_plan: Plan, ranks: dict[str, int]) -> None:
    kept = replace(dit_plan.recipe, ranks=ranks)
    loaded = reloaded(Plan(dit_plan.binding, kept, {})).recipe
    assert loaded == kept
    assert list(loaded.ranks) == list(ranks)
    assert all(type(rank) is int for rank in loaded.ranks.values())


def test_plans_without_a_search_name_no_ranks(dit_plan: Plan, tmp_path: Path) -> None:
    assert dit_plan.recipe.ranks == {}
    dit_plan.save(tmp_path / "plan")
    path = tmp_path / "plan" / PLAN_FILE
    written = json.loads(path.read_text())
    assert written["recipe"].pop("ranks") == {}
    written["sha256"] = sum_of(written)
    path.write_text(json.dumps(written))  # as one that was written before there were any
    assert Plan.load(tmp_path / "plan").recipe == dit_plan.recipe


@pytest.mark.slow
def test_ranks_reach_the_targets(dit: FashionDiT, searched: Plan) -> None:
    targets = optimize(dit, searched).compiled.targets
    assert {target.name: target.rank for target in targets} == {"blocks.0.attn": 0, **RANKS}


def test_rank_of_no_target_is_refused_when_the_plan_is_used(
    dit: FashionDiT, searched: Plan
) -> None:
    wrong = replace(searched.recipe, ranks={"blocks.1.mlp.fc1": 8})  # left alone by a rule
    with pytest.raises(PlanError, match=r"^plan: rank of blocks\.1\.mlp\.fc1: expected a calib"):
        optimize(dit, replace(searched, recipe=wrong))


def test_changed_plans_lose_their_front_and_with_another_rank_their_ranks(searched: Plan) -> None:
    for changed, ranks in ((searched.with_schedule((R, C)), RANKS), (searched.with_rank(4), {})):
        assert changed.front is None
        assert changed.recipe.ranks == ranks
        assert (changed.recipe.output_weights, changed.recipe.latent) == (None, None)
        assert changed.recipe.correction == "not fitted: the plan was changed"
    assert searched.front is not None


# --- the front ----------------------------------------------------------------------------------


def test_front_survives_saving(searched: Plan) -> None:
    loaded = reloaded(searched)
    assert loaded.front == searched.front
    assert (loaded.binding, loaded.recipe) == (searched.binding, searched.recipe)
    assert loaded.front is not None
    for point in loaded.front.points:
        assert all(type(mode) is StepMode for mode in point.schedule)
        assert all(type(rule.mode) is SiteMode for rule in point.rules)
    assert loaded.front.points[0].rules[1].granularity is Granularity.BRANCH


def test_front_without_held_out_samples_survives_saving(searched: Plan) -> None:
    assert searched.front is not None
    without = replace(searched, front=replace(searched.front, held_out=None))
    assert reloaded(without).front == without.front
    assert reloaded(replace(searched, front=None)).front is None


@pytest.mark.parametrize("place", range(4))
def test_every_point_can_be_taken_before_and_after_saving(searched: Plan, place: int) -> None:
    assert searched.front is not None
    plan, point = searched.take(place), searched.front.points[place]
    for name in OF_A_POINT:
        assert getattr(plan.recipe, name) == getattr(point, name), name
    for name in {f.name for f in fields(plan.recipe)} - {*OF_A_POINT}:
        assert getattr(plan.recipe, name) == getattr(searched.recipe, name), name
    assert plan.recipe.latent == searched.front.latent == "hidden_states"
    assert plan.binding is searched.binding
    assert plan.statistics is searched.statistics
    assert plan.front == replace(searched.front, choice=place)
    assert searched.front.choice == 2
    assert reloaded(searched).take(place).recipe == plan.recipe
    # And back again: a point holds all that the plan needs.
    assert plan.take(2).recipe == searched.recipe


@pytest.mark.parametrize("place", range(4))
def test_every_point_runs(dit: FashionDiT, searched: Plan, place: int) -> None:
    plan = searched.take(place)
    fast = optimize(dit, plan)
    plain = output_table(plan.schedule, plan.recipe.order)
    assert fast.plan.recipe.output_weights == tuple((*row, 0.0) for row in plain)
    exact = sample_dit(dit)
    off = float((sample_dit(fast) - exact).norm() / exact.norm())
    # All weights are random: what counts is that every mode of the point runs, and counts.
    assert 0 < off < 0.5


@pytest.mark.parametrize("place", [-1, 4, 99])
def test_point_that_is_not_there_is_refused(searched: Plan, place: int) -> None:
    order = "by rising cost: 0.200 of the full run with error 0.31, to 0.800 with 0.001"
    said = f"plan: point {place}: expected 0 .. 3, {order}, got {place}. Choose one of these."
    with refuses(said):
        searched.take(place)


@pytest.mark.parametrize("place", [0, 3])
def test_plan_without_a_front_has_no_points(dit_plan: Plan, place: int) -> None:
    with refuses(
        f"plan: point {place}: expected a plan that a search made, with its front, got a plan "
        "without a front. Search for one: Plan.search, or calicache search."
    ):
        dit_plan.take(place)


def change_point(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda written: written["front"]["points"][1].update(changes)


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown mode": (change_point(schedule=[0, 7]), "schedule"),
    "unknown rule": (change_point(rules=[{"pattern": "*", "mode": "skip"}]), "rules"),
    "rank that is no number": (change_point(ranks={"blocks.0.mlp": "many"}), "ranks"),
    "half an error": (change_point(error={"mean": 0.1}), "deviation"),
    "no latent": (lambda written: written["front"].pop("latent"), "latent"),
    "a choice of nothing": (lambda written: written["front"].update(choice=99), "choice is none"),
    "no points": (lambda written: written["front"].pop("points"), "points"),
    "ranks that are no numbers": (lambda w: w["recipe"].update(ranks={"a": 0.5}), "ranks"),
    "ranks without names": (lambda w: w["recipe"].update(ranks=[8]), "ranks"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_front_or_ranks_are_refused(searched: Plan, tmp_path: Path, damage: str) -> None:
    spoil, reason = DAMAGES[damage]
    searched.save(tmp_path / "plan")
    path = tmp_path / "plan" / PLAN_FILE
    written = json.loads(path.read_text())
    spoil(written)
    written["sha256"] = sum_of(written)
    path.write_text(json.dumps(written))
    start = f"plan: {tmp_path / 'plan'}: expected a folder written by Plan.save, got "
    with pytest.raises(PlanError, match=f"^{re.escape(start)}") as caught:
        Plan.load(tmp_path / "plan")
    assert reason in str(caught.value)


# --- names of members ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Weighting, Granularity, SiteMode])
def test_members_are_found_by_value(kind: Any) -> None:
    for one in kind:
        assert member(kind, one.value) is one
        assert member(kind, one) is one
    choices = " | ".join(kind)
    name = kind.__name__.lower()
    with refuses(f"plan: {name}: expected {choices}, got 'none of them'. Choose one of these."):
        member(kind, "none of them")


# --- steps that lie anywhere ---------------------------------------------------------------------


SOME = (R, R, C, F, R, U, F, R)


def recipe_of(schedule: tuple[StepMode, ...], order: int = 1, **fitted: Any) -> Recipe:
    return Recipe(schedule, rank=0, order=order, weighting=Weighting.COVARIANCE, **fitted)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_recorded_steps_have_the_modes_and_weights_of_the_schedule(order: int) -> None:
    fitted = tuple(tuple(0.5 + step + k for k in range(order + 3)) for step in range(len(SOME)))
    for more in ({}, {"output_weights": fitted, "latent": "x"}):
        recipe = recipe_of(SOME, order, **more)
        anchors, kept, outputs = anchor_table(SOME, order), (), ()
        for step, mode in enumerate(SOME):
            newest = kept[0] if kept else 0.0
            if step:
                assert recipe.mode_at(step - 1, step, newest) is mode
            weights = recipe.weights_at(mode, float(step), kept, outputs)
            assert weights == (anchors[step], recipe.outputs[step])
            kept = (float(step), *kept) if mode is R else kept
            outputs = (float(step), *outputs) if mode in (R, C) else outputs


@pytest.mark.parametrize(
    ("before", "place", "refresh", "mode"),
    [
        (1.0, 1.5, 1.0, C),  # the next recorded step is CALIBRATE
        (1.5, 2.5, 1.0, F),
        (2.5, 3.4, 1.0, F),
        (2.5, 3.6, 1.0, R),  # 2.6 from its REFRESH, the next step 3.7: 3 is planned there
        (3.4, 4.4, 2.5, U),  # where the REFRESH was late, the next is late, too
        (4.4, 4.9, 4.4, U),
        (0.0, 0.5, 0.0, R),  # two REFRESH steps one after another
        (-1.0, -0.5, -1.0, R),  # before the first
        (2.0, 9.0, 1.0, R),  # after the last
    ],
)
def test_other_steps_have_the_mode_of_those_beside(
    before: float, place: float, refresh: float, mode: StepMode
) -> None:
    assert recipe_of(SOME).mode_at(before, place, refresh) is mode


@pytest.mark.parametrize("pace", [0.1, 0.4, 1.3, 2.5, 2.9, 5.0])
def test_refreshes_are_as_far_apart_as_in_the_schedule_on_any_grid(pace: float) -> None:
    recipe = recipe_of((R, C, C, C, R, C, C, C, R, C, C, C))
    place, refreshes = 0.0, [0.0]
    while place < 12:
        place += pace
        if recipe.mode_at(place - pace, place, refreshes[-1]) is R:
            refreshes.append(place)
    distances = [b - a for a, b in pairwise(refreshes)]
    # The multiple of the pace that is nearest to 4; rounding of sums.
    assert distances == pytest.approx([max(round(4 / pace), 1) * pace] * len(distances), abs=1e-9)


def test_elsewhere_weights_are_those_of_lagrange() -> None:
    fitted = tuple((0.5 + step, 0.25, 0.125, -1.0) for step in range(len(SOME)))
    recipe = recipe_of(SOME, output_weights=fitted, latent="x")
    # A line through places 1 and 0.5, at 2.5: 4 and -3.
    line = (4.0, -3.0)
    assert recipe.weights_at(F, 2.5, (1.5,), (1.0, 0.5, 0.0)) == ((1.0, 0.0), (0.0, *line, 0.0))
    assert recipe.weights_at(C, 2.5, (1.0, 0.5), (1.5,)) == (line, (1.0, 0.0, 0.0, 0.0))
    assert recipe.weights_at(R, 2.5, (1.0, 0.5), (1.0,)) == ((1.0, 0.0), (1.0, 0.0, 0.0, 0.0))
    # A recorded step, but other refreshes or outputs before it than it was fitted to.
    assert recipe.weights_at(F, 3.0, (1.0,), (2.0, 1.0)) == ((1.0, 0.0), (0.0, 2.0, -1.0, 0.0))
    assert recipe.weights_at(F, 3.0, (1.0, 0.0), (2.0,)) == ((3.0, -2.0), (0.0, 1.0, 0.0, 0.0))
    assert recipe.weights_at(F, 3.0, (1.0, 0.0), (2.0, 1.0)) == ((3.0, -2.0), fitted[3])
    # A run that began later has not the errors that the weights mend.
    assert recipe.weights_at(F, 3.0, (1.0, 0.0), (2.0, 1.0), 1.0)[1] == (0.0, 2.0, -1.0, 0.0)
    assert recipe_of((R, C, C)).weights_at(C, 1.5, (0.0,), (0.0,)) == ((1.0, 0.0), None)
