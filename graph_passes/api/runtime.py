"""OptimizedModel: a drop-in nn.Module that picks the variant of every step and keeps the caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.common.errors import RunError
from calicache.graph_passes.describe.html import model_html
from calicache.graph_passes.factors.decompose import CalibrationFactors
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.recording.reads import check_fixed
from calicache.graph_passes.recording.signature import CallSignature, flatten_call
from calicache.graph_passes.recording.step_calls import batch_signature, batch_size, one_call
from calicache.graph_passes.recording.timestep import Timestep, calls_of
from calicache.graph_passes.rewriting.cost import ModelCost
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.recipe import PlanSettings
from calicache.graph_passes.sites.sites import Sites
from calicache.graph_passes.sites.targets import CalibrationTarget


class OptimizedModel(nn.Module):
    """The model under a plan: the same call, the same return type, fewer MACs.

    Steps are counted from call to call. A new run starts by itself where the timestep turns
    back or, for a model without one, after the last planned step; `reset` starts one by hand.
    Where the recorded steps call the model several times, as in guidance by a conditional and an
    unconditional call, each of the calls keeps caches of its own. A call with another batch size
    is captured once more, with the same factors. Attributes that it does not have (config, dtype,
    ...) are those of the original model.

    Attributes:
        original: the model as it was.
        plan, captured, sites, targets, factors, variant_set, cost: what each stage of `optimize`
            made.
        step: index of the next step in the running denoising; `call` the next call in it.
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
        variant_set: VariantSet,
        cost: ModelCost,
        again: Callable[[PlanSettings], OptimizedModel],
    ) -> None:
        super().__init__()
        self.original = original
        self.plan, self.captured, self.sites = plan, captured, sites
        self.targets, self.factors = targets, factors
        self.variant_set, self.cost = variant_set, cost
        self.variants = nn.ModuleDict(
            {mode.name: variant.module for mode, variant in variant_set.variants.items()}
        )
        self._calls = calls_of(plan.settings.timestep)
        self._again = again
        self._others: dict[tuple[CallSignature, Timestep | None], OptimizedModel] = {}
        self.step, self.call = 0, 0
        self.reset()
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the next call; takes and returns what the original model does.

        Raises:
            RunError: other shapes (but for the batch size) or arguments than the plan's, more
                steps than planned, or another number of calls in a step.
        """
        # torch.compile stops at both ends of a call and takes each variant as a whole.
        owner, variant, tensors, values = self._begin(args, kwargs)
        return owner._end(tensors, variant(*tensors, *values))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[OptimizedModel, nn.Module, list[Tensor], list[Tensor]]:
        """The model of this batch size, its variant, the call's tensors, and what it reads."""
        call = flatten_call(self.original, args, kwargs)
        signature = self.plan.settings.signature
        other = signature.other_batch(call)
        if other is not None:
            check_fixed(self.plan.settings.fixed, call.tensors)
            return self._for_form(other, self.plan.settings.timestep)._begin(args, kwargs)  # type: ignore[no-any-return]
        tensors = signature.match(call)
        mode = self._next_mode(call.tensors)
        if mode is StepMode.REFRESH:
            check_fixed(self.plan.settings.fixed, call.tensors)
        reads, kept = self.variant_set.variants[mode].reads, self._kept[self.call]
        values = self.variant_set.read(reads, kept, self.step, tensors[0].device)
        return self, self.variants[mode.name], tensors, values

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> Any:
        """Keep what a REFRESH gave, count the call, return the model's own outputs."""
        if self.plan.schedule[self.step] is StepMode.REFRESH:
            self._kept[self.call] = self._keep(outputs, tensors, self._kept[self.call])
        self.call = (self.call + 1) % self._calls
        self.step += self.call == 0
        flat = list(outputs[: self.variant_set.outputs])
        return pytree.tree_unflatten(flat, self.captured.output_tree)

    def for_call(self, *args: Any, **kwargs: Any) -> OptimizedModel:
        """The optimised model for calls like this one, which may have another batch size.

        Raises:
            RunError: the call differs from the plan's in more than the batch size.
        """
        call = flatten_call(self.original, args, kwargs)
        other = self.plan.settings.signature.other_batch(call)
        if other is not None:
            return self._for_form(other, self.plan.settings.timestep)
        self.plan.settings.signature.match(call)
        return self

    def reset(self) -> None:
        """Forget the running denoising: the next call is step 0."""
        self.step, self.call = 0, 0
        self._kept: list[list[dict[str, Tensor]]] = [[] for _ in range(self._calls)]
        self._timestep: float | None = None
        for other in self._others.values():
            other.reset()

    def batched(self) -> OptimizedModel:
        """The optimised model for all calls of a step in one; this one where a step has one."""
        if self._calls == 1:
            return self
        settings = self.plan.settings
        batch = batch_size(settings.signature, settings.dependence)
        signature = batch_signature(settings.signature, self._calls, batch)
        return self._for_form(signature, one_call(settings.timestep))

    def _for_form(self, signature: CallSignature, timestep: Timestep | None) -> OptimizedModel:
        key = (signature, timestep)
        if key not in self._others:
            settings = replace(self.plan.settings, signature=signature, timestep=timestep)
            self._others[key] = self._again(settings)
        return self._others[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizedModel:
        self._others = {}  # they are made again where the weights have gone
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

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

    def _repr_html_(self) -> str:
        """What a notebook shows of the optimised model."""
        return model_html(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original":
                raise
            return getattr(self.original, name)

    def _keep(
        self,
        outputs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        kept: Sequence[dict[str, Tensor]],
    ) -> list[dict[str, Tensor]]:
        """Take over the caches of a REFRESH step; copy what the caller may write to."""
        own = self.variant_set.outputs
        theirs = [v for v in (*tensors, *outputs[:own]) if isinstance(v, Tensor)]
        shared = {value.untyped_storage().data_ptr() for value in theirs}
        fresh = {
            cache.name: value.clone() if value.untyped_storage().data_ptr() in shared else value
            for cache, value in zip(self.variant_set.caches, outputs[own:], strict=True)
        }
        older = [
            {c.name: values[c.name] for c in self.variant_set.caches if back < c.history}
            for back, values in enumerate(kept, start=1)
        ]
        return [fresh, *older][: self.variant_set.history]

    def _next_mode(self, tensors: Mapping[str, Tensor]) -> StepMode:
        """Mode of this call, after starting a new run where one begins."""
        schedule, timestep = self.plan.schedule, self.plan.settings.timestep
        if timestep is None:
            if self.step == len(schedule):
                self.reset()
        else:
            self._follow(timestep, float(tensors[timestep.name].flatten()[0]))
        if self.step >= len(schedule):
            raise RunError(
                f"step {self.step}",
                expected=f"at most {len(schedule)} steps in a run",
                got="one more",
                fix="Record and plan with this many steps, or call reset() before a new run.",
            )
        return schedule[self.step]

    def _follow(self, timestep: Timestep, now: float) -> None:
        """Start a new run where the timestep turns back; keep count of the calls of a step."""
        before, self._timestep = self._timestep, now
        if before is None:
            return
        if timestep.turns_back(before, now):
            self.reset()
            self._timestep = now
        elif timestep.calls > 1 and now == before and (self.step, self.call) == (1, 0):
            # The run before was broken off in its first step: of its calls the newest count.
            self.step, self.call = 0, timestep.calls - 1
            self._kept = [*self._kept[1:], []]
        elif timestep.calls > 1 and now != before and self.call:
            raise RunError(
                f"step {self.step}",
                expected=f"{timestep.calls} calls with one timestep, as recorded",
                got=str(self.call),
                fix="Record and plan with this guidance, or call reset() before a new run.",
            )
