"""Which step does what: a local search over schedules on the rehearsed error."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from calicache.graph_passes.search.rehearse import Rehearsal
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.schedule import spread_schedule

Schedule = tuple[StepMode, ...]
Cost = Callable[[Sequence[StepMode]], float]

POWERS = (0.8, 0.9, 1.0, 1.1)
LEAST_GAIN, MOST_ROUNDS = 5e-3, 60
NEAR = 4
BATCH = 512


def improve(
    rehearsal: Rehearsal,
    start: Schedule,
    order: int,
    modes: Collection[StepMode],
    cost: Cost,
    budget: float,
) -> tuple[Schedule, float]:
    """Move to the best neighbour that the budget allows, as long as the error falls.

    Neighbours exchange the modes of two steps near each other, or give one step another mode;
    where none of these helps, two steps anywhere exchange.

    Args:
        rehearsal: gives the errors.
        start: within the budget.
        order: of the anchors.
        modes: that a step may have.
        cost: of a schedule.
        budget: the most it may cost.

    Returns:
        The schedule and its rehearsed error.
    """
    best, error = start, rehearsal.errors([start], order)[0]
    for _ in range(MOST_ROUNDS):
        found = None
        for moves in (_near_moves, _far_moves):
            there = [s for s in dict.fromkeys(moves(best, modes)) if cost(s) <= budget]
            found = _least(rehearsal, there, order)
            if found and found[1] < error * (1 - LEAST_GAIN):
                break
        if not found or found[1] >= error * (1 - LEAST_GAIN):
            break
        best, error = found
    return best, error


def starts(
    steps: int, modes: Collection[StepMode], cost: Cost, budget: float
) -> Iterator[Schedule]:
    """Schedules to start from: spread REFRESH steps, one cheap mode between or two in turn.

    Of every pattern the one with the most REFRESH steps that the budget allows.
    """
    cheap = [mode for mode in modes if mode is not StepMode.REFRESH]
    for first in cheap:
        for second in cheap:
            for power in POWERS:
                for refreshes in range(steps, 0, -1):
                    spread = spread_schedule(steps, refreshes, power, first)
                    schedule = _in_turn(spread, first, second)
                    if cost(schedule) <= budget:
                        yield schedule
                        break


def best_starts(
    rehearsal: Rehearsal,
    order: int,
    modes: Collection[StepMode],
    cost: Cost,
    budget: float,
) -> list[tuple[Schedule, float]]:
    """The starts by rehearsed error, the least first; none where the budget allows none."""
    steps = len(rehearsal.answers)
    there = list(dict.fromkeys(starts(steps, modes, cost, budget)))
    if not there:
        return []
    errors = rehearsal.errors(there, order)
    return sorted(zip(there, errors, strict=True), key=lambda pair: pair[1])


def neighbours(
    rehearsal: Rehearsal,
    schedule: Schedule,
    order: int,
    modes: Collection[StepMode],
    cost: Cost,
    budget: float,
) -> list[tuple[Schedule, float]]:
    """All near moves that the budget allows, by rehearsed error."""
    there = [s for s in dict.fromkeys(_near_moves(schedule, modes)) if cost(s) <= budget]
    errors = _errors(rehearsal, there, order)
    return sorted(zip(there, errors, strict=True), key=lambda pair: pair[1])


def _in_turn(spread: Schedule, first: StepMode, second: StepMode) -> Schedule:
    """`first` on the odd cheap steps after every REFRESH, `second` on the even ones."""
    since, modes = 0, []
    for mode in spread:
        since = 0 if mode is StepMode.REFRESH else since + 1
        modes.append(mode if not since else first if since % 2 else second)
    return tuple(modes)


def _least(
    rehearsal: Rehearsal, schedules: Sequence[Schedule], order: int
) -> tuple[Schedule, float] | None:
    pairs = zip(schedules, _errors(rehearsal, schedules, order), strict=True)
    return min(pairs, key=lambda pair: pair[1], default=None)


def _errors(rehearsal: Rehearsal, schedules: Sequence[Schedule], order: int) -> list[float]:
    errors: list[float] = []
    for start in range(0, len(schedules), BATCH):
        errors += rehearsal.errors(schedules[start : start + BATCH], order)
    return errors


def _near_moves(schedule: Schedule, modes: Collection[StepMode]) -> Iterator[Schedule]:
    for step in range(1, len(schedule)):
        for mode in modes:
            if mode is not schedule[step]:
                yield (*schedule[:step], mode, *schedule[step + 1 :])
        yield from _exchanged(schedule, step, range(step + 1, min(step + 1 + NEAR, len(schedule))))


def _far_moves(schedule: Schedule, modes: Collection[StepMode]) -> Iterator[Schedule]:  # noqa: ARG001
    for step in range(1, len(schedule)):
        yield from _exchanged(schedule, step, range(step + 1 + NEAR, len(schedule)))


def _exchanged(schedule: Schedule, step: int, others: Sequence[int]) -> Iterator[Schedule]:
    for other in others:
        if schedule[other] is not schedule[step]:
            moved = list(schedule)
            moved[step], moved[other] = moved[other], moved[step]
            yield tuple(moved)
