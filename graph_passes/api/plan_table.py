"""A plan of REFRESH and FORECAST steps as a table, for loops around a model that is left whole.

Such a plan touches nothing inside of a model: a step computes it, or mixes outputs that were kept
and the latent. Whatever runs the model can do that, in any language.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import TypeAdapter

from calicache.graph_passes.recording.binding import Binding
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.recipe import Recipe

TABLE_FILE = "plan-table.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class TableRow:
    """One step: own * (the model's output) + sum_k kept_k * (a kept output) + latent * x.

    Attributes:
        timestep: the recorded one; None where nothing counts the steps.
        compute: whether the model runs. Its output is kept then, after the sum is made.
        own: weight of the step's own output; 0 where the model does not run.
        kept: weights of the outputs of earlier steps that ran, newest first; 0 for one that has
            not been yet.
        latent: weight of the model's input x, for the channels that x has.
    """

    timestep: float | None
    compute: bool
    own: float
    kept: tuple[float, ...]
    latent: float


@dataclass(frozen=True, slots=True)
class PlanTable:
    """What a loop around a model needs to know of a plan.

    Attributes:
        format: version of this record.
        model: hash of the checkpoint that the plan was made for.
        latent: name of the model's input x; None where no step has a weight for it.
        calls_per_step: of the model; each has kept outputs of its own.
        steps: of a run.
    """

    format: int
    model: str
    latent: str | None
    calls_per_step: int
    steps: tuple[TableRow, ...]

    def dumps(self) -> str:
        """The table as JSON."""
        return TypeAdapter(PlanTable).dump_json(self, indent=2).decode() + "\n"


def plan_table(binding: Binding, recipe: Recipe) -> PlanTable | None:
    """The table of a plan; None where some step changes something inside of the model."""
    if not recipe.touches_nothing:
        return None
    count = recipe.order + 1
    plain = (1.0, *(0.0,) * (count + 1))
    rows = recipe.outputs or (plain,) * len(recipe.schedule)
    times = binding.grid.timesteps or (None,) * len(recipe.schedule)
    steps = tuple(
        TableRow(
            timestep=time,
            compute=mode is StepMode.REFRESH,
            own=row[0],
            kept=row[1 : count + 1],
            latent=sum(row[count + 1 :]),  # there where it was fitted
        )
        for time, mode, row in zip(times, recipe.schedule, rows, strict=True)
    )
    return PlanTable(FORMAT, binding.weights_hash, recipe.latent, binding.calls, steps)
