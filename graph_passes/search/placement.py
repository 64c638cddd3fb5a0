"""Which step does what: a local search over schedules on the rehearsed error."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from calicache.graph_passes.search.rehearse import Rehearsal
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.schedule import spread_schedule

Schedule = tuple[StepMode, ...]
Cost = Callable[[Sequence[StepMode]], float]

POWERS = (0.8, 0.9, 1.0, 1.1)
SPACINGS = (2, 3, 4, 6, 12)  # of every so many computed steps one is REFRESH, the others CALIBRATE
LEAST_GAIN, MOST_ROUNDS = 5e-3, 60
NEAR = 4
BATCH = 512


@dataclass(frozen=True, slots=True)
class Limits:
    """Which schedules may be proposed.

    Attributes:
        modes: that a step may have.
        cost: of a schedule.
        budget: the most it may cost.
    """

    modes: Collection[StepMode]
    cost: Cost
    budget: float

    def allowed(self, schedules: Iterable[Schedule]) -> list[Schedule]:
        """Those within the budget, each once."""
        return [s for s in dict.fromkeys(schedules) if self.cost(s) <= self.budget]


def improve(
    rehearsal: Rehearsal, start: Schedule, order: int, limits: Limits
) -> tuple[Schedule, float]:
    """Move to the best neighbour that the budget allows, as long as the error falls.

    Neighbours exchange the modes of two steps near each other, or give one step another mode;
    where none of these helps, two steps anywhere exchange.

    Args:
        rehearsal: gives the errors.
        start: within the budget.
        order: of the anchors.
        limits: which schedules may be tried.

    Returns:
        The schedule and its rehearsed error.
    """
    best, error = start, rehearsal.errors([start], order)[0]
    for _ in range(MOST_ROUNDS):
        better = _better(rehearsal, best, order, limits, error * (1 - LEAST_GAIN))
        if better is None:
            break
        best, error = better
    return best, error


def starts(steps: int, limits: Limits) -> Iterator[Schedule]:
    """Schedules to start from, of every pattern the one that computes the most steps in budget.

    Spread REFRESH steps with one cheap mode between or two in turn; and spread REFRESH and
    CALIBRATE steps, which keep their outputs, with FORECAST between.
    """
    cheap = [mode for mode in limits.modes if mode is not StepMode.REFRESH]
    patterns = [
        partial(_in_turn, first=first, second=second) for first, second in product(cheap, cheap)
    ]
    if {StepMode.CALIBRATE, StepMode.FORECAST} <= set(cheap):
        patterns += [partial(_calibrated, spacing=spacing) for spacing in SPACINGS]
    for pattern, power in product(patterns, POWERS):
        for computed in range(steps, 0, -1):
            schedule = pattern(spread_schedule(steps, computed, power, StepMode.FORECAST))
            if limits.cost(schedule) <= limits.budget:
                yield schedule
                break


def best_starts(rehearsal: Rehearsal, order: int, limits: Limits) -> list[tuple[Schedule, float]]:
    """The starts by rehearsed error, the least first; none where the budget allows none."""
    schedules = list(dict.fromkeys(starts(len(rehearsal.answers), limits)))
    return _ranked(schedules, rehearsal.errors(schedules, order) if schedules else [])


def neighbours(
    rehearsal: Rehearsal, schedule: Schedule, order: int, limits: Limits
) -> list[tuple[Schedule, float]]:
    """All near moves that the budget allows, by rehearsed error."""
    schedules = limits.allowed(_near_moves(schedule, limits.modes))
    return _ranked(schedules, _errors(rehearsal, schedules, order))


def _better(
    rehearsal: Rehearsal, schedule: Schedule, order: int, limits: Limits, below: float
) -> tuple[Schedule, float] | None:
    """The best near move, or else the best far one, with an error below; None without one."""
    for moves in (_near_moves(schedule, limits.modes), _far_moves(schedule)):
        schedules = limits.allowed(moves)
        pairs = zip(schedules, _errors(rehearsal, schedules, order), strict=True)
        best = min(pairs, key=lambda pair: pair[1], default=None)
        if best is not None and best[1] < below:
            return best
    return None


def _ranked(schedules: Sequence[Schedule], errors: Sequence[float]) -> list[tuple[Schedule, float]]:
    return sorted(zip(schedules, errors, strict=True), key=lambda pair: pair[1])


def _in_turn(spread: Schedule, first: StepMode, second: StepMode) -> Schedule:
    """`first` on the odd cheap steps after every REFRESH, `second` on the even ones."""
    since, modes = 0, []
    for mode in spread:
        since = 0 if mode is StepMode.REFRESH else since + 1
        modes.append(mode if not since else first if since % 2 else second)
    return tuple(modes)


def _calibrated(spread: Schedule, spacing: int) -> Schedule:
    """REFRESH at every so many of the computed steps, CALIBRATE at the others."""
    computed, modes = 0, []
    for mode in spread:
        keeps = mode is StepMode.REFRESH and computed % spacing
        modes.append(StepMode.CALIBRATE if keeps else mode)
        computed += mode is StepMode.REFRESH
    return tuple(modes)


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


def _far_moves(schedule: Schedule) -> Iterator[Schedule]:
    for step in range(1, len(schedule)):
        yield from _exchanged(schedule, step, range(step + 1 + NEAR, len(schedule)))


def _exchanged(schedule: Schedule, step: int, others: Sequence[int]) -> Iterator[Schedule]:
    for other in others:
        if schedule[other] is not schedule[step]:
            modes = list(schedule)
            modes[step], modes[other] = modes[other], modes[step]
            yield tuple(modes)
