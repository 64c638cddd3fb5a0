"""Whether a model is still what it was optimised as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """What a graph of a model is made of: its parameters, and the settings of its modules.

    A change of a parameter through `.data` is not counted.

    Attributes:
        parameters: each by its identity, and how often it has been written to.
        settings: of every module by name, a digest of its numbers, texts, and lists of such: the
            scale of an adapter, or whether it is switched off. Training mode is none.
    """

    parameters: tuple[tuple[int, int], ...]
    settings: Mapping[str, int]

    @staticmethod
    def of(model: nn.Module) -> WeightVersions:
        """Those of a model now."""
        parameters = tuple(
            (id(value), 0 if value.is_inference() else value._version)
            for value in model.parameters()
        )
        settings = {name: hash(_settings(module)) for name, module in model.named_modules()}
        return WeightVersions(parameters, settings)

    def refusal(self, model: nn.Module) -> RunError | None:
        """What to say of a model that has changed since; None where it has not."""
        now = WeightVersions.of(model)
        if now.parameters != self.parameters:
            named = zip(model.named_parameters(), now.parameters, strict=True)
            others = [name for (name, _), mine in named if mine not in self.parameters]
            return RunError(
                others[0] if others else "parameters",
                expected="the weights that the model was optimised with",
                got=f"{len(others)} others of {len(now.parameters)}",
                fix=AGAIN,
            )
        changed = [n for n, digest in now.settings.items() if digest != self.settings.get(n)]
        if not changed:
            return None
        return RunError(
            changed[0] or "model",
            expected="the settings that the model was optimised with",
            got=f"others in {len(changed)} of {len(now.settings)} modules",
            fix=AGAIN,
        )


_OWN = frozenset(vars(nn.Module()))  # hooks, tables, and whether it is in training mode


def _settings(module: nn.Module) -> str:
    """The plain attributes of a module as text."""
    named = vars(module).items()
    return repr([pair for pair in named if pair[0] not in _OWN and _is_plain(pair[1])])


def _is_plain(value: object) -> bool:
    """Whether it is a number, a text, or a list, tuple, set or dict of such."""
    if type(value) is dict:
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if type(value) in (list, tuple, set):
        return all(map(_is_plain, value))  # type: ignore[call-overload]
    return value is None or type(value) in (bool, int, float, str)


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
