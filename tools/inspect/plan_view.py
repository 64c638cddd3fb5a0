"""Facts of a plan as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from calicache.tools.inspect.plan_facts import PlanFacts
from calicache.tools.terminal.front import front_lines
from calicache.tools.terminal.text import (
    constants_in_words,
    fact_grid,
    files_in_words,
    format_count,
    plain_table,
    schedule_strip,
    some_of,
    title,
)


def describe_plan(facts: PlanFacts) -> Iterator[RenderableType]:
    """What `calicache inspect` prints of a plan."""
    yield Text("calicache plan", style="bold")
    statistics = [target for target in facts.targets if target.statistics]
    size = format_count(sum(target.bytes for target in statistics), "B")
    rank = f"rank {facts.rank}, order {facts.schedule.order}"
    yield fact_grid(
        [
            ("weights", facts.weights_hash[:16]),
            ("files", files_in_words(facts.files)),
            ("inputs", some_of([str(spec) for spec in facts.inputs])),
            ("arguments", constants_in_words(facts.constants)),
            ("steps told by", facts.timestep.name if facts.timestep else "their number"),
            ("plan", f"{rank}, weighting {facts.weighting}, granularity {facts.granularity}"),
            ("include", ", ".join(facts.include)),
            ("exclude", ", ".join(facts.exclude) or "nothing"),
            ("output weights", facts.correction),
            ("statistics", f"of {len(statistics)} targets, {size}"),
        ]
    )
    yield title(f"Schedule, interval {facts.schedule.interval}")
    yield from schedule_strip(facts.schedule.modes)
    if facts.rules:
        yield title("Rules for CALIBRATE steps, the first that fits counts")
        yield _rule_table(facts)
    if facts.targets:
        yield title("Targets")
        yield _target_table(facts)
    if facts.front is not None:
        yield from front_lines(facts.front)
        yield Text("Schedules and a chart: calicache plan show PLAN", style="dim")
    yield Text(
        "\nA plan alone has no model: sites, MACs and energy kept are told by an artifact.",
        style="dim",
    )


def _rule_table(facts: PlanFacts) -> Table:
    rows = (
        (rule.pattern, rule.mode, _number(rule.rank), rule.granularity or "-")
        for rule in facts.rules
    )
    return plain_table(["pattern", "there"], ["rank", "granularity"], rows)


def _target_table(facts: PlanFacts) -> Table:
    rows = (
        (
            target.name,
            ", ".join(f"{name} {shape}" for name, shape in target.statistics.items()) or "none",
            format_count(target.bytes, "B"),
            _number(target.rank),
        )
        for target in facts.targets
    )
    return plain_table(["target", "statistics"], ["bytes", "rank"], rows)


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)
