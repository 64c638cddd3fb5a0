"""OptimizedModel: a drop-in nn.Module that picks the variant of every step and keeps the caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calicache.graph_passes.assign import CalibrationTarget
from calicache.graph_passes.capture import CapturedGraph
from calicache.graph_passes.cost import ModelCost
from calicache.graph_passes.decompose import CalibrationFactors
from calicache.graph_passes.errors import RunError
from calicache.graph_passes.plan import Plan
from calicache.graph_passes.rewrite import Rewritten
from calicache.graph_passes.schedule import StepMode
from calicache.graph_passes.signature import flatten_call
from calicache.graph_passes.sites import Sites


class OptimizedModel(nn.Module):
    """The model under a plan: the same call, the same return type, fewer MACs.

    Steps are counted from call to call. A new run starts by itself where the timestep turns
    back or, for a model without one, after the last planned step; `reset` starts one by hand.
    Attributes that it does not have (config, dtype, ...) are those of the original model.

    Attributes:
        original: the model as it was.
        plan, captured, sites, targets, factors, rewritten, cost: what each stage of `optimize`
            made.
        step: index of the next step in the running denoising.
    """

    def __init__(
        self,
        original: nn.Module,
        *,
        plan: Plan,
        captured: CapturedGraph,
        sites: Sites,
        targets: Sequence[CalibrationTarget],
        factors: dict[str, CalibrationFactors],
        rewritten: Rewritten,
        cost: ModelCost,
    ) -> None:
        super().__init__()
        self.original = original
        self.plan, self.captured, self.sites = plan, captured, sites
        self.targets, self.factors = targets, factors
        self.rewritten, self.cost = rewritten, cost
        self.variants = nn.ModuleDict(
            {mode.name: variant.module for mode, variant in rewritten.variants.items()}
        )
        self.step = 0
        self._kept: list[dict[str, Tensor]] = []
        self._timestep: float | None = None
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the next step; takes and returns what the original model does.

        Raises:
            RunError: other shapes or arguments than the plan's, or more steps than planned.
        """
        call = flatten_call(self.original, args, kwargs)
        tensors = self.plan.settings.signature.match(call)
        mode = self._next_mode(call.tensors)
        variant = self.rewritten.variants[mode]
        module = self.variants[mode.name]
        values = self.rewritten.read(variant.reads, self._kept, self.step, tensors[0].device)
        outputs = module(*tensors, *values)
        if mode is StepMode.REFRESH:
            self._keep(outputs, tensors)
        self.step += 1
        flat = list(outputs[: self.rewritten.outputs])
        return pytree.tree_unflatten(flat, self.captured.output_tree)

    def reset(self) -> None:
        """Forget the running denoising: the next call is step 0."""
        self.step = 0
        self._kept = []
        self._timestep = None

    def train(self, mode: bool = True) -> OptimizedModel:
        """Stay in eval mode; calibration has no training mode.

        Raises:
            RunError: for mode=True.
        """
        if mode:
            raise RunError(
                "train()",
                expected="eval mode",
                got="training mode",
                fix="Train the original model, then optimise it again.",
            )
        super().train(False)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original":
                raise
            return getattr(self.original, name)

    def _keep(self, outputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Take over the caches of a REFRESH step; copy what the caller may write to."""
        own = self.rewritten.outputs
        shared = {value.untyped_storage().data_ptr() for value in (*tensors, *outputs[:own])}
        fresh = {
            cache.name: value.clone() if value.untyped_storage().data_ptr() in shared else value
            for cache, value in zip(self.rewritten.caches, outputs[own:], strict=True)
        }
        older = [
            {c.name: kept[c.name] for c in self.rewritten.caches if back < c.history}
            for back, kept in enumerate(self._kept, start=1)
        ]
        self._kept = [fresh, *older][: self.rewritten.history]

    def _next_mode(self, tensors: Any) -> StepMode:
        """Mode of this call, after starting a new run where one begins."""
        schedule, timestep = self.plan.schedule, self.plan.settings.timestep
        if timestep is None:
            if self.step == len(schedule):
                self.reset()
        else:
            now = float(tensors[timestep.name].flatten()[0])
            if self._timestep is not None and timestep.turns_back(self._timestep, now):
                self.reset()
            self._timestep = now
        if self.step >= len(schedule):
            raise RunError(
                f"step {self.step}",
                expected=f"at most {len(schedule)} steps in a run",
                got="one more",
                fix="Record and plan with this many steps, or call reset() before a new run.",
            )
        return schedule[self.step]
