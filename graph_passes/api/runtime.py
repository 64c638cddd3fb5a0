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
from calicache.graph_passes.recording.binding import Binding
from calicache.graph_passes.recording.reads import check_fixed
from calicache.graph_passes.recording.signature import flatten_call
from calicache.graph_passes.recording.timestep import Timestep, place_of
from calicache.graph_passes.rewriting.compile import Compiled, assign_targets, compile_graphs
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.sampler.kept import RunState, keep_refresh
from calicache.graph_passes.settings.choices import StepMode


class OptimizedModel(nn.Module):
    """The model under a plan: the same call, the same return type, fewer MACs.

    Steps are counted from call to call. A new run starts by itself where the timestep turns
    back or leaves the recorded order or, for a model without one, after the last planned step;
    `reset` starts one by hand. A run may begin at any recorded timestep, with a REFRESH.
    Where the recorded steps call the model several times, as in guidance by a conditional and an
    unconditional call, each of the calls keeps caches of its own. A call with another batch size
    is captured once more, with the same factors. Attributes that it does not have (config, dtype,
    ...) are those of the original model.

    Attributes:
        original: the model as it was.
        plan: what it runs under.
        compiled: what was made of it, for calls of the plan's own form.
        state: the running denoising.
    """

    def __init__(self, original: nn.Module, plan: Plan, compiled: Compiled) -> None:
        super().__init__()
        self.original = original
        self.plan, self.compiled = plan, compiled
        self.variants = nn.ModuleDict(
            {mode.name: variant.module for mode, variant in compiled.variant_set.variants.items()}
        )
        self.state = RunState(plan.binding.calls)
        self._others: list[OptimizedModel] = []
        self._by_start: dict[int, VariantSet] = {0: compiled.variant_set}
        self.eval()

    @property
    def step(self) -> int:
        """Index of the next step in the running denoising."""
        return self.state.step

    @property
    def call(self) -> int:
        """The next call in that step."""
        return self.state.call

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
        signature, fixed = self.plan.binding.signature, self.compiled.analysis.fixed
        other = signature.other_batch(call)
        if other is not None:
            check_fixed(fixed, call.tensors)
            form = self._for_form(self.plan.binding.with_signature(other))
            return form._begin(args, kwargs)  # type: ignore[no-any-return]
        tensors = signature.match(call)
        mode = self._next_mode(call.tensors)
        if mode is StepMode.REFRESH:
            check_fixed(fixed, call.tensors)
        variant_set, state = self._variant_set(), self.state
        values = variant_set.read(
            variant_set.variants[mode].reads, state.kept[state.call], state.step, tensors[0].device
        )
        return self, self.variants[mode.name], tensors, values

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> Any:
        """Keep what a REFRESH gave, count the call, return the model's own outputs."""
        variant_set, state = self.compiled.variant_set, self.state
        if self._mode() is StepMode.REFRESH:
            state.kept[state.call] = keep_refresh(
                variant_set, outputs, state.kept[state.call], variant_set.history, tensors
            )
        state.advance()
        flat = list(outputs[: variant_set.outputs])
        return pytree.tree_unflatten(flat, self.compiled.captured.output_tree)

    def for_call(self, *args: Any, **kwargs: Any) -> OptimizedModel:
        """The optimised model for calls like this one, which may have another batch size.

        Raises:
            RunError: the call differs from the plan's in more than the batch size.
        """
        call = flatten_call(self.original, args, kwargs)
        other = self.plan.binding.signature.other_batch(call)
        if other is not None:
            return self._for_form(self.plan.binding.with_signature(other))
        self.plan.binding.signature.match(call)
        return self

    def reset(self) -> None:
        """Forget the running denoising: the next call is step 0."""
        self.state.restart()
        for other in self._others:
            other.reset()

    def by_step(self) -> OptimizedModel:
        """The optimised model for all calls of a step in one; this one where a step has one."""
        return self._for_form(self.plan.binding.by_step())

    def _for_form(self, binding: Binding) -> OptimizedModel:
        """The same model and plan for calls of another form, made at the first request."""
        if binding == self.plan.binding:
            return self
        for other in self._others:
            if other.plan.binding == binding:
                return other
        plan, recipe = replace(self.plan, binding=binding), self.plan.recipe
        analysis = plan.workspace.analysis(self.original, binding, recipe.include, recipe.exclude)
        weight = next(analysis.captured.module.parameters())
        factors = {name: value.to(weight) for name, value in self.compiled.factors.items()}
        assignment = assign_targets(analysis, recipe)
        compiled = compile_graphs(analysis, recipe, assignment, factors)
        self._others.append(OptimizedModel(self.original, plan, compiled))
        return self._others[-1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizedModel:
        self._others = []  # they are made again where the weights have gone
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
        return model_html(type(self.original).__name__, self.compiled)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original":
                raise
            return getattr(self.original, name)

    def _variant_set(self) -> VariantSet:
        """The variants, with the weights of a run that began where this one did."""
        start = self.state.start
        if start not in self._by_start:
            weights = self.plan.recipe.weights_from(start)
            self._by_start[start] = self.compiled.variant_set.scheduled(*weights)
        return self._by_start[start]

    def _mode(self) -> StepMode:
        """Mode of the next step."""
        state = self.state
        return StepMode.REFRESH if state.step == state.start else self.plan.schedule[state.step]

    def _next_mode(self, tensors: Mapping[str, Tensor]) -> StepMode:
        """Mode of this call, after starting a new run where one begins."""
        schedule, timestep = self.plan.schedule, self.plan.binding.timestep
        if timestep is None:
            if self.state.step == len(schedule):
                self.reset()
        else:
            self._follow(timestep, timestep.value(tensors))
        if self.state.step >= len(schedule):
            raise RunError(
                f"step {self.state.step}",
                expected=f"at most {len(schedule)} steps in a run",
                got="one more",
                fix="Record and plan with this many steps, or call reset() before a new run.",
            )
        return self._mode()

    def _follow(self, timestep: Timestep, now: float) -> None:
        """Start a new run where the timestep says so; keep count of the calls of a step."""
        state = self.state
        before, state.timestep = state.timestep, now
        if before is None:
            self._start(now)
        elif timestep.turns_back(before, now):
            if now == before and state.step > state.start + 1:
                raise _uncounted(state.step, timestep.calls, "one more")
            self._start(now)
        elif (
            timestep.calls > 1
            and now == before
            and (state.step, state.call)
            == (
                state.start + 1,
                0,
            )
        ):
            # The run before was broken off in its first step: of its calls the newest count.
            state.step, state.call = state.start, timestep.calls - 1
            state.kept = [*state.kept[1:], ()]
        elif timestep.calls > 1 and now != before and state.call:
            raise _uncounted(state.step, timestep.calls, str(state.call))
        elif now != before and place_of(self.plan.binding.timesteps, now) not in (None, state.step):
            self._start(now)  # the run before was broken off

    def _start(self, now: float) -> None:
        """Begin a run at the recorded step of this timestep; at step 0 where none has it."""
        self.reset()
        self.state.restart(place_of(self.plan.binding.timesteps, now) or 0)
        self.state.timestep = now


def _uncounted(step: int, calls: int, got: str) -> RunError:
    return RunError(
        f"step {step}",
        expected=f"{calls} calls with one timestep, as recorded",
        got=got,
        fix="Record and plan with this guidance, or call reset() before a new run.",
    )
