"""The recipe of a plan: what is chosen and what was fitted, tied to no checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from calicache.graph_passes.common.bounds import MAX_STEPS, MAX_WEIGHT, Count
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.settings.choices import Granularity, SiteRule, StepMode, Weighting
from calicache.graph_passes.settings.schedule import (
    Table,
    anchor_table,
    kept_refreshes,
    later_schedule,
    output_table,
)

FITTED = "fitted to the recorded runs"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is chosen, and the weights that were fitted to it.

    Attributes:
        schedule: mode of every step; the first is REFRESH.
        rank: r of every calibration branch that no rule gives another.
        order: of the anchors; order + 1 refreshes are kept.
        weighting: what the factors of linear layers are made from.
        granularity: where calibration branches sit.
        rules: exceptions for some sites and branches.
        include, exclude: shell patterns over site names.
        ranks: r of some calibration targets, by name, in the place of `rank` and of rules.
        output_weights: of a step's own output, the kept ones and the latent, by step
            (T, order + 3), or None: every output as it is.
        latent: the input that the latent's weights are for; None where they are not fitted.
        correction: how the output weights were made, or why there are none.
    """

    schedule: tuple[StepMode, ...]
    rank: int
    order: int
    weighting: Weighting
    granularity: Granularity = Granularity.LINEAR
    rules: tuple[SiteRule, ...] = ()
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    ranks: Mapping[str, Count] = field(default_factory=dict)
    output_weights: Table | None = None
    latent: str | None = None
    correction: str = "not asked for"

    def __post_init__(self) -> None:
        _check_schedule(self.schedule)
        if self.rank < 0:
            raise PlanError("rank", expected="0 or more", got=str(self.rank), fix="Raise the rank.")
        anchor_table(self.schedule, self.order)  # refuses an unknown order
        _check_output_weights(self)

    def weights_from(self, start: int) -> tuple[Table, Table | None]:
        """Weights of the anchors and of the outputs in a run that begins at a later step.

        Its first step is a REFRESH. What was fitted counts where the kept refreshes are those
        that it was fitted to; elsewhere Lagrange's formula does, and no weight of the latent.

        Returns:
            Tables for all steps, those before the start included, which are not used.
        """
        later = later_schedule(self.schedule, start)
        anchors = anchor_table(later, self.order)
        if self.outputs is None:
            return anchors, None
        plain, width = output_table(later, self.order), len(self.outputs[0])
        kept = self.order + 1
        rows = [
            fitted
            if kept_refreshes(later, step, kept) == kept_refreshes(self.schedule, step, kept)
            else (*row, *(0.0,) * (width - len(row)))
            for step, (fitted, row) in enumerate(zip(self.outputs, plain, strict=True))
        ]
        return anchors, tuple(rows)

    @property
    def outputs(self) -> Table | None:
        """Output weights by step; None where every output is the step's own."""
        if self.output_weights is None and StepMode.FORECAST in self.schedule:
            return output_table(self.schedule, self.order)
        return self.output_weights

    @property
    def calibrates(self) -> bool:
        """Whether any step is CALIBRATE."""
        return StepMode.CALIBRATE in self.schedule


def _check_schedule(schedule: Sequence[StepMode]) -> None:
    wrong = [mode for mode in schedule if not isinstance(mode, StepMode)]
    if wrong or len(schedule) > MAX_STEPS:
        raise PlanError(
            "schedule",
            expected=f"{MAX_STEPS} step modes at the most",
            got=repr(wrong[0]) if wrong else str(len(schedule)),
            fix="Give members of StepMode.",
        )
    if not schedule or schedule[0] is not StepMode.REFRESH:
        raise PlanError(
            "schedule",
            expected="a first step that is REFRESH",
            got=schedule[0].name if schedule else "no steps",
            fix="Start with StepMode.REFRESH: the caches are empty before it.",
        )


def _check_output_weights(recipe: Recipe) -> None:
    table = recipe.output_weights
    if (table is None) != (recipe.latent is None):
        raise PlanError(
            "latent",
            expected="a name beside output weights, and none without",
            got=str(recipe.latent),
            fix="Make the plan again from the recording.",
        )
    if table is None:
        return
    width = recipe.order + 3
    fits = len(table) == len(recipe.schedule) and all(len(row) == width for row in table)
    large = [value for row in table for value in row if not abs(value) <= MAX_WEIGHT]  # or NaN
    if large or not fits:
        raise PlanError(
            "output_weights",
            expected=f"{len(recipe.schedule)} rows of {width} numbers up to {MAX_WEIGHT:g}",
            got=f"{large[0]:g} in a row"
            if large
            else f"{len(table)} rows of {sorted({len(row) for row in table})}",
            fix="Make the plan again from the recording.",
        )
