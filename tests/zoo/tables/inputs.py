"""What a sampler feeds to a model: constants, and functions from the size of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.tables.sizes import TEXT

OfBatch = Callable[[int], Any]


def call(**inputs: Any) -> dict[str, Any]:
    """Inputs of a model that is asked for a tuple."""
    return {**inputs, "return_dict": False}


def at_batch(value: Any, batch: int) -> Any:
    """The inputs of a batch: every function in a nesting of them is called."""
    if callable(value):
        return value(batch)
    if isinstance(value, Mapping):
        return {name: at_batch(part, batch) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(at_batch(part, batch) for part in value)
    return value


def normal(*shape: int) -> OfBatch:
    """Standard normal numbers, samples first."""
    return lambda batch: torch.randn(batch, *shape)


def listed(*shape: int) -> OfBatch:
    """Standard normal numbers, a tensor for each sample."""
    return lambda batch: [torch.randn(shape) for _ in range(batch)]


def integers(limit: int, *shape: int) -> OfBatch:
    """Random integers from 0 on, samples first."""
    return lambda batch: torch.randint(limit, (batch, *shape))


def filled(value: float, *shape: int) -> OfBatch:
    """One number, samples first; its kind says the dtype."""
    return lambda batch: torch.full((batch, *shape), value)


def repeated(row: Tensor | Sequence[float]) -> OfBatch:
    """The same for each sample."""
    values = torch.as_tensor(row)
    return lambda batch: values.repeat(batch, *[1] * values.ndim)


def prompt(width: int = 16) -> OfBatch:
    """Embeddings of a prompt."""
    return normal(TEXT, width)


def last_padded(dtype: torch.dtype = torch.int64, length: int = TEXT) -> OfBatch:
    """A mask of prompts whose last token is padding."""
    mask = torch.ones(length, dtype=dtype)
    mask[-1] = 0
    return repeated(mask)


def some_padded(dtype: torch.dtype = torch.int64, length: int = TEXT) -> OfBatch:
    """A mask of prompts: two tokens of padding in every other one, from the first on."""

    def mask(batch: int) -> Tensor:
        tokens = torch.tensor([length - 2 * (row % 2 == 0) for row in range(batch)])
        return (torch.arange(length) < tokens[:, None]).to(dtype)

    return mask
