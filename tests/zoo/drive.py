"""A short denoising run over any model: a first-order sampler that knows its entry alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zoo.entry import ZooEntry

STEPS = 5


def make_model(entry: ZooEntry) -> nn.Module:
    """The entry's model with random values in every parameter, so that no gate is zero."""
    torch.manual_seed(0)
    model = entry.build()
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return model.eval().requires_grad_(False)


def denoise(model: nn.Module, entry: ZooEntry, batch: int = 2, seed: int = 0) -> list[Tensor]:
    """Call the model for `STEPS` steps; returns its first output of each.

    The latent takes a step along the output where the two have one shape, and along a fixed
    random direction otherwise.
    """
    torch.manual_seed(seed)
    arguments = dict(entry.inputs(batch))
    direction: Tensor | None = None
    first, last = entry.timesteps
    outputs: list[Tensor] = []
    for step in range(STEPS):
        now = first + (last - first) * step / (STEPS - 1)
        call = replace_leaf(arguments, entry.timestep, lambda t, now=now: torch.full_like(t, now))
        with torch.no_grad():
            result = model(**call)
        out = next(v for v in pytree.tree_leaves(result) if isinstance(v, Tensor))
        outputs.append(out)
        latent = find_leaf(arguments, entry.latent)
        if direction is None:
            direction = torch.randn(latent.shape)
        move = out if out.shape == latent.shape else direction
        moved = latent - 0.2 * move / move.std().clamp(min=1e-3)
        arguments = replace_leaf(arguments, entry.latent, lambda _, moved=moved: moved)
    return outputs


def find_leaf(arguments: Mapping[str, Any], name: str) -> Tensor:
    """The tensor of a dotted name, such as `x.0`."""
    found: Any = arguments
    for part in name.split("."):
        found = found[int(part)] if isinstance(found, list | tuple) else found[part]
    assert isinstance(found, Tensor)
    return found


def replace_leaf(arguments: Any, name: str, change: Any) -> Any:
    """The same nesting with one tensor changed."""
    if not name:
        return change(arguments)
    head, _, rest = name.partition(".")
    if isinstance(arguments, list | tuple):
        return [
            replace_leaf(value, rest, change) if index == int(head) else value
            for index, value in enumerate(arguments)
        ]
    return {
        key: replace_leaf(value, rest, change) if key == head else value
        for key, value in arguments.items()
    }
