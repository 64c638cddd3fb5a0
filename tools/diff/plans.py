"""What differs between two plans."""

from __future__ import annotations

from collections.abc import Iterator

from calicache.graph_passes.api.plan import STATISTICS_FILE, Plan
from calicache.tools.diff.difference import (
    Change,
    Difference,
    NumberChange,
    TargetState,
    diff_numbers,
    diff_schedules,
    diff_states,
)
from calicache.tools.diff.words import changed, changed_fields, changed_fronts, changed_weights
from calicache.tools.inspect.plan_facts import PlanFacts, plan_facts
from calicache.tools.terminal.subject import PlanSubject

# Shown in other sections than the settings, or in other words.
_ELSEWHERE = ("schedule", "weights_hash", "ranks", "output_weights")


def diff_plans(a: PlanSubject, b: PlanSubject) -> Difference:
    """What differs between two plans."""
    first, second = plan_facts(a), plan_facts(b)
    recipes = a.plan.recipe, b.plan.recipe
    return Difference(
        kind="plan",
        a=str(a.path),
        b=str(b.path),
        belonging=tuple(_belonging(first, second)),
        schedule=diff_schedules(first.schedule, second.schedule),
        settings=(
            *changed_fields(a.plan.binding, b.plan.binding, _ELSEWHERE),
            *changed_fields(*recipes, _ELSEWHERE),
            *changed_weights(*(recipe.output_weights for recipe in recipes)),
            *changed_fronts(a.plan.front, b.plan.front),
        ),
        targets=diff_states(_states(first), _states(second)),
        layers=(),
        costs=_costs(a.plan, b.plan),
        structure=(),
    )


def _belonging(a: PlanFacts, b: PlanFacts) -> Iterator[Change]:
    yield from changed("weights", a.weights_hash, b.weights_hash)
    digests = ({file.name: file.sha256 for file in facts.files} for facts in (a, b))
    yield from changed(STATISTICS_FILE, *(by_name[STATISTICS_FILE] for by_name in digests))


def _states(facts: PlanFacts) -> dict[str, TargetState]:
    return {target.name: TargetState(target.rank, None) for target in facts.targets}


def _costs(a: Plan, b: Plan) -> tuple[NumberChange, ...]:
    """What the searches counted, where both plans are from one."""
    if a.front is None or b.front is None:
        return ()
    fronts = (a.front, b.front)
    points = [front.points[front.taken] for front in fronts]
    costs = ({f"cost in {f.unit}": p.cost} for f, p in zip(fronts, points, strict=True))
    errors = ({"error of the point": point.error.mean} for point in points)
    return (*diff_numbers("share", *costs), *diff_numbers("error", *errors))
