"""What a running denoising keeps: its place in the run, and the values of the last refreshes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.settings.choices import StepMode

Kept = tuple[dict[str, Tensor], ...]  # cache values by cache name, the newest refresh first
Runner = Callable[[fx.GraphModule, Sequence[Tensor]], Sequence[Tensor]]


@dataclass(slots=True)
class RunState:
    """All that a running denoising changes.

    Attributes:
        calls: of the model in a step.
        step: index of the next step.
        call: which of the step's calls comes next.
        timestep: of the last call; None before the first.
        kept: what each call of a step keeps.
        start: index of the step that the run began with, which is a REFRESH.
    """

    calls: int = 1
    step: int = 0
    call: int = 0
    timestep: float | None = None
    kept: list[Kept] = field(default_factory=list)
    start: int = 0

    def __post_init__(self) -> None:
        self.kept = [()] * self.calls

    def restart(self, start: int = 0) -> None:
        """Forget the running denoising: the next call is the first of this step."""
        self.start, self.step, self.call, self.timestep = start, start, 0, None
        self.kept = [()] * self.calls

    def advance(self) -> None:
        """Count a call."""
        self.call = (self.call + 1) % self.calls
        self.step += self.call == 0


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
    values = variant_set.read(variant.reads, kept, step, tensors[0].device)
    with torch.no_grad():
        results = run(variant.module, [*tensors, *values])
    if mode is StepMode.REFRESH:
        kept = keep_refresh(variant_set, results, kept, history, tensors)
    return results[0], kept
