"""What is sped up: the transformers of a pipeline, or a model by itself; and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.common.errors import PlanError

PARTS = ("transformer", "transformer_2")
MODEL = "model"  # name of the only part where a model was given
Request = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Subject:
    """A pipeline or a model.

    Attributes:
        owner: what was given.
        plain: its models as they were before anything was optimised, by name.
    """

    owner: Any
    plain: Mapping[str, nn.Module]

    @staticmethod
    def of(owner: Any) -> Subject:
        """Look for the transformers of a pipeline; a module is taken for the model itself.

        Raises:
            PlanError: there is none.
        """
        if isinstance(owner, nn.Module):
            return Subject(owner, {MODEL: _original(owner)})
        values = {name: getattr(owner, name, None) for name in PARTS}
        plain = {n: _original(value) for n, value in values.items() if isinstance(value, nn.Module)}
        if not plain:
            raise PlanError(
                "pipe",
                expected="a pipeline with a transformer, or a model",
                got=f"a value of the class {type(owner).__name__}",
                fix="Give the denoising model itself, with a function that samples with it.",
            )
        return Subject(owner, plain)

    @property
    def is_pipeline(self) -> bool:
        """Whether models are put in the place of others."""
        return MODEL not in self.plain

    @property
    def scheduler(self) -> Any:
        """The pipeline's, or None."""
        return getattr(self.owner, "scheduler", None) if self.is_pipeline else None

    def place(self, models: Mapping[str, nn.Module]) -> None:
        """Put models in their places; all of them, or none where one cannot be."""
        before = {name: getattr(self.owner, name) for name in models}
        try:
            for name, model in models.items():
                setattr(self.owner, name, model)
        except BaseException:
            for name, model in before.items():
                setattr(self.owner, name, model)
            raise

    def run(self, request: Request, models: Mapping[str, nn.Module], seed: int) -> Run:
        """Sample once with some models, and leave the pipeline as it was.

        Args:
            request: takes the pipeline or the model.
            models: by name.
            seed: of torch's random numbers, which are set back afterwards.
        """
        run = Run()
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_seeded(models, seed))
            for name, model in models.items():
                hook = model.register_forward_pre_hook(run.called(name), with_kwargs=True)
                stack.callback(hook.remove)
            if not self.is_pipeline:
                run.ended(request(models[MODEL]))
                return run
            stack.enter_context(self._in_place(models))
            stack.enter_context(_watched(self.scheduler, run))
            request(self.owner)
        return run

    @contextmanager
    def _in_place(self, models: Mapping[str, nn.Module]) -> Iterator[None]:
        before = {name: getattr(self.owner, name) for name in models}
        moved = {name: model for name, model in models.items() if before[name] is not model}
        self.place(moved)
        try:
            yield
        finally:
            self.place({name: before[name] for name in moved})


@dataclass(slots=True)
class Run:
    """What is seen of one sampling run.

    Attributes:
        latents: after the last step of every model, by name; none where nothing shows them.
        last: the model that was called last.
        first: tensors of the first call of any model.
    """

    latents: dict[str, Tensor] = field(default_factory=dict)
    last: str = ""
    first: list[Tensor] = field(default_factory=list)

    def called(self, name: str) -> Callable[..., None]:
        """A hook for the calls of a model."""

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.last:
                values = (*args, *kwargs.values())
                self.first = [value.clone() for value in values if isinstance(value, Tensor)]
            self.last = name

        return note

    def ended(self, latents: Any) -> None:
        """Keep what came of the newest call."""
        if self.last and isinstance(latents, Tensor):
            self.latents[self.last] = latents.detach()

    @property
    def final(self) -> Tensor | None:
        """What came of the whole run."""
        return self.latents.get(self.last)


def restore(pipe: Any) -> None:
    """Put the plain transformers of a pipeline back in their places: the same objects.

    A pipeline that holds no optimised one is left alone.
    """
    for name in PARTS:
        model = getattr(pipe, name, None)
        if isinstance(model, OptimizedModel):
            setattr(pipe, name, model.original)


def _original(model: nn.Module) -> nn.Module:
    return model.original if isinstance(model, OptimizedModel) else model


@contextmanager
def _seeded(models: Mapping[str, nn.Module], seed: int) -> Iterator[None]:
    devices = {p.device for model in models.values() for p in model.parameters()}
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _watched(scheduler: Any, run: Run) -> Iterator[None]:
    """Keep the latents that a scheduler makes; it is left as it was."""
    step = getattr(scheduler, "step", None)
    if not callable(step):
        yield
        return

    @wraps(step)  # pipelines look at its arguments
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        run.ended(result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None))
        return result

    own = vars(scheduler).get("step")
    scheduler.step = watched
    try:
        yield
    finally:
        if own is None:
            del scheduler.step
        else:
            scheduler.step = own
