"""Prompts of the zoo's video and audio models: embeddings and their masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Inputs = Mapping[str, Any]
TEXT = 6


def prompt(batch: int, width: int = 16) -> Tensor:
    return torch.randn(batch, TEXT, width)


def prompt_mask(batch: int, dtype: torch.dtype, length: int = TEXT) -> Tensor:
    """A prompt mask: two tokens of padding in every other prompt, from the first on."""
    kept = torch.tensor([length - 2 if row % 2 == 0 else length for row in range(batch)])
    return (torch.arange(length) < kept[:, None]).to(dtype)
