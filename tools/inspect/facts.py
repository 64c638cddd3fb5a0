"""Facts that plans, artifacts and recordings have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from pydantic import PlainSerializer

from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.settings.choices import STEP_LETTERS, StepMode
from calicache.graph_passes.settings.recipe import NOT_FITTED

# In JSON these two are their names, which stay readable and do not change with a new member.
Mode = Annotated[StepMode, PlainSerializer(lambda mode: mode.name, return_type=str)]
Class = Annotated[Dependence, PlainSerializer(lambda kind: kind.name.lower(), return_type=str)]


@dataclass(frozen=True, slots=True)
class Caution:
    """Something that a user should know before trusting what is shown.

    Attributes:
        code: stable, for scripts, such as `low-energy`.
        text: one sentence.
    """

    code: str
    text: str


@dataclass(frozen=True, slots=True)
class ScheduleFacts:
    """The modes of a run's steps.

    Attributes:
        modes: of every step; `strip` the same as letters, `RCCRUF`.
        interval: longest distance from one REFRESH to the next, or to the end.
        order: of the anchors; `order + 1` refreshes are kept.
    """

    modes: tuple[Mode, ...]
    strip: str
    interval: int
    order: int

    @property
    def spacing(self) -> str:
        """Its intervals in words."""
        gaps = {b - a for a, b in pairwise(_marks(self.modes))}
        if gaps <= {self.interval}:
            return f"interval {self.interval}"
        return f"REFRESH steps at most {self.interval} apart"


@dataclass(frozen=True, slots=True)
class InputFacts:
    """One tensor argument of the model: its form, and how often its values change."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    dependence: Class | None

    @property
    def depends_on(self) -> str:
        """The class in lower case; empty where it is not known."""
        return "" if self.dependence is None else self.dependence.name.lower()

    def __str__(self) -> str:
        kind = f", {self.depends_on}" if self.depends_on else ""
        return f"{self.name} {self.dtype} {self.shape}{kind}"


def input_facts(
    specs: Sequence[TensorSpec], dependence: Mapping[str, Dependence]
) -> tuple[InputFacts, ...]:
    """Facts of the arguments of a call."""
    return tuple(
        InputFacts(spec.name, spec.shape, spec.dtype, dependence.get(spec.name)) for spec in specs
    )


def schedule_facts(schedule: Sequence[StepMode], order: int) -> ScheduleFacts:
    """Facts of a schedule that starts with REFRESH."""
    interval = max(b - a for a, b in pairwise([*_marks(schedule), len(schedule)]))
    strip = "".join(STEP_LETTERS[mode] for mode in schedule)
    return ScheduleFacts(tuple(schedule), strip, interval, order)


def _marks(schedule: Sequence[StepMode]) -> list[int]:
    """The REFRESH steps."""
    return [k for k, mode in enumerate(schedule) if mode is StepMode.REFRESH]


def schedule_cautions(
    schedule: Sequence[StepMode], order: int, correction: str, *, fitted: bool
) -> Iterator[Caution]:
    """What is odd about a schedule and its output weights.

    Args:
        schedule: mode of every step.
        order: of the anchors.
        correction: how the output weights were made, or why there are none.
        fitted: whether there are any.
    """
    refreshes = schedule.count(StepMode.REFRESH)
    if refreshes == len(schedule):
        yield Caution("no-saving", "Every step is REFRESH: nothing is saved.")
    elif refreshes <= order:
        yield Caution(
            "short-history",
            f"Anchors of order {order} need {order + 1} REFRESH steps, the schedule has "
            f"{refreshes}: the order is never reached.",
        )
    if not fitted and not correction.startswith(NOT_FITTED):
        yield Caution("output-weights", f"There are no fitted output weights: {correction}.")
