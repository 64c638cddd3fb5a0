"""What makes an optimised model pass for the original: class, attributes, saving, copies."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from torch import nn

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.running.methods import FOLLOWED, UNABLE, unable
from calicache.graph_passes.api.running.weights import OnChange, WeightVersions
from calicache.graph_passes.common.errors import CalicacheWarning

# In the folder of a model that was saved with its plan. All names there need a dot: diffusers looks
# behind it for a variant of the weights, such as `fp16`.
PLAN_FOLDER = "calicache.plan"


class DropIn(nn.Module):
    """A module that stands in the place of another one.

    Args:
        original: the model as it was.
        plan: what it runs under.
        on_change: what happens where the original changes, through methods of its own too.
    """

    def __init__(self, original: nn.Module, plan: Plan, on_change: OnChange) -> None:
        super().__init__()
        self.original = original
        # Where diffusers looks the class of a part of a pipeline up, to save it.
        self.__module__ = type(original).__module__
        self.plan, self.on_change = plan, on_change
        self._weights = WeightVersions.of(original)

    def train(self, mode: bool = True) -> Self:
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
        return type(self) if original is None else type(original)

    @property
    def save_pretrained(self) -> Callable[..., None]:
        """Save the original as it saves itself, and the plan in a folder of it, `calicache.plan`.

        So a pipeline's own `save_pretrained` keeps both; what loads the folder gets the original.
        It has the signature of the original's, where pipelines look up what they may ask for.

        Raises:
            AttributeError: the original has no such method.
            CalicacheError: the plan cannot be written.
        """
        save: Callable[..., Any] = self.original.save_pretrained  # type: ignore[assignment]

        @functools.wraps(save)
        def save_with_plan(path: Path | str, *args: Any, **options: Any) -> None:
            save(path, *args, **options)
            self.plan.save(Path(path) / PLAN_FOLDER)

        return save_with_plan

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """The original's: by its names, and without what is made of it.

        A module around this one, which asks with a destination, gets all that is in here.
        """
        if args or "destination" in options:
            return super().state_dict(*args, **options)
        return self.original.state_dict(**options)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Load the original's weights; that they have changed is met when the next run begins."""
        return self.original.load_state_dict(state_dict, *args, **options)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (type(self),), self.__dict__.copy()  # pickle's own way asks for __class__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._weights = WeightVersions.of(self.original)  # a copy has parameters of its own

    def __repr__(self) -> str:
        lines = self.plan.describe().splitlines()
        name = type(self.original).__name__
        return "\n  ".join((f"{name} optimised by calicache", *lines))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original":
                raise
            value = getattr(self.original, name)
            followed = name in FOLLOWED and self.on_change is OnChange.REFACTOR
            return value if followed or name not in UNABLE else unable(self.original, name)


def _empty(kind: type[DropIn]) -> DropIn:
    return kind.__new__(kind)
