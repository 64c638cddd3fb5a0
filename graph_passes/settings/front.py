"""What a plan search came to: the plans that no other beats in both error and cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.settings.choices import SiteRule, StepMode
from calicache.graph_passes.settings.recipe import Recipe
from calicache.graph_passes.settings.schedule import Table, count_modes
from calicache.graph_passes.settings.student import student_quantile

CONFIDENCE = 0.99


@dataclass(frozen=True, slots=True)
class ErrorSummary:
    """Relative L2 error of the final latents against the full run's, over samples.

    Attributes:
        mean: over the samples.
        deviation: standard deviation over the samples.
        worst: the largest.
        samples: how many there are.
        bound: what a new sample stays below with 99 % probability, if the logarithms of the
            errors are normally distributed (Student's t, n - 1 degrees); infinite, and so
            unknown, for one sample.
    """

    mean: float
    deviation: float
    worst: float
    samples: int
    bound: float

    @staticmethod
    def of(errors: Sequence[float]) -> ErrorSummary:
        """Summary of the errors of single samples; all infinite where one run diverged."""
        if not all(map(math.isfinite, errors)):
            return ErrorSummary(math.inf, math.inf, math.inf, len(errors), math.inf)
        logarithms = [math.log(max(error, 1e-12)) for error in errors]
        several = len(errors) > 1
        return ErrorSummary(
            mean=statistics.fmean(errors),
            deviation=statistics.stdev(errors) if several else 0.0,
            worst=max(errors),
            samples=len(errors),
            bound=_bound(logarithms) if several else math.inf,
        )


def _bound(logarithms: Sequence[float]) -> float:
    """What one more sample stays below, from the logarithms of at least two."""
    count = len(logarithms)
    reach = student_quantile(CONFIDENCE, count - 1) * math.sqrt(1 + 1 / count)
    try:
        return math.exp(statistics.fmean(logarithms) + reach * statistics.stdev(logarithms))
    except OverflowError:
        return math.inf


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One plan of the front: what it costs, how far off it is, and what it does.

    Attributes:
        cost: share of the full run, in the front's unit.
        error: on samples that neither the weights nor the statistics were fitted to.
        schedule, order, rules, ranks, output_weights: as in `Recipe`.
    """

    cost: float
    error: ErrorSummary
    schedule: tuple[StepMode, ...]
    order: int
    rules: tuple[SiteRule, ...]
    ranks: Mapping[str, int]
    output_weights: Table

    @property
    def label(self) -> str:
        """Steps by mode, such as `12 REFRESH + 23 FORECAST`."""
        return count_modes(self.schedule)


@dataclass(frozen=True, slots=True)
class Front:
    """All points of a search by rising cost, and which one is the plan's own.

    Attributes:
        unit: of the costs: `MACs`, or the runtime whose seconds were measured.
        request: what was asked for, such as `budget 0.5`.
        latent: the input that the last of every point's output weights is for.
        points: by rising cost and falling error.
        choice: place of the plan's own point.
        held_out: error of the point that the search itself chose, on samples that had no part in
            the search at all.
    """

    unit: str
    request: str
    latent: str
    points: tuple[FrontPoint, ...]
    choice: int
    held_out: ErrorSummary | None = field(default=None)

    def recipe(self, place: int, base: Recipe) -> Recipe:
        """The recipe of a point.

        Args:
            place: of the point, from 0: points stand by rising cost, and so by falling error.
            base: of any point of the search, from which `correction` is taken.

        Raises:
            PlanError: there is no such point.
        """
        first, last = self.points[0], self.points[-1]
        if not 0 <= place < len(self.points):
            raise PlanError(
                f"point {place}",
                expected=f"0 .. {len(self.points) - 1}, by rising cost: {first.cost:.3f} of the "
                f"full run with error {first.error.mean:.2g}, to {last.cost:.3f} with "
                f"{last.error.mean:.2g}",
                got=str(place),
                fix="Choose one of these.",
            )
        point = self.points[place]
        return replace(
            base,
            schedule=point.schedule,
            order=point.order,
            rules=point.rules,
            ranks=dict(point.ranks),
            output_weights=point.output_weights,
            latent=self.latent,
        )


def pareto(points: Sequence[FrontPoint]) -> tuple[FrontPoint, ...]:
    """The points that no other is at least as good as in both cost and error, by rising cost."""
    front: list[FrontPoint] = []
    for point in sorted(points, key=lambda p: (p.cost, p.error.mean)):
        if not front or point.error.mean < front[-1].error.mean:
            front.append(point)
    return tuple(front)
