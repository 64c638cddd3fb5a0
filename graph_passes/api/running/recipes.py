"""One recipe of a plan with its graphs: how a call begins under it, and how one goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.running.forms import FormTable, WholeTable
from calicache.graph_passes.api.running.model_call import ModelCall
from calicache.graph_passes.recording.signature import FlatCall
from calicache.graph_passes.rewriting.compile import Compiled
from calicache.graph_passes.sampler.run_state import (
    Arrival,
    CallState,
    PastCall,
    RunState,
    next_place,
    start_place,
)
from calicache.graph_passes.settings.choices import StepMode


class RecipeForms:
    """One recipe of a plan, and its graphs by form of call.

    Args:
        number: of the recipe among those of the plan.
        original: the model as it was.
        plan: of this recipe alone.
        compiled: the graphs for the plan's own form; None for a model that is run whole.
        limit: how many other forms keep their graphs.
    """

    def __init__(
        self, number: int, original: nn.Module, plan: Plan, compiled: Compiled | None, limit: int
    ) -> None:
        self.number, self.plan = number, plan
        self.forms = FormTable(original, plan, compiled, limit)
        self.whole = None if compiled else WholeTable(original, plan, limit)

    def modules(self) -> nn.ModuleDict:
        """The graphs by name of their mode; none for a model that is run whole."""
        variants = {} if self.whole else self.forms.own.variant_set.variants
        return nn.ModuleDict({mode.name: variant.module for mode, variant in variants.items()})

    def renew(self, plan: Plan) -> None:
        """Make all graphs anew when they are asked for, of the weights as they are now."""
        self.plan = plan
        self.forms.renew(plan)

    def forget(self) -> None:
        """Drop what can be made again: the weights have gone elsewhere."""
        self.forms.forget()
        if self.whole:
            self.whole.forget()

    def begin(
        self, run: RunState, arrival: Arrival, call: FlatCall, opening: tuple[PastCall, ...] = ()
    ) -> ModelCall:
        """A call that goes on with nothing.

        Args:
            run: the denoising that it belongs to.
            arrival: what tells it from others.
            call: its arguments.
            opening: see `CallState`.

        Raises:
            RunError: a form of call that has no graph.
        """
        compiled = (self.whole or self.forms).for_call(call)
        place = start_place(arrival, self.plan.binding.grid)
        return ModelCall(
            run,
            None,
            compiled,
            arrival,
            StepMode.REFRESH,
            place,
            list(call.tensors.values()),
            self.number,
            opening,
            derived=not self._recorded(place),
        )

    def go_on(
        self,
        run: RunState,
        before: CallState,
        place: float,
        arrival: Arrival,
        call: FlatCall,
        opening: tuple[PastCall, ...] = (),
    ) -> ModelCall:
        """A call that goes on with another one.

        Args:
            run: the denoising that both belong to.
            before: what the other one left, under this recipe.
            place: of the call's step among the recorded ones.
            arrival: what tells it from others.
            call: its arguments.
            opening: see `CallState`.
        """
        next_one = self._recorded(place) and place == int(before.place) + 1
        return ModelCall(
            run,
            before,
            before.compiled,
            arrival,
            self.plan.recipe.mode_at(before.place, place, before.refreshes[0]),
            place,
            list(call.tensors.values()),
            self.number,
            opening,
            derived=before.derived or not next_one,
        )

    def again(self, past: Sequence[PastCall]) -> CallState | None:
        """What calls under another recipe would have left under this one.

        Only steps that leave something are computed. None where they do not follow one another on
        this grid.
        """
        run, before = RunState(), None
        for one in past:
            if before is None:
                step = self.begin(run, one.arrival, one.call)
            else:
                place = next_place(before, one.arrival, self.plan.binding.grid)
                if place is None:
                    return None
                step = self.go_on(run, before, place, one.arrival, one.call)
            with torch.no_grad():
                leaves = step.compiled.variant_set.variants[step.mode].writes
                outputs = step.variant(*step.tensors, *step.values()) if leaves else ()
            before = step.leave(outputs)
        return before

    def _recorded(self, place: float) -> bool:
        return place == int(place) and 0 <= place < self.plan.binding.grid.steps
