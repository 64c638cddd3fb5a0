"""The modes of a sampler's steps, and the weights that forecast an anchor from kept refreshes."""

from __future__ import annotations

from collections.abc import Sequence

from calicache.graph_passes.common.arguments import number, whole_number
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.settings.choices import StepMode

MAX_ORDER = 2
Row = tuple[float, ...]
Table = tuple[Row, ...]


def uniform_schedule(
    steps: int, interval: int, mode: StepMode | str = StepMode.CALIBRATE
) -> tuple[StepMode, ...]:
    """A REFRESH every `interval` steps and `mode` between: 5, 3 gives R C C R C.

    Raises:
        PlanError: steps or interval are no whole numbers from 1 on, or the mode is unknown.
    """
    steps = whole_number("steps", steps, PlanError, 1)
    interval = whole_number("interval", interval, PlanError, 1)
    between = StepMode.of(mode)
    return tuple(between if k % interval else StepMode.REFRESH for k in range(steps))


def named_schedule(
    schedule: int | Sequence[StepMode | str], steps: int, mode: StepMode | str | None = None
) -> tuple[StepMode, ...]:
    """A schedule as users write it: an interval, modes, or letters such as "RCCRCC".

    Args:
        schedule: steps from one REFRESH to the next, or the mode of every step.
        steps: of a run, for an interval.
        mode: between two REFRESH steps of an interval; CALIBRATE where None.

    Raises:
        PlanError: an unknown mode, an interval below 1, or a mode beside a whole schedule.
    """
    if isinstance(schedule, int) and not isinstance(schedule, bool | StepMode):
        between = StepMode.CALIBRATE if mode is None else StepMode.of(mode)
        return uniform_schedule(steps, schedule, between)
    if mode is not None:
        raise PlanError(
            "mode",
            expected="none beside a schedule of every step",
            got=StepMode.of(mode).name,
            fix="Give an interval as the schedule, or write the mode into it.",
        )
    if not isinstance(schedule, Sequence):
        raise PlanError(
            "schedule",
            expected="an interval such as 3, or the mode of every step",
            got=repr(schedule),
            fix="Give one of these.",
        )
    return tuple(StepMode.of(name) for name in schedule)


def spread_schedule(
    steps: int, refreshes: int, power: float = 1.0, mode: StepMode | str = StepMode.CALIBRATE
) -> tuple[StepMode, ...]:
    """`refreshes` REFRESH steps, the i-th at (i / n)^power of the run, and `mode` between.

    A power of 1 spreads them evenly, below 1 they get denser towards the end.
    9, 3 gives R C C C R C C C R.

    Raises:
        PlanError: there are fewer steps than refreshes, no refresh, power is not positive, or
            the mode is unknown.
    """
    steps = whole_number("steps", steps, PlanError, 1)
    refreshes = whole_number("refreshes", refreshes, PlanError, 1, steps)
    power, between = number("power", power, PlanError), StepMode.of(mode)
    if not power > 0:
        raise PlanError("power", expected="above 0", got=str(power), fix="Raise power.")
    last, gaps = steps - 1, max(1, refreshes - 1)
    marks: list[int] = []
    for place in range(refreshes):
        wished = round(last * (place / gaps) ** power)
        lowest = marks[-1] + 1 if marks else 0
        marks.append(min(max(wished, lowest), steps - refreshes + place))
    return tuple(StepMode.REFRESH if k in marks else between for k in range(steps))


def count_modes(schedule: Sequence[StepMode]) -> str:
    """Steps by mode, such as `12 REFRESH + 23 FORECAST`."""
    counts = [(schedule.count(mode), mode.name) for mode in StepMode]
    return " + ".join(f"{count} {name}" for count, name in counts if count)


def kept_refreshes(schedule: Sequence[StepMode], step: int, count: int) -> tuple[int, ...]:
    """The last `count` REFRESH steps before a step, newest first; fewer early in a run."""
    before = [k for k in range(step) if schedule[k] is StepMode.REFRESH]
    return tuple(reversed(before))[:count]


def kept_outputs(schedule: Sequence[StepMode], step: int, count: int) -> tuple[int, ...]:
    """The last `count` steps before a step that keep their output, newest first; see `StepMode`."""
    before = [k for k in range(step) if schedule[k].keeps_output]
    return tuple(reversed(before))[:count]


def lagrange_weights(places: Sequence[float], target: float) -> Row:
    """Weights w with sum_i w_i p(places_i) = p(target) for all polynomials below len(places).

    Lagrange's formula; the nodes need not be evenly spaced.
    """
    weights = []
    for place in places:
        weight = 1.0
        for other in places:
            if other != place:
                weight *= (target - other) / (place - other)
        weights.append(weight)
    return tuple(weights)


def padded(row: Row, length: int) -> Row:
    """A row with zeros behind it."""
    return row + (0.0,) * (length - len(row))


def anchor_table(schedule: Sequence[StepMode], order: int) -> Table:
    """Weights of the kept refreshes for the anchors of every step, newest first, (T, order + 1).

    Where fewer than order + 1 refreshes have been, the order falls and the rest is 0.
    Rows of REFRESH steps are not used: they name the newest value alone.

    Raises:
        PlanError: the order is not 0, 1 or 2.
    """
    order = whole_number("order", order, PlanError, 0, MAX_ORDER)
    rows = []
    for step, mode in enumerate(schedule):
        kept = kept_refreshes(schedule, step, order + 1)
        weights = (1.0,) if mode is StepMode.REFRESH else lagrange_weights(kept, step)
        rows.append(padded(weights, order + 1))
    return tuple(rows)


def output_table(schedule: Sequence[StepMode], order: int) -> Table:
    """Weights of a step's own output, then of the kept ones, newest first, (T, order + 2).

    The plain choice: a FORECAST step is Lagrange's sum of the kept outputs, every other step its
    own output.
    """
    rows = []
    for step, mode in enumerate(schedule):
        row: Row = (1.0,)
        if mode is StepMode.FORECAST:
            kept = kept_outputs(schedule, step, order + 1)
            row = (0.0, *lagrange_weights(kept, step))
        rows.append(padded(row, order + 2))
    return tuple(rows)
