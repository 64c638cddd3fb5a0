"""OptimizedModel: a drop-in nn.Module that picks the variant of every step and keeps the caches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calicache.graph_passes.api.forms import FormTable, WholeTable
from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.runs import ThreadRun, binding_run, started_run
from calicache.graph_passes.api.weights import UNABLE, WeightVersions, unable
from calicache.graph_passes.common.errors import CalicacheWarning, RunError
from calicache.graph_passes.describe.html import model_html
from calicache.graph_passes.recording.signature import FlatCall, flatten_call
from calicache.graph_passes.rewriting.compile import Compiled
from calicache.graph_passes.sampler.kept import keep_refresh
from calicache.graph_passes.sampler.run_state import Arrival, CallState, RunState, start_place
from calicache.graph_passes.settings.choices import StepMode

MAX_FORMS = 8


@dataclass(frozen=True, slots=True)
class _Step:
    """One call of the model on its way.

    Attributes:
        run: the denoising that it belongs to.
        before: what it goes on with; None where it begins anew.
        compiled: the graphs for its form.
        arrival: what tells it from others.
        mode: of its step.
        place: of its step among the recorded ones.
        tensors: of the call, in order.
    """

    run: RunState
    before: CallState | None
    compiled: Compiled
    arrival: Arrival
    mode: StepMode
    place: float
    tensors: list[Tensor]

    @property
    def variant(self) -> nn.Module:
        """The graph to run."""
        return self.compiled.variant_set.variants[self.mode].module

    def values(self) -> list[Tensor]:
        """What the variant reads beside the call's tensors."""
        variant_set, recipe, before = self.compiled.variant_set, self.compiled.recipe, self.before
        refreshes = before.refreshes if before else ()
        weights = variant_set.named_weights(*recipe.weights_at(self.mode, self.place, refreshes))
        kept = before.kept if before else ()
        reads = variant_set.variants[self.mode].reads
        return variant_set.read(reads, kept, weights, self.tensors[0].device)

    def finish(self, outputs: Sequence[Tensor]) -> Any:
        """Keep what a REFRESH gave; the model's own outputs."""
        variant_set, before = self.compiled.variant_set, self.before
        history = variant_set.history
        kept, places = (before.kept, before.refreshes) if before else ((), ())
        if self.mode is StepMode.REFRESH:
            kept = keep_refresh(variant_set, outputs, kept, history, self.tensors)
            places = (self.place, *places)[:history]
        start = before.start if before else self.place
        state = CallState(self.compiled, self.arrival.kept(), self.place, kept, places, start)
        self.run.keep(before, state)
        flat = list(outputs[: variant_set.outputs])
        return pytree.tree_unflatten(flat, self.compiled.captured.output_tree)


