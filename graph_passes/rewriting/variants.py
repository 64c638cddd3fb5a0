"""The variants of a model, one for every step mode, and the caches that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from calicache.graph_passes.rewriting.insertion import (
    ANCHOR_WEIGHT,
    OUTPUT_WEIGHT,
    CacheSlot,
    slot_name,
    weight_name,
)
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.schedule import Row, Table


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """One value that steps keep for those after them.

    Attributes:
        name: of the placeholder that takes its newest value, such as `cache_linear_4`.
        node: whose value it is in the plain graph; x for a folded cache, which is A x.
        folded: the target whose A is applied, or None.
        shape, dtype: of the cached value.
        history: how many values of it are kept.
        is_output: whether it is an output of the model; CALIBRATE steps keep theirs as well.
    """

    name: str
    node: str
    folded: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    history: int = 1
    is_output: bool = False

    @property
    def nbytes(self) -> int:
        """Size of one kept value in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Variant:
    """The graph of one mode.

    Attributes:
        mode: what the step does.
        module: takes the model's tensors, then what `reads` names; returns the model's flat
            outputs, then what it keeps.
        reads: cache slots and weights of the step, in the order of the placeholders.
        slots: the cache slots among these, by name.
        inserted: names of the nodes that the plain graph does not have.
        writes: names of the caches that the step keeps a value of: all of them in REFRESH, the
            model's outputs in CALIBRATE.
    """

    mode: StepMode
    module: fx.GraphModule
    reads: tuple[str, ...]
    slots: Mapping[str, CacheSlot]
    inserted: tuple[str, ...]
    writes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VariantSet:
    """All variants of one model and the caches they share.

    Attributes:
        variants: by mode; REFRESH is always there.
        caches: in the order of REFRESH's extra outputs.
        history: the most values that are kept of any cache.
        tables: the weights that the variants read, by name, each one number a step.
        outputs: how many flat outputs the model itself has.
    """

    variants: Mapping[StepMode, Variant]
    caches: tuple[CacheSpec, ...]
    history: int
    tables: Mapping[str, tuple[float, ...]]
    outputs: int

    def slots(self) -> dict[str, tuple[CacheSpec, int]]:
        """Every kept value by name: its cache, and how many values back it is."""
        return {
            slot_name(cache.name, back): (cache, back)
            for back in range(self.history)
            for cache in self.caches
            if back < cache.history
        }

    def scheduled(self, anchors: Table) -> VariantSet:
        """The same variants with anchors for another schedule.

        Args:
            anchors: (T, K or fewer).
        """
        fresh = table_columns(ANCHOR_WEIGHT, [self._padded(row) for row in anchors])
        tables = {name: fresh.get(name, table) for name, table in self.tables.items()}
        return replace(self, tables=tables)

    def weights_of(self, step: int) -> dict[str, float]:
        """The weights of a step, by the name under which variants read them."""
        return {name: table[step] for name, table in self.tables.items()}

    def named_weights(self, anchors: Row, outputs: Row | None) -> dict[str, float]:
        """Weights from elsewhere by the name under which variants read them.

        Args:
            anchors: (K or fewer).
            outputs: (K + 2), or None where the variants read none.
        """
        rows = {ANCHOR_WEIGHT: self._padded(anchors), OUTPUT_WEIGHT: outputs or ()}
        return {weight_name(n, k): w for n, row in rows.items() for k, w in enumerate(row)}

    def _padded(self, row: Row) -> Row:
        return (*row, *(0.0,) * (self.history - len(row)))

    def read(
        self,
        reads: Sequence[str],
        kept: Mapping[str, Sequence[Tensor]],
        weights: Mapping[str, float],
        device: torch.device,
    ) -> list[Tensor]:
        """What a variant reads at a step: weights, and kept values.

        A value that has not been yet has weight 0; the newest one (or zeros) stands for it.

        Args:
            reads: names, in order.
            kept: values by name of their cache, newest first.
            weights: by name.
            device: of the tensors that are made here.
        """
        slots = self.slots()
        values = []
        for name in reads:
            if name in weights:
                values.append(torch.tensor(weights[name], device=device))
                continue
            cache, back = slots[name]
            own = kept.get(cache.name, ())
            if own:
                values.append(own[back if back < len(own) else 0])
            else:
                values.append(torch.zeros(cache.shape, dtype=cache.dtype, device=device))
        return values


def table_columns(name: str, table: Sequence[Row]) -> dict[str, tuple[float, ...]]:
    """The weights of a table (T, K) by the name under which variants read them, (T,) each."""
    return {weight_name(name, k): column for k, column in enumerate(zip(*table, strict=True))}
