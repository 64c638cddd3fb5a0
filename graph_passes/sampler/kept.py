"""What a step keeps of its REFRESH for the steps after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.settings.choices import StepMode

Kept = tuple[dict[str, Tensor], ...]  # cache values by cache name, the newest refresh first
Runner = Callable[[fx.GraphModule, Sequence[Tensor]], Sequence[Tensor]]


def keep_refresh(
    variant_set: VariantSet,
    results: Sequence[Tensor],
    kept: Kept,
    history: int,
    tensors: Sequence[Tensor],
) -> Kept:
    """The kept refreshes after a REFRESH step.

    Args:
        variant_set: the variants, which say what is kept.
        results: of the REFRESH variant: the model's outputs, then all caches.
        kept: the refreshes before.
        history: how many are kept at the most.
        tensors: what went into the step. Caches that share memory with these or with the
            model's outputs are copied: the caller may write to them.
    """
    own = variant_set.outputs
    foreign = [value for value in (*tensors, *results[:own]) if isinstance(value, Tensor)]
    shared = {value.untyped_storage().data_ptr() for value in foreign}
    fresh = {
        cache.name: value.clone() if value.untyped_storage().data_ptr() in shared else value
        for cache, value in zip(variant_set.caches, results[own:], strict=True)
    }
    older = [
        {c.name: values[c.name] for c in variant_set.caches if back < c.history}
        for back, values in enumerate(kept[: history - 1], start=1)
    ]
    return (fresh, *older)


def call_graph(module: fx.GraphModule, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """What a graph returns."""
    results: Sequence[Tensor] = module(*tensors)
    return results


def run_step(
    variant_set: VariantSet,
    mode: StepMode,
    kept: Kept,
    step: int,
    tensors: Sequence[Tensor],
    history: int,
    run: Runner = call_graph,
) -> tuple[Tensor, Kept]:
    """Run one variant: its first output, and the kept refreshes after it.

    Args:
        variant_set: the variants, with the anchor weights to use.
        mode: that has a variant.
        kept: the refreshes before.
        step: index in the run.
        tensors: of the recorded call.
        history: how many refreshes are kept at the most.
        run: runs the variant's graph.
    """
    variant = variant_set.variants[mode]
    values = variant_set.read(variant.reads, kept, variant_set.weights_of(step), tensors[0].device)
    with torch.no_grad():
        results = run(variant.module, [*tensors, *values])
    if mode is StepMode.REFRESH:
        kept = keep_refresh(variant_set, results, kept, history, tensors)
    return results[0], kept
