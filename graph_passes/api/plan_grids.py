"""Plans for several grids of timesteps as one: what they share, and what tells them apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import SupportsFloat

from calicache.graph_passes.common.arguments import numbers, of_kind, whole_number
from calicache.graph_passes.common.disk.bounds import MAX_GRIDS, MAX_STEPS
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.recording.binding import Binding
from calicache.graph_passes.recording.grid import Grid, whole_grid
from calicache.graph_passes.recording.recording import Recording

Recordings = Recording | Mapping[int, Recording]


def recordings_of(recording: Recordings) -> tuple[Recording, ...]:
    """One recording, or those of several numbers of steps.

    Raises:
        PlanError: something else is there, or a recording has another number of steps.
    """
    if not isinstance(recording, Mapping):
        return (of_kind("recording", recording, Recording, PlanError),)
    for steps, one in recording.items():
        where = f"recording of {steps} steps"
        whole_number("steps", steps, PlanError, 1, MAX_STEPS)
        if of_kind(where, one, Recording, PlanError).steps != steps:
            raise PlanError(
                where,
                expected=f"runs of {steps} steps",
                got=f"runs of {one.steps}",
                fix="Give every recording under its own number of steps.",
            )
    check_count(len(recording))
    return tuple(recording.values())


def recordings_for(grids: Sequence[Grid], recording: Recordings) -> tuple[Recording, ...]:
    """A recording for every grid of a plan; one recording alone for a plan of one.

    Raises:
        PlanError: one is missing, or there are others.
    """
    recordings = recordings_of(recording)
    if len(grids) == 1 == len(recordings):
        return recordings
    given, wanted = [one.steps for one in recordings], [grid.steps for grid in grids]
    if sorted(given) != sorted(set(wanted)) or len(wanted) != len(given):
        raise PlanError(
            "recording",
            expected=f"one for each of {', '.join(map(str, wanted))} steps",
            got=f"those of {', '.join(map(str, given))} steps",
            fix="Give them by their numbers of steps: {20: ..., 28: ...}.",
        )
    return tuple(recordings[given.index(steps)] for steps in wanted)


def check_schedule(schedule: object, recipes: int) -> None:
    """Refuse the modes of all steps where there are several numbers of steps.

    Raises:
        PlanError: the schedule is no interval.
    """
    if recipes > 1 and not isinstance(schedule, int):
        raise PlanError(
            "schedule",
            expected=f"an interval, for {recipes} numbers of steps",
            got="the modes of single steps",
            fix="Give an interval such as 3, or make plans apart and put them together: Plan.join.",
        )


def check_count(count: int) -> None:
    """Refuse a plan of no recipe, or of too many.

    Raises:
        PlanError: there are none, or too many.
    """
    whole_number("number of recipes", count, PlanError, 1, MAX_GRIDS)


def check_grids(bindings: Sequence[Binding]) -> None:
    """Refuse plans that cannot be one: of other models or calls, or not told apart by timesteps.

    Raises:
        PlanError: two of them do not go together.
        RunError: the calls of one differ from another's in more than sizes and constants.
    """
    check_count(len(bindings))
    first = bindings[0]
    for number, other in enumerate(bindings[1:], start=1):
        names = [f"{b.grid.steps} steps" for b in (first, other)]
        if first.weights_hash != other.weights_hash:
            raise _apart(names, "the same weights", f"{other.weights_hash[:12]} beside")
        if first.timestep != other.timestep or (
            first.classes_of(other.signature) != other.dependence
        ):
            raise _apart(names, "the same calls in a step, of the same inputs", "others beside")
        if any(_alike(one.grid, other.grid) for one in bindings[:number]):
            raise _apart(names, "timesteps of their own", "the same timesteps twice beside")
    if any(not binding.grid.timesteps for binding in bindings) and len(bindings) > 1:
        raise _apart([f"{first.grid.steps} steps"], "timesteps that were recorded", "none for")


def place_of(grids: Sequence[Grid], wish: int | Iterable[SupportsFloat]) -> int:
    """Which grid is meant.

    Args:
        grids: of a plan.
        wish: the number of steps, or timesteps.

    Raises:
        PlanError: there is no such grid, or several.
    """
    if isinstance(wish, Iterable):
        timesteps = numbers("grid", wish, PlanError)
        number, recorded = whole_grid(grids, timesteps)
        fitting = [number] if recorded else []
        got = f"timesteps {timesteps[0]:g} to {timesteps[-1]:g}"
    else:
        steps = whole_number("grid", wish, PlanError, 1)
        fitting = [number for number, grid in enumerate(grids) if grid.steps == steps]
        got = f"{steps} steps"
    if len(fitting) == 1:
        return fitting[0]
    known = (
        f"{grid.steps} steps ({grid.timesteps[0]:g} to {grid.timesteps[-1]:g})"
        if grid.timesteps
        else f"{grid.steps} steps"
        for grid in grids
    )
    raise PlanError(
        "grid",
        expected=f"one of {', '.join(known)}",
        got=f"{got}, which {'several' if fitting else 'none'} of them has",
        fix="Give the number of steps or the timesteps of one of them.",
    )


def grid_names(grids: Sequence[Grid]) -> tuple[str, ...]:
    """A short name for each: its number of steps, with a count where several have as many."""
    names: list[str] = []
    for number, grid in enumerate(grids):
        before = sum(other.steps == grid.steps for other in grids[:number])
        names.append(f"{grid.steps}-{before + 1}" if before else str(grid.steps))
    return tuple(names)


def _alike(one: Grid, other: Grid) -> bool:
    return one.steps == other.steps and one.holds(other.timesteps)


def _apart(names: Sequence[str], expected: str, got: str) -> PlanError:
    return PlanError(
        "recipes of a plan",
        expected=expected,
        got=f"{got} {' and '.join(names)}",
        fix="Put plans together that were made for one model, from recordings of one pipeline "
        "with other numbers of steps.",
    )
