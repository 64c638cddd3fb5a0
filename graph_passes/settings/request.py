"""What a plan search is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from calicache.graph_passes.common.arguments import number, of_kind, texts, whole_number
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.latency import LatencyTable

ALL_MODES = frozenset(StepMode)


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """What is asked for; see `Plan.search`.

    Raises:
        PlanError: not exactly one of budget and max_error, a value of another kind, or a number
            that makes no sense.
    """

    budget: float | None
    max_error: float | None
    latency: LatencyTable | None
    effort: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    modes: frozenset[StepMode] = ALL_MODES

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.max_error is None):
            raise PlanError(
                "search",
                expected="either a budget or a max_error",
                got="both" if self.budget is not None else "neither",
                fix="Give one of them.",
            )
        values = {
            "budget": _between("budget", self.budget, 1.0, "a share above 0 and below 1"),
            "max_error": _between("max_error", self.max_error, math.inf, "an error above 0"),
            "effort": whole_number("effort", self.effort, PlanError, 1),
            "include": texts("include", self.include, PlanError),
            "exclude": texts("exclude", self.exclude, PlanError),
        }
        if self.latency is not None:
            of_kind("latency", self.latency, LatencyTable, PlanError)
        for name, value in values.items():
            object.__setattr__(self, name, value)  # frozen fields are set in this way alone

    @property
    def touches_nothing(self) -> bool:
        """Whether no mode that may be used looks inside the model."""
        return not self.modes & {StepMode.CALIBRATE, StepMode.REUSE}

    @property
    def text(self) -> str:
        """In words."""
        if self.budget is not None:
            return f"budget {self.budget:g}"
        return f"max_error {self.max_error:g}"


def search_modes(wish: Iterable[StepMode | str]) -> frozenset[StepMode]:
    """Modes that a search may use, given by themselves or by their names.

    Raises:
        PlanError: there is none of that name, or FORECAST is not among them.
    """
    names = StepMode.__members__
    given = frozenset(
        names.get(mode.upper(), mode) if isinstance(mode, str) else mode
        for mode in ((wish,) if isinstance(wish, str) else wish)
    )
    if not all(isinstance(mode, StepMode) for mode in given) or StepMode.FORECAST not in given:
        raise PlanError(
            "modes",
            expected=f"FORECAST, and what else of {' | '.join(names)} may be used",
            got=", ".join(sorted(str(getattr(mode, "name", mode)) for mode in given)) or "none",
            fix="Give modes=('FORECAST',), or more of them.",
        )
    return frozenset(mode for mode in given if isinstance(mode, StepMode)) | {StepMode.REFRESH}


def _between(name: str, value: float | None, below: float, expected: str) -> float | None:
    if value is None:
        return None
    wish = number(name, value, PlanError)
    if not 0 < wish < below:
        raise PlanError(name, expected=expected, got=f"{wish:g}", fix="Choose such a number.")
    return wish
