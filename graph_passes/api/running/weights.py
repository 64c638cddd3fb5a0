"""Whether a model still has the weights that it was optimised with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn

from torch import nn

from calicache.graph_passes.common.errors import RunError

AGAIN = (
    "Optimise the model again, with plan.rebind(model) where its weights have changed, or optimise "
    "with on_change='refactor'."
)


class OnChange(StrEnum):
    """What happens when the weights have changed since the model was optimised."""

    REFUSE = "refuse"
    REFACTOR = "refactor"


UNABLE = frozenset(
    {
        "add_adapter",
        "delete_adapters",
        "disable_adapters",
        "disable_lora",
        "enable_adapters",
        "enable_cache",
        "enable_gradient_checkpointing",
        "enable_layerwise_casting",
        "enable_lora",
        "fuse_lora",
        "fuse_qkv_projections",
        "load_attn_procs",
        "load_lora_adapter",
        "set_adapter",
        "set_adapters",
        "set_attention_backend",
        "set_attn_processor",
        "set_default_attn_processor",
        "unfuse_lora",
        "unfuse_qkv_projections",
        "unload_lora",
    }
)
"""Methods of diffusers' models that would change the original and not the graphs made of it."""


@dataclass(frozen=True, slots=True)
class WeightVersions:
    """Which parameters a model has, and how often each has been written to.

    A change through `.data` is not counted.
    """

    parameters: tuple[tuple[int, int], ...]

    @staticmethod
    def of(model: nn.Module) -> WeightVersions:
        """Those of a model now."""
        return WeightVersions(
            tuple(
                (id(value), 0 if value.is_inference() else value._version)
                for value in model.parameters()
            )
        )

    def refusal(self, model: nn.Module) -> RunError | None:
        """What to say of a model whose weights have changed since; None where they have not."""
        now = WeightVersions.of(model).parameters
        if now == self.parameters:
            return None
        names = [name for name, _ in model.named_parameters()]
        others = [n for n, mine in zip(names, now, strict=True) if mine not in self.parameters]
        return RunError(
            others[0] if others else "parameters",
            expected="the weights that the model was optimised with",
            got=f"{len(others)} others of {len(now)}",
            fix=AGAIN,
        )


def unable(name: str) -> Callable[..., NoReturn]:
    """What stands for a method that an optimised model cannot carry out."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RunError(
            f"{name}()",
            expected="calls that leave the model as it was optimised",
            got="one that changes it",
            fix=f"Call it on the original model (`.original`), then optimise that. {AGAIN}",
        )

    return refuse
