"""What one step reads of the refreshes before it, and what it leaves for the steps after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.settings.choices import StepMode

Kept = tuple[dict[str, Tensor], ...]


def run_step(
    variant_set: VariantSet,
    mode: StepMode,
    kept: Kept,
    step: int,
    tensors: Sequence[Tensor],
    history: int,
) -> tuple[Tensor, Kept]:
    """Run one variant: its first output, and the kept refreshes after it, `history` at most.

    Args:
        variant_set: the variants, with the anchor weights to use.
        mode: any but FORECAST.
        kept: cache values of the refreshes before, newest first.
        step: index in the run.
        tensors: of the recorded call.
        history: how many refreshes are kept.
    """
    variant = variant_set.variants[mode]
    values = variant_set.read(variant.reads, kept, step, tensors[0].device)
    with torch.no_grad():
        results = variant.module(*tensors, *values)
    if mode is StepMode.REFRESH:
        names = [cache.name for cache in variant_set.caches]
        fresh = dict(zip(names, results[variant_set.outputs :], strict=True))
        kept = (fresh, *kept)[:history]
    first = results[0]
    assert isinstance(first, Tensor)
    return first, kept
