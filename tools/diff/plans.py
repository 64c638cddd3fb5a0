"""What differs between two plans."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from calicache.graph_passes.api.plan import STATISTICS_FILE, Plan
from calicache.graph_passes.settings.schedule import Table
from calicache.tools.diff.difference import (
    Change,
    Difference,
    NumberChange,
    TargetState,
    diff_numbers,
    diff_schedules,
    diff_states,
)
from calicache.tools.diff.words import changed, changed_fields, changed_fronts
from calicache.tools.inspect.plan_facts import PlanFacts, plan_facts
from calicache.tools.terminal.subject import PlanSubject

# Shown in other sections than the settings, or in other words.
_ELSEWHERE = ("schedule", "weights_hash", "ranks", "output_weights")


def diff_plans(a: PlanSubject, b: PlanSubject) -> Difference:
    """What differs between two plans."""
    facts = plan_facts(a), plan_facts(b)
    first, second = a.plan.settings, b.plan.settings
    return Difference(
        kind="plan",
        a=str(a.path),
        b=str(b.path),
        belonging=tuple(_belonging(*facts)),
        schedule=diff_schedules(*(fact.schedule for fact in facts)),
        settings=(
            *changed_fields(first, second, _ELSEWHERE),
            *_output_weights(first.output_weights, second.output_weights),
            *changed_fronts(a.plan.front, b.plan.front),
        ),
        targets=diff_states(*map(_states, facts)),
        layers=(),
        costs=_costs(a.plan, b.plan),
        structure=(),
        operators=(),
    )


def _belonging(a: PlanFacts, b: PlanFacts) -> Iterator[Change]:
    yield from changed("weights", a.weights_hash, b.weights_hash)
    digests = (
        next(file.sha256 for file in facts.files if file.name == STATISTICS_FILE)
        for facts in (a, b)
    )
    yield from changed(STATISTICS_FILE, *digests)


def _states(facts: PlanFacts) -> dict[str, TargetState]:
    return {target.name: TargetState(target.rank, None) for target in facts.targets}


def _output_weights(a: Table | None, b: Table | None) -> Iterator[Change]:
    if a == b:
        return
    if a is None or b is None:
        words = [() if table is None else ("fitted",) for table in (a, b)]
        yield Change("output weights", *words)
    elif [len(row) for row in a] == [len(row) for row in b]:
        pairs = zip(chain.from_iterable(a), chain.from_iterable(b), strict=True)
        most = max(abs(x - y) for x, y in pairs)
        yield Change("output weights", ("fitted",), (f"fitted, up to {most:.3g} from A",))
    else:
        yield Change("output weights", ("fitted",), ("fitted, for other steps or order",))


def _costs(a: Plan, b: Plan) -> tuple[NumberChange, ...]:
    """What the searches counted, where both plans are from one."""
    if a.front is None or b.front is None:
        return ()
    fronts = (a.front, b.front)
    points = [front.points[front.taken] for front in fronts]
    costs = ({f"cost in {f.unit}": p.cost} for f, p in zip(fronts, points, strict=True))
    errors = ({"error of the point": point.error.mean} for point in points)
    return (*diff_numbers("share", *costs), *diff_numbers("error", *errors))