class OptimizedModel(nn.Module):
    """The model under a plan: the same call, the same return type, fewer MACs.

    A call goes on with the one that it follows: at a later timestep, with the same prompt, and
    latents that have moved no farther than they do. Every other call begins a run, with a REFRESH,
    at whatever timestep it brings. So runs may be broken off, begin mid-way, and have guidance in
    calls of their own; `start_run` keeps several apart that go on at once. Timesteps that were not
    recorded get REFRESH steps where the plan has them. Calls of other sizes are captured when they
    come, with the same factors. Attributes that it does not have (config, dtype, ...) are those of
    the original model.

    Attributes:
        original: the model as it was.
        plan: what it runs under.
        strict: whether timesteps that were not recorded are refused.
    """

    def __init__(
        self,
        original: nn.Module,
        plan: Plan,
        compiled: Compiled | None,
        *,
        strict: bool = False,
        max_forms: int = MAX_FORMS,
    ) -> None:
        super().__init__()
        self.original = original
        self.plan, self.strict = plan, strict
        variants = compiled.variant_set.variants if compiled else {}
        self.variants = nn.ModuleDict({mode.name: v.module for mode, v in variants.items()})
        self._forms = FormTable(original, plan, compiled, max_forms)
        self._whole = None if compiled else WholeTable(original, plan, max_forms)
        self._by_form: list[OptimizedModel] = []
        self._thread_run = ThreadRun()
        self._weights = WeightVersions.of(original)
        self.eval()

    @property
    def compiled(self) -> Compiled:
        """What is made of the model, for calls of the plan's own form.

        Raises:
            CalicacheError: whatever stage refuses names itself.
        """
        return self._forms.own

    @property
    def state(self) -> RunState:
        """The running denoising: the one started here by hand, or this thread's own."""
        return started_run(self, RunState) or self._thread_run.state

    @property
    def step(self) -> int:
        """Index of the step after the newest call's, among the recorded ones."""
        calls = self.state.calls
        return round(calls[-1].place) + 1 if calls else 0

    @property
    def run_bytes(self) -> int:
        """Bytes that one run of the plan's own form keeps."""
        caches = self.compiled.variant_set.caches
        return self.plan.binding.calls * sum(cache.nbytes * cache.history for cache in caches)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the next call; takes and returns what the original model does.

        Raises:
            RunError: other arguments than the plan's, a form of call that it has no graph for,
                or weights that have changed.
        """
        # torch.compile stops at both ends of a call and takes each variant as a whole.
        step, variant, tensors = self._begin(args, kwargs)
        return self._end(step, variant(*tensors))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[_Step, nn.Module, list[Tensor]]:
        """Where the call belongs, its variant, and what that takes."""
        step = self._step(self._flat(args, kwargs))
        return step, step.variant, [*step.tensors, *step.values()]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, step: _Step, outputs: Sequence[Tensor]) -> Any:
        """Keep what a REFRESH gave; the model's own outputs."""
        return step.finish(outputs)

    def _flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FlatCall:
        call = flatten_call(self.original, args, kwargs)
        return call.arranged(self.plan.binding.signature)

    def _step(self, call: FlatCall) -> _Step:
        run, binding, recipe = self.state, self.plan.binding, self.plan.recipe
        signature, tensors = call.signature(), list(call.tensors.values())
        classes = binding.classes_of(signature)
        form = signature, tensors[0].device
        arrival = Arrival.of(call.tensors, classes, binding.timestep, form, run.name)
        follows = run.before(arrival, binding)
        if follows is None:
            if self._whole is None:
                self._weights.check(self.original)
            compiled = (self._whole or self._forms).for_call(call)
            run.make_room(arrival, binding.calls)
            place = start_place(arrival, binding)
            self._check_place(place, int(place))
            return _Step(run, None, compiled, arrival, StepMode.REFRESH, place, tensors)
        before, place = follows
        self._check_place(place, int(before.place) + 1)
        mode = recipe.mode_at(before.place, place, before.refreshes[0])
        return _Step(run, before, before.compiled, arrival, mode, place, tensors)

    def _check_place(self, place: float, recorded: int) -> None:
        """Say that a step is none of the recorded ones, or refuse it."""
        if place == recorded:
            return
        binding = self.plan.binding
        if self.strict:
            raise RunError(
                "timestep",
                expected="the recorded ones, one after another: "
                + ", ".join(f"{value:g}" for value in binding.grid.timesteps),
                got="another",
                fix="Record and plan with this sampler, or optimise without strict=True.",
            )
        warnings.warn(
            "These timesteps were not recorded. REFRESH steps come where the plan has them, and "
            "what was fitted is left out; the error was not measured. Record and plan with this "
            "sampler, or optimise with strict=True to refuse.",
            CalicacheWarning,
            stacklevel=2,
        )

    def start_run(self, run: RunState | None = None) -> AbstractContextManager[RunState]:
        """A denoising of its own, for the calls of this thread or asyncio task inside `with`.

        Without it a thread has one denoising at a time.

        Args:
            run: to go on with one, as servers do that take steps of many runs in turn; a new
                one where None.

        Examples:
            >>> with fast.start_run():
            ...     image = pipe(prompt).images[0]
        """
        return binding_run(self, RunState() if run is None else run)

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Tell the calls of a step apart by name, as the pipelines of diffusers do.

        Args:
            name: such as `cond` or `uncond`.
        """
        run = self.state
        before, run.name = run.name, name
        try:
            yield
        finally:
            run.name = before

    def for_call(self, *args: Any, **kwargs: Any) -> OptimizedModel:
        """The optimised model for calls like this one, which may have other sizes.

        Raises:
            RunError: the call differs from the plan's in more than sizes and constants.
        """
        return self._of(self._forms.for_call(self._flat(args, kwargs)))

    def by_step(self) -> OptimizedModel:
        """The optimised model for all calls of a step in one; this one where a step has one."""
        return self._of(self._forms.for_binding(self.plan.binding.by_step()))

    def _of(self, compiled: Compiled) -> OptimizedModel:
        """The same model and plan for calls of another form alone."""
        for model in (self, *self._by_form):
            if model.compiled is compiled:
                return model
        plan = replace(self.plan, binding=compiled.analysis.binding)
        model = OptimizedModel(self.original, plan, compiled, strict=self.strict)
        self._by_form = [*self._by_form, model][-self._forms.limit :]
        return model

    def reset(self) -> None:
        """Forget the running denoising: the next call begins a run."""
        self.state.restart()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizedModel:
        self._by_form = []
        if self._whole:
            self._whole.forget()
        self._forms.forget()  # they are made again where the weights have gone
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._weights = WeightVersions.of(self.original)
        return self

    def train(self, mode: bool = True) -> OptimizedModel:
        """Stay in eval mode: calibration has no training mode, and a pipeline may ask for one."""
        super().train(False)
        if mode:
            warnings.warn(
                "An optimised model stays in eval mode. Train the original model, then optimise "
                "it again.",
                CalicacheWarning,
                stacklevel=2,
            )
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._weights = WeightVersions.of(self.original)  # a copy has parameters of its own

    def _repr_html_(self) -> str:
        """What a notebook shows of the optimised model."""
        return model_html(type(self.original).__name__, self.compiled)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original":
                raise
            value = getattr(self.original, name)
            return unable(name) if name in UNABLE else value
