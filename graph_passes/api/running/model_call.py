"""One call of an optimised model on its way: which variant runs, what it reads, what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calicache.graph_passes.rewriting.compile import Compiled
from calicache.graph_passes.sampler.kept import keep_values
from calicache.graph_passes.sampler.run_state import (
    Arrival,
    CallState,
    PastCall,
    RunState,
)
from calicache.graph_passes.settings.choices import StepMode


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One call of the model on its way.

    Attributes:
        run: the denoising that it belongs to.
        before: what it goes on with; None where it begins anew.
        compiled: the graphs for its form.
        arrival: what tells it from others.
        mode: of its step.
        place: of its step among the recorded ones.
        tensors: of the call, in order.
        recipe: number of the recipe, in a plan of several.
        opening: see `CallState`.
        derived: whether it, or one before it, has a timestep that was not recorded.
    """

    run: RunState
    before: CallState | None
    compiled: Compiled
    arrival: Arrival
    mode: StepMode
    place: float
    tensors: list[Tensor]
    recipe: int = 0
    opening: tuple[PastCall, ...] = ()
    derived: bool = False

    @property
    def start(self) -> float:
        """Place of the step that its run began with."""
        return self.before.start if self.before else self.place

    @property
    def variant(self) -> nn.Module:
        """The graph to run."""
        return self.compiled.variant_set.variants[self.mode].module

    def values(self) -> list[Tensor]:
        """What the variant reads beside the call's tensors."""
        variant_set, recipe, before = self.compiled.variant_set, self.compiled.recipe, self.before
        places = (before.refreshes, before.outputs) if before else ((), ())
        own = recipe.weights_at(self.mode, self.place, *places, self.start)
        weights = variant_set.named_weights(*own)
        kept = before.kept if before else {}
        reads = variant_set.variants[self.mode].reads
        return variant_set.read(reads, kept, weights, self.tensors[0].device)

    def finish(self, outputs: Sequence[Tensor]) -> Any:
        """Keep what is for later steps; the model's own outputs."""
        self.run.keep(self.before, self.leave(outputs))
        flat = list(outputs[: self.compiled.variant_set.outputs])
        return pytree.tree_unflatten(flat, self.compiled.captured.output_tree)

    def leave(self, outputs: Sequence[Tensor]) -> CallState:
        """What the call leaves for the next one.

        Args:
            outputs: of the variant.
        """
        variant_set, before = self.compiled.variant_set, self.before
        history, here = variant_set.history, (self.place,)
        refreshes, kept_outputs = (before.refreshes, before.outputs) if before else ((), ())
        if self.mode is StepMode.REFRESH:
            refreshes = (*here, *refreshes)[:history]
        if self.mode.keeps_output:
            kept_outputs = (*here, *kept_outputs)[:history]
        kept = before.kept if before else {}
        variant = variant_set.variants[self.mode]
        return CallState(
            self.compiled,
            self.arrival.kept(),
            self.place,
            keep_values(variant_set, variant, outputs, kept, self.tensors),
            refreshes,
            kept_outputs,
            self.start,
            self.recipe,
            self.opening,
            self.derived,
        )
