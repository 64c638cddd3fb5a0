"""What is said of a plan, and the warnings."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.search.fronts import front_of
from support.small.subjects import codes, printed, small_folder, small_model, small_runs, texts

from calicache.graph_passes import Dependence, Plan, StepMode
from calicache.graph_passes.settings.front import ErrorSummary
from calicache.tools.inspect.command import inspect_subject
from calicache.tools.inspect.plan import PlanFacts, plan_facts
from calicache.tools.terminal.text import json_text

R, C, U, F = StepMode


def test_plan_facts_are_those_of_the_plan(home: Path, plan: Plan) -> None:
    facts = inspect_subject(home / "plan")
    assert isinstance(facts, PlanFacts)
    assert (facts.binding, facts.recipe) == (plan.binding, plan.recipe)
    written = json.loads((home / "plan" / "plan.json").read_text())
    assert facts.files[1].sha256 == written["files"]["statistics.safetensors"]
    assert (facts.schedule.strip, facts.schedule.interval) == ("RCRURF", 2)
    assert [spec.dependence for spec in facts.inputs] == [Dependence.LATENT, Dependence.STEP]
    assert [target.name for target in facts.targets] == sorted(plan.statistics)
    sizes = {target.name: target.bytes for target in facts.targets}
    assert sizes == dict.fromkeys(["blocks.1.fc2", "blocks.2.fc1", "blocks.2.fc2"], 4 * 8 * 8)
    assert not facts.warnings


def facts_of_plan(home: Path, plan: Plan, **changes: object) -> PlanFacts:
    recipe = replace(plan.recipe, **changes)  # type: ignore[arg-type]
    return plan_facts(home / "plan", replace(plan, recipe=recipe))


def test_plan_with_ranks_of_its_own_shows_them(home: Path, plan: Plan) -> None:
    facts = facts_of_plan(home, plan, ranks={"blocks.2.fc1": 2, "blocks.9.fc1": 0})
    ranks = {target.name: target.rank for target in facts.targets}
    assert (ranks["blocks.2.fc1"], ranks["blocks.2.fc2"], ranks["blocks.9.fc1"]) == (2, None, 0)
    assert not facts.warnings  # rank 0 needs no statistics
    assert re.search(r"blocks\.9\.fc1 +none +0 B +0$", printed(facts), re.MULTILINE)


def test_plan_without_statistics_of_a_target_is_warned_of(home: Path, plan: Plan) -> None:
    facts = facts_of_plan(home, plan, ranks={"blocks.9.fc1": 2})
    assert texts(facts) == {
        "statistics-missing": "No statistics for blocks.9.fc1: the schedule has CALIBRATE steps, "
        "and weighting covariance needs them."
    }
    none = plan_facts(home / "plan", replace(plan, statistics={}))
    assert texts(none)["statistics-missing"].startswith("No statistics for any target: ")


def test_plan_that_needs_no_statistics_is_not_warned_of(home: Path, plan: Plan) -> None:
    schedule = (R, U, R, U, R, F)
    recipe = replace(plan.recipe, schedule=schedule)
    facts = plan_facts(home / "plan", replace(plan, recipe=recipe, statistics={}))
    assert not facts.warnings


def test_plan_whose_order_is_never_reached_is_warned_of(home: Path, plan: Plan) -> None:
    facts = facts_of_plan(home, plan, schedule=(R, C, C, C, C, C))
    assert texts(facts) == {
        "short-history": "Anchors of order 1 need 2 REFRESH steps, the schedule has 1: the order "
        "is never reached."
    }


def test_plan_that_saves_nothing_is_warned_of(home: Path, plan: Plan) -> None:
    facts = facts_of_plan(home, plan, schedule=(R,) * 6)
    assert texts(facts) == {"no-saving": "Every step is REFRESH: nothing is saved."}


def test_output_weights_that_could_not_be_fitted_are_warned_of_with_the_reason(
    home: Path, plan: Plan
) -> None:
    changed = plan.with_rank(2)
    facts = plan_facts(home / "plan", changed)
    assert texts(facts) == {
        "output-weights": "There are no fitted output weights: not fitted: the plan was changed."
    }


@pytest.mark.slow
def test_output_weights_that_nobody_asked_for_are_no_warning() -> None:
    model = small_model()
    plan = Plan.from_trajectory(model, small_runs(model), rank=2, order=0, correct=False)
    assert plan.recipe.correction == "not asked for"
    assert not plan_facts(small_folder() / "plan", plan).warnings


def searched(plan: Plan) -> Plan:
    return replace(plan, front=front_of((0.3, 0.5), (0.1, 0.01), choice=1))


def test_plan_of_a_search_shows_its_front(home: Path, plan: Plan) -> None:
    facts = plan_facts(home / "plan", searched(plan))
    text = printed(facts)
    for part in ("Front of the search that made it", "budget 0.5", "held-out error", "< taken"):
        assert part in text
    assert json.loads(json_text(facts))["front"]["choice"] == 1


def test_held_out_error_above_the_bound_is_warned_of(home: Path, plan: Plan) -> None:
    front = searched(plan).front
    assert front is not None
    bound = front.points[1].error.bound
    far = replace(front, held_out=ErrorSummary.of([2 * bound, 2 * bound]))
    facts = plan_facts(home / "plan", replace(plan, front=far))
    assert texts(facts) == {
        "held-out-error": f"The held-out error {2 * bound:.3g} is above the bound {bound:.3g} of "
        "the point: new samples may be further off."
    }


def test_a_diverged_point_is_warned_of_and_null_in_json(home: Path, plan: Plan) -> None:
    front = searched(plan).front
    assert front is not None
    broken = replace(front.points[1], error=ErrorSummary.of([float("inf")]))
    points = (front.points[0], broken)
    facts = plan_facts(*(home / "plan", replace(plan, front=replace(front, points=points))))
    assert codes(facts) == ["diverged"]
    assert json.loads(json_text(facts))["front"]["points"][1]["error"]["mean"] is None
