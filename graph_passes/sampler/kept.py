"""What a step keeps for the steps after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from calicache.graph_passes.rewriting.variants import Variant, VariantSet
from calicache.graph_passes.settings.choices import StepMode

Kept = Mapping[str, tuple[Tensor, ...]]  # values by name of their cache, the newest first
Runner = Callable[[fx.GraphModule, Sequence[Tensor]], Sequence[Tensor]]


def keep_values(
    variant_set: VariantSet,
    variant: Variant,
    results: Sequence[Tensor],
    kept: Kept,
    tensors: Sequence[Tensor],
) -> Kept:
    """The kept values after a step.

    Args:
        variant_set: the variants, which say how many values are kept.
        variant: of the step, which says what it keeps.
        results: of the variant: the model's outputs, then what it keeps.
        kept: the values before.
        tensors: what went into the step. Values that share memory with these or with the
            model's outputs are copied: the caller may write to them.
    """
    if not variant.writes:
        return kept
    own = variant_set.outputs
    foreign = [value for value in (*tensors, *results[:own]) if isinstance(value, Tensor)]
    shared = {value.untyped_storage().data_ptr() for value in foreign}
    depths = {cache.name: cache.history for cache in variant_set.caches}
    after = dict(kept)
    for name, value in zip(variant.writes, results[own:], strict=True):
        fresh = value.clone() if value.untyped_storage().data_ptr() in shared else value
        after[name] = (fresh, *kept.get(name, ()))[: depths[name]]
    return after


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
    run: Runner = call_graph,
) -> tuple[Tensor, Kept]:
    """Run one variant: its first output, and the kept values after it.

    Args:
        variant_set: the variants, with the anchor weights to use.
        mode: that has a variant.
        kept: the values before.
        step: index in the run.
        tensors: of the recorded call.
        run: runs the variant's graph.
    """
    variant = variant_set.variants[mode]
    values = variant_set.read(variant.reads, kept, variant_set.weights_of(step), tensors[0].device)
    with torch.no_grad():
        results = run(variant.module, [*tensors, *values])
    return results[0], keep_values(variant_set, variant, results, kept, tensors)
