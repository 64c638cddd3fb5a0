"""Weights that accelerate brings when they are used: their parameters are empty in between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_offloaded(model: nn.Module) -> bool:
    """Whether hooks of accelerate keep weights of a model elsewhere, on the CPU or a disk."""
    return any(_weights_map(module) is not None for module in model.modules())


def lacks_weights(model: nn.Module) -> bool:
    """Whether a model is on the meta device, and nothing brings its weights."""
    empty = any(parameter.is_meta for parameter in model.parameters())
    return empty and not is_offloaded(model)


def stored(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """A parameter of a model with its values; as it is where they are nowhere.

    Args:
        model: whose hooks are asked.
        name: of the parameter, dotted.
        value: what the model has of that name.
    """
    if not value.is_meta:
        return value
    parts = name.split(".")
    for place in reversed(range(len(parts))):  # the hook of a module may be for all in it
        weights = _weights_map(model.get_submodule(".".join(parts[:place])))
        try:
            if weights is not None:
                return weights[".".join(parts[place:])]
        except KeyError:
            continue
    return value


def input_device(model: nn.Module) -> torch.device:
    """Where the inputs of a call belong: where the first of its layers runs."""
    for module in model.modules():
        for hook in _hooks(module):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _weights_map(module: nn.Module) -> Mapping[str, Tensor] | None:
    """The weights of a module that is offloaded, by their names in it."""
    for hook in _hooks(module):
        weights: Mapping[str, Tensor] | None = getattr(hook, "weights_map", None)
        if weights is not None and getattr(hook, "offload", False):
            return weights
    return None


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks that accelerate has put on a module, which keep several in one."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
