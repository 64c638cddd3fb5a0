"""The settings of a plan: the part that is written as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.signature import CallSignature
from calicache.graph_passes.recording.timestep import Timestep
from calicache.graph_passes.settings.choices import Granularity, SiteRule, StepMode, Weighting
from calicache.graph_passes.settings.schedule import Table, anchor_table, output_table


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """The part of a plan that is written as JSON.

    Attributes:
        schedule: mode of every step; the first is REFRESH.
        rank: r of every calibration branch that no rule gives another.
        order: of the anchors; order + 1 refreshes are kept.
        weighting: what the factors of linear layers are made from.
        granularity: where calibration branches sit.
        rules: exceptions for some sites and branches.
        include, exclude: shell patterns over site names.
        signature: form of the model's calls.
        dependence: class of every tensor argument.
        timestep: the argument that shows the start of a new run, or None.
        weights_hash: of the checkpoint that the plan was made from.
        output_weights: of a step's own output, the kept ones and the latent, by step
            (T, order + 3), or None: every output as it is.
        latent: the input that the latent's weights are for; None where they are not fitted.
        correction: how the output weights were made, or why there are none.
        reads: what the model reads off its tensors in every call, from `find_reads`.
        fixed: the tensor arguments that decide these reads, and the digests of their recorded
            values; no others can be passed.
        ranks: r of some calibration targets, by name, in the place of `rank` and of rules.
    """

    schedule: tuple[StepMode, ...]
    rank: int
    order: int
    weighting: Weighting
    granularity: Granularity
    rules: tuple[SiteRule, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    signature: CallSignature
    dependence: dict[str, Dependence]
    timestep: Timestep | None
    weights_hash: str
    output_weights: Table | None = None
    latent: str | None = None
    correction: str = "not asked for"
    reads: str = "[]"
    fixed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_schedule(self.schedule)
        if self.rank < 0:
            raise PlanError("rank", expected="0 or more", got=str(self.rank), fix="Raise the rank.")
        anchor_table(self.schedule, self.order)  # refuses an unknown order
        _check_output_weights(self)

    @property
    def outputs(self) -> Table | None:
        """Output weights by step; None where every output is the step's own."""
        if self.output_weights is None and StepMode.FORECAST in self.schedule:
            return output_table(self.schedule, self.order)
        return self.output_weights


def _check_schedule(schedule: Sequence[StepMode]) -> None:
    if not schedule or schedule[0] is not StepMode.REFRESH:
        raise PlanError(
            "schedule",
            expected="a first step that is REFRESH",
            got=StepMode(schedule[0]).name if schedule else "no steps",
            fix="Start with StepMode.REFRESH: the caches are empty before it.",
        )


def _check_output_weights(settings: PlanSettings) -> None:
    table = settings.output_weights
    if (table is None) != (settings.latent is None):
        raise PlanError(
            "latent",
            expected="a name beside output weights, and none without",
            got=str(settings.latent),
            fix="Make the plan again from the recording.",
        )
    if table is None:
        return
    width = settings.order + 3
    fits = len(table) == len(settings.schedule) and all(len(row) == width for row in table)
    if not fits or not all(math.isfinite(value) for row in table for value in row):
        raise PlanError(
            "output_weights",
            expected=f"{len(settings.schedule)} rows of {width} finite numbers",
            got=f"{len(table)} rows of {sorted({len(row) for row in table})}",
            fix="Make the plan again from the recording.",
        )
