"""A short denoising run over any model: a first-order sampler that knows its entry alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zoo.entry import ZooEntry

STEPS = 5


@dataclass(frozen=True, slots=True)
class DenoisingRun:
    """What a short run made.

    Attributes:
        outputs: the model's first output of every step.
        noise: the latent at the start.
        latents: the latent after the last step.
    """

    outputs: list[Tensor]
    noise: Tensor
    latents: Tensor


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
    return run_sampler(model, entry, batch, seed).outputs


def run_sampler(
    model: nn.Module, entry: ZooEntry, batch: int = 2, seed: int = 0, *, linear: bool = False
) -> DenoisingRun:
    """The run of `denoise`, with where it starts and ends.

    Args:
        model: the entry's, or what stands for it.
        entry: says what to feed.
        batch: samples.
        seed: of the inputs.
        linear: Euler's method: every step is one fixed number times the output, whose channels
            beyond the latent's are cut off. The numbers of `denoise` depend on the output.
    """
    torch.manual_seed(seed)
    arguments = dict(entry.inputs(batch))
    noise, direction = find_leaf(arguments, entry.latent), None
    first, last = entry.timesteps
    outputs: list[Tensor] = []
    size = 0.0
    for step in range(STEPS):
        now = first + (last - first) * step / (STEPS - 1)
        call = replace_leaf(arguments, entry.timestep, lambda t, now=now: torch.full_like(t, now))
        with torch.no_grad():
            result = model(**call)
        outputs.append(first_tensor(result))
        latent = find_leaf(arguments, entry.latent)
        if direction is None:
            direction = torch.randn(latent.shape)
        move = _fitting(outputs[-1], latent, cut=linear)
        move = direction if move is None else move
        if not (linear and step):
            size = 0.2 / float(move.std().clamp(min=1e-3))
        moved = latent - size * move
        arguments = replace_leaf(arguments, entry.latent, lambda _, moved=moved: moved)
    return DenoisingRun(outputs, noise, find_leaf(arguments, entry.latent))


def first_tensor(result: Any) -> Tensor:
    """The first tensor of what a model returns."""
    return next(value for value in pytree.tree_leaves(result) if isinstance(value, Tensor))


def _fitting(out: Tensor, latent: Tensor, *, cut: bool) -> Tensor | None:
    """The output in the latent's shape; None if it has another."""
    if cut and out.ndim == latent.ndim > 1:
        out = out[:, : latent.shape[1]]
    return out if out.shape == latent.shape else None


def find_leaf(arguments: Mapping[str, Any], name: str) -> Tensor:
    """The tensor of a dotted name, such as `x.0`."""
    leaf: Any = arguments
    for part in name.split("."):
        leaf = leaf[int(part)] if isinstance(leaf, list | tuple) else leaf[part]
    assert isinstance(leaf, Tensor)
    return leaf


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
