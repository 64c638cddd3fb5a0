"""The recipe of a plan: what is chosen and what was fitted, tied to no checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil, floor

from calicache.graph_passes.common.disk.bounds import MAX_STEPS, MAX_WEIGHT, Count
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.settings.choices import (
    BranchKind,
    Granularity,
    SiteRule,
    StepMode,
    Weighting,
    check_branch,
)
from calicache.graph_passes.settings.schedule import (
    Row,
    Table,
    anchor_table,
    kept_outputs,
    kept_refreshes,
    lagrange_weights,
    output_table,
    padded,
)

FITTED, NOT_FITTED = "fitted to the recorded runs", "not asked for"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is chosen, and the weights that were fitted to it.

    Attributes:
        schedule: mode of every step; the first is REFRESH.
        rank: r of every calibration branch that no rule gives another.
        order: of the anchors; order + 1 refreshes are kept.
        weighting: what the factors of linear layers are made from.
        granularity: where calibration branches sit.
        branch: kind of every calibration branch that no rule gives another.
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
    branch: BranchKind = BranchKind.LOW_RANK
    rules: tuple[SiteRule, ...] = ()
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    ranks: Mapping[str, Count] = field(default_factory=dict)
    output_weights: Table | None = None
    latent: str | None = None
    correction: str = NOT_FITTED

    def __post_init__(self) -> None:
        _check_schedule(self.schedule)
        if self.rank < 0:
            raise PlanError("rank", expected="0 or more", got=str(self.rank), fix="Raise the rank.")
        check_branch(self.branch, self.granularity)
        anchor_table(self.schedule, self.order)  # refuses an unknown order
        _check_output_weights(self)

    def mode_at(self, before: float, place: float, refresh: float) -> StepMode:
        """Mode of a step that lies anywhere among the recorded ones.

        On recorded steps one after another this is the schedule. Elsewhere REFRESH steps are as
        far apart as they are there in the schedule, as nearly as the steps allow, and other steps
        have the mode of the recorded one next to them.

        Args:
            before: place of the step before; whole numbers are recorded steps.
            place: of the step.
            refresh: place of the newest REFRESH.
        """
        schedule, last = self.schedule, len(self.schedule) - 1
        if place == before + 1 and place == int(place) and 0 <= place <= last:
            return schedule[int(place)]
        marks = [k for k, mode in enumerate(schedule) if mode is StepMode.REFRESH]
        earlier = max((mark for mark in marks if mark <= refresh), default=0)
        later = min((mark for mark in marks if mark > earlier), default=len(schedule))
        if place - refresh + (place - before) / 2 > later - earlier:
            return StepMode.REFRESH
        beside = (schedule[min(max(step, 0), last)] for step in (ceil(place), floor(place)))
        return next((mode for mode in beside if mode is not StepMode.REFRESH), StepMode.REFRESH)

    def weights_at(
        self,
        mode: StepMode,
        place: float,
        refreshes: Sequence[float],
        outputs: Sequence[float],
        start: float = 0,
    ) -> tuple[Row, Row | None]:
        """Weights of the anchors and of the outputs at a step that lies anywhere.

        What was fitted counts where the run began with the first step, and the step and what is
        kept are those that it was fitted to: it also mends what the steps before left, which
        a run that began later has not. Elsewhere Lagrange's formula does, and no weight of the
        latent.

        Args:
            mode: of the step.
            place: of the step.
            refreshes: places of the kept refreshes, newest first.
            outputs: places of the kept outputs, newest first.
            start: place of the step that the run began with.
        """
        count = self.order + 1
        kept = tuple(refreshes[:count]), tuple(outputs[:count])
        anchors = (1.0,) if mode is StepMode.REFRESH else lagrange_weights(kept[0], place)
        own = (0.0, *lagrange_weights(kept[1], place)) if mode is StepMode.FORECAST else (1.0,)
        anchors, own = padded(anchors, count), padded(own, count + 1)
        fitted = self.output_weights
        if fitted is None:
            return anchors, own if StepMode.FORECAST in self.schedule else None
        step = int(place)
        recorded = 0 <= place < len(fitted) and place == step and mode is self.schedule[step]
        if not start and recorded and kept == self._kept_at(step):
            return anchors, fitted[step]
        return anchors, (*own, 0.0)

    def _kept_at(self, step: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Steps of the refreshes and of the outputs that are kept at a step."""
        count = self.order + 1
        refreshes = kept_refreshes(self.schedule, step, count)
        return refreshes, kept_outputs(self.schedule, step, count)

    @property
    def interval(self) -> int:
        """Longest distance from one REFRESH to the next (or to the end)."""
        marks = [k for k, mode in enumerate(self.schedule) if mode is StepMode.REFRESH]
        return max(b - a for a, b in pairwise([*marks, len(self.schedule)]))

    @property
    def outputs(self) -> Table | None:
        """Output weights by step; None where every output is the step's own."""
        if self.output_weights is None and StepMode.FORECAST in self.schedule:
            return output_table(self.schedule, self.order)
        return self.output_weights

    @property
    def branch_words(self) -> str:
        """The calibration branches that no rule says otherwise of, in words."""
        words = branch_words(self.branch, self.rank, self.order, self.weighting)
        if self.branch is BranchKind.INT8:
            return words
        return f"{words}, granularity {self.granularity}"

    @property
    def touches_nothing(self) -> bool:
        """Whether the model is run whole or not at all: no step changes anything inside of it."""
        return {StepMode.REFRESH, StepMode.FORECAST}.issuperset(self.schedule)

    @property
    def calibrates(self) -> bool:
        """Whether any step is CALIBRATE."""
        return StepMode.CALIBRATE in self.schedule


def branch_words(branch: BranchKind, rank: int, order: int, weighting: Weighting) -> str:
    """Words for calibration branches: `rank 32, order 2, weighting none`, or `int8, order 2`.

    Args:
        branch: their kind.
        rank: of low-rank ones.
        order: of the anchors.
        weighting: of low-rank ones.
    """
    if branch is BranchKind.INT8:
        return f"{branch}, order {order}"
    return f"rank {rank}, order {order}, weighting {weighting}"


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
