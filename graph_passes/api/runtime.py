"""OptimizedModel: a drop-in nn.Module that picks the variant of every step and keeps the caches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.running.forms import FormTable, WholeTable
from calicache.graph_passes.api.running.model_call import ModelCall
from calicache.graph_passes.api.running.runs import ThreadRun, binding_run, started_run
from calicache.graph_passes.api.running.weights import UNABLE, OnChange, WeightVersions, unable
from calicache.graph_passes.common.errors import CalicacheWarning, RunError
from calicache.graph_passes.describe.html import model_html
from calicache.graph_passes.describe.text import plan_text
from calicache.graph_passes.recording.signature import FlatCall, flatten_call
from calicache.graph_passes.rewriting.compile import Compiled
from calicache.graph_passes.sampler.run_state import Arrival, RunState, start_place
from calicache.graph_passes.settings.choices import StepMode

MAX_FORMS = 8
PLAN_FOLDER = "calicache"  # in the folder of a model that was saved with its plan


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
        on_change: what happens at the start of a run where weights have changed.
    """

    def __init__(
        self,
        original: nn.Module,
        plan: Plan,
        compiled: Compiled | None,
        *,
        strict: bool = False,
        on_change: OnChange = OnChange.REFUSE,
        max_forms: int = MAX_FORMS,
    ) -> None:
        super().__init__()
        self.original = original
        # Where diffusers looks the class of a part of a pipeline up, to save it.
        self.__module__ = type(original).__module__
        self.plan, self.strict, self.on_change = plan, strict, on_change
        self.variants = _modules(compiled)
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
    ) -> tuple[ModelCall, nn.Module, list[Tensor]]:
        """Where the call belongs, its variant, and what that takes."""
        step = self._step(self._flat(args, kwargs))
        return step, step.variant, [*step.tensors, *step.values()]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, step: ModelCall, outputs: Sequence[Tensor]) -> Any:
        """Keep what a REFRESH gave; the model's own outputs."""
        return step.finish(outputs)

    def _flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FlatCall:
        call = flatten_call(self.original, args, kwargs)
        return call.arranged(self.plan.binding.signature)

    def _step(self, call: FlatCall) -> ModelCall:
        run, binding, recipe = self.state, self.plan.binding, self.plan.recipe
        signature, tensors = call.signature(), list(call.tensors.values())
        classes = binding.classes_of(signature)
        form = signature, tensors[0].device
        arrival = Arrival.of(call.tensors, classes, binding.timestep, form, run.name)
        follows = run.before(arrival, binding)
        if follows is None:
            self._meet_changes()
            compiled = (self._whole or self._forms).for_call(call)
            run.make_room(arrival, binding.calls)
            place = start_place(arrival, binding)
            self._check_place(place, int(place))
            return ModelCall(run, None, compiled, arrival, StepMode.REFRESH, place, tensors)
        before, place = follows
        self._check_place(place, int(before.place) + 1)
        mode = recipe.mode_at(before.place, place, before.refreshes[0])
        return ModelCall(run, before, before.compiled, arrival, mode, place, tensors)

    def _meet_changes(self) -> None:
        """Refuse weights that have changed since, or make the factors of them."""
        refusal = None if self._whole else self._weights.refusal(self.original)
        if refusal is None:
            return
        if self.on_change is OnChange.REFUSE:
            raise refusal
        self.plan = self.plan.rebind(self.original)
        self._forms.renew(self.plan)
        self._by_form, self._weights = [], WeightVersions.of(self.original)
        self.variants = _modules(self.compiled)

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
        model = OptimizedModel(
            self.original, plan, compiled, strict=self.strict, on_change=self.on_change
        )
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

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The original's: what asks for a model of its kind, such as a pipeline, gets one.

        `isinstance(fast, OptimizedModel)` is true all the same.
        """
        original = self.__dict__.get("_modules", {}).get("original")
        return OptimizedModel if original is None else type(original)

    def save_pretrained(self, path: Path | str, **options: Any) -> None:
        """Save the original as it saves itself, and the plan in a folder of it, `calicache`.

        So a pipeline's own `save_pretrained` keeps both; what loads the folder gets the original.

        Raises:
            AttributeError: the original has no such method.
            CalicacheError: the plan cannot be written.
        """
        self.original.save_pretrained(path, **options)  # type: ignore[operator]
        self.plan.save(Path(path) / PLAN_FOLDER)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (), self.__dict__.copy()  # pickle's own way asks for __class__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._weights = WeightVersions.of(self.original)  # a copy has parameters of its own

    def __repr__(self) -> str:
        lines = plan_text(self.plan.recipe, self.plan.front, None).splitlines()
        name = type(self.original).__name__
        return "\n  ".join((f"{name} optimised by calicache", *lines))

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


def _modules(compiled: Compiled | None) -> nn.ModuleDict:
    """The graphs by name of their mode."""
    variants = compiled.variant_set.variants if compiled else {}
    return nn.ModuleDict({mode.name: variant.module for mode, variant in variants.items()})


def _empty() -> OptimizedModel:
    return OptimizedModel.__new__(OptimizedModel)
