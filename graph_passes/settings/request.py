"""What a plan search is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.settings.latency import LatencyTable


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """What is asked for; see `Plan.search`.

    Raises:
        PlanError: not exactly one of budget and max_error, or a number that makes no sense.
    """

    budget: float | None
    max_error: float | None
    latency: LatencyTable | None
    effort: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.max_error is None):
            raise PlanError(
                "search",
                expected="either a budget or a max_error",
                got="both" if self.budget is not None else "neither",
                fix="Give one of them.",
            )
        _check_between("budget", self.budget, 1.0, "a share above 0 and below 1")
        _check_between("max_error", self.max_error, math.inf, "an error above 0")
        if self.effort < 1:
            raise PlanError(
                "effort", expected="1 or more", got=str(self.effort), fix="Raise the effort."
            )

    @property
    def text(self) -> str:
        """In words."""
        if self.budget is not None:
            return f"budget {self.budget:g}"
        return f"max_error {self.max_error:g}"


def _check_between(name: str, value: float | None, below: float, expected: str) -> None:
    if value is not None and not 0 < value < below:
        raise PlanError(name, expected=expected, got=f"{value:g}", fix="Choose such a number.")
