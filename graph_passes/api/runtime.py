"""OptimizedModel: a drop-in nn.Module that picks the variant of every step and keeps the caches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, SupportsFloat, SupportsIndex

import torch
from torch import Tensor, nn

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.running.choice import Recipes
from calicache.graph_passes.api.running.drop_in import DropIn
from calicache.graph_passes.api.running.model_call import ModelCall
from calicache.graph_passes.api.running.recipes import RecipeForms
from calicache.graph_passes.api.running.runs import ThreadRun, binding_run, started_run
from calicache.graph_passes.api.running.weights import OnChange, WeightVersions
from calicache.graph_passes.common.arguments import number, numbers, whole_number
from calicache.graph_passes.common.errors import CalicacheWarning, RunError
from calicache.graph_passes.describe.html import model_html
from calicache.graph_passes.recording.signature import FlatCall, flatten_call
from calicache.graph_passes.rewriting.compile import Compiled
from calicache.graph_passes.sampler.run_state import (
    Arrival,
    CallContext,
    RunState,
)

MAX_FORMS = 8


class OptimizedModel(DropIn):
    """The model under a plan: the same call, the same return type, fewer MACs.

    A call goes on with the one that it follows: at a later timestep, with the same prompt, and
    latents that have moved no farther than they do. Every other call begins a run, with a REFRESH,
    at whatever timestep it brings. So runs may be broken off, begin mid-way, and have guidance in
    calls of their own; `start_run` keeps several apart that go on at once. Timesteps that were not
    recorded get REFRESH steps where the plan has them. Of several recipes a run has the one with
    its timesteps. Calls of other sizes are captured when they come, with the same factors.
    Attributes that it does not have (config, dtype, ...) are those of the original model.

    Attributes:
        original: the model as it was.
        plan: what it runs under.
        strict: whether timesteps that were not recorded are refused.
        on_change: what happens at the start of a run where weights have changed, and to methods
            of the original that change them.
    """

    def __init__(
        self,
        original: nn.Module,
        plan: Plan,
        compiled: Compiled | None,
        *others: Compiled | None,
        strict: bool = False,
        on_change: OnChange = OnChange.REFUSE,
        max_forms: int = MAX_FORMS,
    ) -> None:
        super().__init__(original, plan, on_change)
        self.strict = strict
        self._recipes = Recipes(original, plan, (compiled, *others), max_forms)
        self.variants = self._recipes.modules()
        self._by_form: list[OptimizedModel] = []
        self._thread_run = ThreadRun()
        self.eval()

    @property
    def compiled(self) -> Compiled:
        """What is made of the model, for calls of the plan's own form.

        Raises:
            CalicacheError: whatever stage refuses names itself; the plan has several recipes.
        """
        return self._recipe().forms.own

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
        """Bytes that one run of the plan's own form keeps; the most under any recipe."""
        sets = (recipe.forms.own.variant_set for recipe in self._recipes.each)
        kept = (sum(cache.nbytes * cache.history for cache in one.caches) for one in sets)
        return self.plan.binding.calls * max(kept)

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
        """Keep what is for later steps; the model's own outputs."""
        return step.finish(outputs)

    def _flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FlatCall:
        call = flatten_call(self.original, args, kwargs)
        return call.arranged(self.plan.binding.signature)

    def _step(self, call: FlatCall) -> ModelCall:
        run, binding = self.state, self.plan.binding
        signature = call.signature()
        form = signature, next(iter(call.tensors.values())).device
        classes = binding.classes_of(signature)
        arrival = Arrival.of(call.tensors, classes, binding.timestep, form, run.context)
        follows = run.before(arrival, self._recipes.bindings)
        step = self._recipes.go_on(run, *follows, arrival, call) if follows else None
        if step is None:
            self._meet_changes()
            step = self._recipes.begin(run, arrival, call)
            run.make_room(arrival, binding.calls)
        self._check_recorded(step)
        return step

    def _meet_changes(self) -> None:
        """Refuse weights that have changed since, or make the factors of them."""
        refusal = None if self._recipes.whole else self._weights.refusal(self.original)
        if refusal is None:
            return
        if self.on_change is OnChange.REFUSE:
            raise refusal
        self.plan = self.plan.rebind(self.original)
        self._recipes.renew(self.plan)
        self._by_form, self._weights = [], WeightVersions.of(self.original)
        self.variants = self._recipes.modules()

    def _check_recorded(self, step: ModelCall) -> None:
        """Say once in a run that a step is none of the recorded ones, or refuse it."""
        if not step.derived:
            return
        if self.strict:
            raise self._recipes.not_recorded("timestep", "another")
        if step.before is None or not step.before.derived:
            warnings.warn(
                "These timesteps were not recorded. REFRESH steps come where the plan has them, "
                "and what was fitted is left out; the error was not measured. Record and plan "
                "with this sampler, or optimise with strict=True to refuse.",
                CalicacheWarning,
                stacklevel=2,
            )

    def start_run(
        self,
        run: RunState | None = None,
        *,
        timesteps: Iterable[SupportsFloat] | None = None,
    ) -> AbstractContextManager[RunState]:
        """A denoising of its own, for the calls of this thread or asyncio task inside `with`.

        Without it a thread has one denoising at a time.

        Args:
            run: to go on with one, as servers do that take steps of many runs in turn; a new
                one where None.
            timesteps: of the run, all of them, as the model gets them: the recipe with these is
                chosen at once, or else the one whose steps are nearest to them in length. Without
                them the first calls tell; where recipes begin alike, that may cost a full step.

        Raises:
            RunError: the timesteps were not recorded and the model is strict, or none of them is
                anywhere near the recorded ones.

        Examples:
            >>> with fast.start_run():
            ...     image = pipe(prompt).images[0]
        """
        run = RunState() if run is None else run
        if timesteps is not None:
            given = numbers("timesteps", timesteps, RunError)
            run.recipe = self._recipes.number_for(given, strict=self.strict)
        return binding_run(self, run)

    @contextmanager
    def cache_context(
        self,
        name: str,
        *,
        step_index: SupportsIndex | None = None,
        sigma: SupportsFloat | None = None,
        **_: Any,
    ) -> Iterator[None]:
        """Say which calls come next, as the pipelines of diffusers do.

        Args:
            name: such as `cond` or `uncond`: calls of a step are told apart by it.
            step_index: of the step, from 0. A call at the same or an earlier one begins anew;
                where no timestep counts the steps, this does.
            sigma: of the noise that is left. A call with more noise than before begins anew.

        Raises:
            RunError: an index that is no whole number from 0 on, or a sigma that is no number.
        """
        index = None if step_index is None else whole_number("step_index", step_index, RunError, 0)
        noise = None if sigma is None else number("sigma", sigma, RunError)
        run = self.state
        before, run.context = run.context, CallContext(name, index, noise)
        try:
            yield
        finally:
            run.context = before

    def for_grid(self, grid: int | Iterable[SupportsFloat]) -> OptimizedModel:
        """The optimised model under one recipe of the plan alone.

        Args:
            grid: its number of steps, or its timesteps.

        Raises:
            PlanError: the plan has no such recipe, or several.
        """
        recipe = self._recipes.each[self.plan.number_of(grid)]
        compiled = None if recipe.whole else recipe.forms.own
        return self._alike(recipe.plan, compiled)

    def for_call(self, *args: Any, **kwargs: Any) -> OptimizedModel:
        """The optimised model for calls like this one, which may have other sizes.

        Raises:
            RunError: the call differs from the plan's in more than sizes and constants.
            PlanError: the plan has several recipes.
        """
        return self._of(self._recipe().forms.for_call(self._flat(args, kwargs)))

    def by_step(self) -> OptimizedModel:
        """The optimised model for all calls of a step in one; this one where a step has one.

        Raises:
            PlanError: the plan has several recipes.
        """
        recipe = self._recipe()
        return self._of(recipe.forms.for_binding(recipe.plan.binding.by_step()))

    def _recipe(self) -> RecipeForms:
        """The only one."""
        self.plan.one("optimised model")
        return self._recipes.each[0]

    def _of(self, compiled: Compiled) -> OptimizedModel:
        """The same model and plan for calls of another form alone."""
        for model in (self, *self._by_form):
            if model.compiled is compiled:
                return model
        model = self._alike(replace(self.plan, binding=compiled.analysis.binding), compiled)
        self._by_form = [*self._by_form, model][-self._recipe().forms.limit :]
        return model

    def _alike(self, plan: Plan, compiled: Compiled | None) -> OptimizedModel:
        return OptimizedModel(
            self.original, plan, compiled, strict=self.strict, on_change=self.on_change
        )

    def reset(self) -> None:
        """Forget the running denoising: the next call begins a run."""
        self.state.restart()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizedModel:
        self._by_form = []
        self._recipes.forget()  # what is made again where the weights have gone
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._weights = WeightVersions.of(self.original)
        return self

    def _repr_html_(self) -> str:
        """What a notebook shows of the optimised model."""
        name = type(self.original).__name__
        graphs = (recipe.forms.own for recipe in self._recipes.each)
        return "".join(model_html(name, compiled) for compiled in graphs)
