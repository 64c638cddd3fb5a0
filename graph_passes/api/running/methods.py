"""Methods of an original model that would change it behind the graphs that are made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from calicache.graph_passes.common.errors import RunError

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

FOLLOWED = UNABLE - {
    "enable_cache",
    "enable_gradient_checkpointing",
    "enable_layerwise_casting",
    "load_attn_procs",
    "set_attention_backend",
    "set_attn_processor",
    "set_default_attn_processor",
}
"""Those whose change is met when the next run begins, as parameters or settings are others."""


def unable(model: nn.Module, name: str) -> Callable[..., None]:
    """What stands for a method in `UNABLE`: a refusal, where there is something to change.

    Args:
        model: the original.
        name: of the method.
    """

    def refuse(*_: Any, **__: Any) -> None:
        if name in _IDLE and _IDLE[name](model):
            return
        ways = ["Call it on the original model (`.original`), then optimise that"]
        ways += ["optimise with on_change='refactor'"] * (name in FOLLOWED)
        raise RunError(
            f"{name}()",
            expected="calls that leave the model as it was optimised",
            got="one that changes it",
            fix=f"{', or '.join(ways)}.",
        )

    return refuse


def _has_default_attention(model: Any) -> bool:
    """Whether the processors of attention are the default ones, in one implementation or another.

    Asked for by setting them, as diffusers names them nowhere; those of before come back.
    """
    before = model.attn_processors
    model.set_default_attn_processor()
    default = {name: _kind(value) for name, value in model.attn_processors.items()}
    model.set_attn_processor(dict(before))  # which empties what it is given
    return default == {name: _kind(value) for name, value in before.items()}


def _kind(processor: object) -> str:
    """Its class; `AttnProcessor2_0` computes what `AttnProcessor` does, in another way."""
    return type(processor).__name__.removesuffix("2_0")


def _has_no_adapter(model: nn.Module) -> bool:
    return not getattr(model, "peft_config", None)


_IDLE: Mapping[str, Callable[[nn.Module], bool]] = {
    "set_default_attn_processor": _has_default_attention,
    "unload_lora": _has_no_adapter,
}
"""When a method in `UNABLE` has nothing to change: pipelines call these in any case."""
