"""A difference of two plans or artifacts as text for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from calicache.graph_passes.settings.choices import BranchKind
from calicache.tools.diff.difference import (
    Change,
    Difference,
    LayerChange,
    NumberChange,
    ScheduleDifference,
    TargetChange,
    TargetState,
)
from calicache.tools.inspect.layers import fold_layers
from calicache.tools.terminal.text import (
    STEPS_A_LINE,
    fact_grid,
    format_count,
    plain_table,
    schedule_strip,
    some_of,
    title,
)

_DIGEST = re.compile(r"[0-9a-f]{64}")  # a SHA-256, of which a few letters will do
_MOST_VALUES = 6


def describe_difference(difference: Difference) -> RenderableType:
    """Everything `calicache diff` prints, top to bottom."""
    kind = f"calicache {difference.kind}s"
    head = "are equal" if difference.equal else "differ"
    parts: list[RenderableType] = [
        Text(f"{kind} {head}", style="bold"),
        fact_grid([("A", difference.a), ("B", difference.b)]),
    ]
    for name, changes in (("Belongs to", difference.belonging), ("Settings", difference.settings)):
        parts += [title(name), _change_table(changes)] if changes else []
    if difference.schedule.steps:
        parts += _schedules(difference.schedule)
    if difference.targets:
        parts += [title("Calibration targets"), _target_table(difference.targets)]
    if difference.layers:
        parts += [title("Linear layers"), _layer_table(difference.layers)]
    if difference.costs:
        parts += [title("Costs"), _number_table(difference.costs)]
    if difference.structure:
        parts += [title("Structure"), _change_table(difference.structure)]
    return Group(*parts)


def _change_table(changes: Sequence[Change]) -> Table:
    rows = ((change.name, _short(change.a), _short(change.b)) for change in changes)
    return plain_table(["", "A", "B"], rows=rows)


def _short(values: Sequence[str]) -> str:
    """The first values, one a line; of a digest its start."""
    shown = [value[:16] if _DIGEST.fullmatch(value) else value for value in values]
    return some_of(shown, _MOST_VALUES) or "-"


def _schedules(schedule: ScheduleDifference) -> Iterator[RenderableType]:
    steps = max(len(schedule.a.modes), len(schedule.b.modes))
    yield title(f"Schedule: {len(schedule.steps)} of {steps} steps differ")
    *first, legend = schedule_strip(schedule.a.modes)
    *second, _ = schedule_strip(schedule.b.modes)
    marked = {change.step for change in schedule.steps}
    marks = "".join("^" if step in marked else " " for step in range(steps))
    place = 0
    for above, below in zip_longest(first, second):
        for name, line in (("A", above), ("B", below)):
            if line is not None:
                yield Text.assemble(f"{name} ", line)
        yield Text(f"        {marks[place : place + STEPS_A_LINE]}".rstrip())
        place += STEPS_A_LINE
    yield Text.assemble("  ", legend)


def _target_table(targets: Sequence[TargetChange]) -> Table:
    rows = ((change.name, _state(change.a), _state(change.b)) for change in targets)
    return plain_table(["target", "A", "B"], rows=rows)


def _state(state: TargetState | None) -> str:
    if state is None:
        return "-"
    rank = "a target" if state.rank is None else f"rank {state.rank}"
    rank = rank if state.branch is BranchKind.LOW_RANK else state.branch
    return rank if state.energy is None else f"{rank}, energy {state.energy:.3f}"


def _layer_table(layers: Sequence[LayerChange]) -> Table:
    rows = [(change.name, (change.mode.name, change.a, change.b)) for change in layers]
    folded = ((names, *work) for names, work in fold_layers(rows))
    return plain_table(["layer", "mode", "A", "B"], rows=folded)


def _number_table(changes: Sequence[NumberChange]) -> Table:
    rows = (
        (
            change.name,
            _number(change.a, change.unit),
            _number(change.b, change.unit),
            f"{change.b / change.a:.3f}" if change.a and change.b is not None else "-",
        )
        for change in changes
    )
    return plain_table([""], ["A", "B", "B / A"], rows)


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "share":
        return f"{value:.3f} of plain"
    return f"{value:.3g}" if unit == "error" else format_count(value, "B" * (unit == "bytes"))
