"""The recipes of a plan, and which of them a run is under: its timesteps tell."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.running.model_call import ModelCall
from calicache.graph_passes.api.running.recipes import RecipeForms
from calicache.graph_passes.common.errors import RunError
from calicache.graph_passes.recording.binding import Binding
from calicache.graph_passes.recording.grid import Grid, best_grid, whole_grid
from calicache.graph_passes.recording.signature import FlatCall
from calicache.graph_passes.rewriting.compile import Compiled
from calicache.graph_passes.sampler.run_state import (
    Arrival,
    CallState,
    PastCall,
    RunState,
    next_place,
)


class Recipes:
    """The recipes of a plan with their graphs, and which of them a call is under.

    Args:
        original: the model as it was.
        plan: of one recipe or several.
        graphs: of every recipe; None for a model that is run whole.
        limit: how many other forms of call keep their graphs, for each recipe.
    """

    def __init__(
        self, original: nn.Module, plan: Plan, graphs: Sequence[Compiled | None], limit: int
    ) -> None:
        self.names = plan.names
        self.each = tuple(
            RecipeForms(number, original, one, compiled, limit)
            for number, (one, compiled) in enumerate(zip(plan.plans, graphs, strict=True))
        )

    @property
    def bindings(self) -> tuple[Binding, ...]:
        """Of every recipe."""
        return tuple(recipe.plan.binding for recipe in self.each)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Of every recipe."""
        return tuple(binding.grid for binding in self.bindings)

    @property
    def whole(self) -> bool:
        """Whether the model is run whole under all of them."""
        return all(recipe.whole for recipe in self.each)

    def modules(self) -> nn.ModuleDict:
        """The graphs by name of their mode; by recipe first where there are several."""
        modules = [recipe.modules() for recipe in self.each]
        if len(modules) == 1:
            return modules[0]
        return nn.ModuleDict(dict(zip(self.names, modules, strict=True)))

    def renew(self, plan: Plan) -> None:
        """Make all graphs anew when they are asked for, of the weights as they are now."""
        for recipe, one in zip(self.each, plan.plans, strict=True):
            recipe.renew(one)

    def forget(self) -> None:
        """Drop what can be made again: the weights have gone elsewhere."""
        for recipe in self.each:
            recipe.forget()

    def begin(self, run: RunState, arrival: Arrival, call: FlatCall) -> ModelCall:
        """A call that goes on with nothing.

        Where its timestep is that of several recipes, the first of them counts, and the call is
        kept until another one tells.

        Raises:
            RunError: a form of call that has no graph.
        """
        number, unsure = run.recipe or 0, False
        if run.recipe is None and len(self.each) > 1:
            number, unsure = best_grid(self.grids, [arrival.timestep or 0.0])
        opening = (PastCall.of(arrival.kept(), call),) if unsure else ()
        return self.each[number].begin(run, arrival, call, opening)

    def go_on(
        self, run: RunState, before: CallState, place: float, arrival: Arrival, call: FlatCall
    ) -> ModelCall | None:
        """A call that goes on with another one, under the recipe that its timestep shows.

        Where that is another than the run began with, what the calls before would have left
        under it is computed. None where they do not follow one another there.

        Args:
            run: the denoising that both belong to.
            before: what the other one left.
            place: of the call's step, under the same recipe.
            arrival: what tells it from others.
            call: its arguments.
        """
        opening: tuple[PastCall, ...] = ()
        if before.opening:
            calls = (*before.opening, PastCall.of(arrival.kept(), call))
            timesteps = [past.arrival.timestep or 0.0 for past in calls]
            number, unsure = best_grid(self.grids, timesteps)
            opening = calls if unsure else ()
            if number != before.recipe:
                other = self.each[number].again(before.opening)
                there = next_place(other, arrival, self.grids[number]) if other else None
                if other is None or there is None:
                    return None
                run.keep(before, other)
                before, place = other, there
        return self.each[before.recipe].go_on(run, before, place, arrival, call, opening)

    def number_for(self, timesteps: Sequence[float], *, strict: bool) -> int:
        """Number of the recipe for a run whose timesteps are all known.

        Args:
            timesteps: of the run.
            strict: refuse those that were not recorded.

        Raises:
            RunError: they were not recorded, or are nowhere near those that were.
        """
        number, recorded = whole_grid(self.grids, timesteps)
        spanned = any(grid.spans(value) for grid in self.grids for value in timesteps)
        if not recorded and (strict or not spanned):
            raise self.not_recorded("timesteps", f"{timesteps[0]:g} to {timesteps[-1]:g}")
        return number

    def not_recorded(self, where: str, got: str) -> RunError:
        """The error for timesteps that no recipe was made for."""
        known = (", ".join(f"{value:g}" for value in grid.timesteps) for grid in self.grids)
        return RunError(
            where,
            expected=f"the recorded ones, one after another: {'; or '.join(known)}",
            got=got,
            fix="Record and plan with this sampler, or optimise without strict=True; timesteps "
            "are told as the model gets them.",
        )
