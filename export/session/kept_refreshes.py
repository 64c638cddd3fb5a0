"""Where a session keeps the values of the last REFRESH steps, on the provider's device.

Both classes count refreshes from the start of a run. A refresh that has not been yet has
weight 0 wherever it is read: the newest one is read in its place, or zeros before the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from calicache.export.artifact.manifest import Layout, Manifest
from calicache.export.session.runtime import OrtValue, onnx_runtime
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.rewriting.insertion import slot_name
from calicache.graph_passes.settings.choices import StepMode


class KeptRefreshes(Protocol):
    """The kept values of one running denoising.

    Attributes:
        count: REFRESH steps of this run so far.
        depths: how many refreshes of each cache are kept at the most.
    """

    count: int
    depths: Mapping[str, int]

    def start(self) -> None:
        """Forget the run before."""

    def read(self, cache: TensorSpec, back: int) -> OrtValue:
        """The value of a cache `back` refreshes before the newest."""

    def buffer(self, cache: TensorSpec) -> OrtValue | None:
        """Where the coming REFRESH writes a cache; None where ONNX Runtime allocates it."""

    def keep(self, fresh: Mapping[str, OrtValue]) -> None:
        """Take over what a REFRESH wrote, by cache name."""


class MovingRefreshes:
    """New values at every REFRESH: for `If`, whose outputs cannot be bound beforehand."""

    def __init__(
        self, caches: Sequence[TensorSpec], history: int, slots: frozenset[str], device: str
    ) -> None:
        self.count = 0
        self.depths: Mapping[str, int] = {
            cache.name: _depth(cache, slots, history) for cache in caches
        }
        self._device = device
        self._kept: dict[str, list[OrtValue]] = {}
        self._zeros: dict[str, OrtValue] = {}

    def start(self) -> None:
        """Forget the run before."""
        self.count, self._kept = 0, {}

    def read(self, cache: TensorSpec, back: int) -> OrtValue:
        """The value of a cache `back` refreshes before the newest."""
        if not self.count:
            if cache.name not in self._zeros:
                self._zeros[cache.name] = zeros(cache, self._device)
            return self._zeros[cache.name]
        kept = self._kept[cache.name]
        return kept[back if back < len(kept) else 0]

    def buffer(self, cache: TensorSpec) -> None:
        """ONNX Runtime allocates all."""

    def keep(self, fresh: Mapping[str, OrtValue]) -> None:
        """Take over what a REFRESH wrote, by cache name."""
        for name, value in fresh.items():
            self._kept[name] = [value, *self._kept.get(name, [])][: self.depths[name]]
        self.count, self._zeros = self.count + 1, {}


class FixedRefreshes:
    """A ring of buffers for every cache, written in turn: the addresses stay the same.

    The buffers are those that ONNX Runtime allocated in the first round. A ring has one more than
    are read where REFRESH itself reads the oldest: it may not write what it reads.
    """

    def __init__(
        self,
        caches: Sequence[TensorSpec],
        history: int,
        slots: frozenset[str],
        refresh_reads: frozenset[str],
        device: str,
    ) -> None:
        self.count = 0
        self._device = device
        self.depths: Mapping[str, int] = {
            cache.name: _depth(cache, slots, history) for cache in caches
        }
        self._sizes = {
            name: depth + (slot_name(name, depth - 1) in refresh_reads)
            for name, depth in self.depths.items()
        }
        self._rings: dict[str, list[OrtValue]] = {cache.name: [] for cache in caches}
        self._zeros: dict[str, OrtValue] = {}

    def start(self) -> None:
        """Forget the run before; its buffers are written again."""
        self.count = 0

    def read(self, cache: TensorSpec, back: int) -> OrtValue:
        """The value of a cache `back` refreshes before the newest."""
        if not self.count:
            if cache.name not in self._zeros:
                self._zeros[cache.name] = zeros(cache, self._device)
            return self._zeros[cache.name]
        newest = self.count - 1
        return self._at(cache.name, newest - back if back <= newest else newest)

    def buffer(self, cache: TensorSpec) -> OrtValue | None:
        """The next one of the ring; None in the first round."""
        ring, place = self._rings[cache.name], self.count % self._sizes[cache.name]
        return ring[place] if place < len(ring) else None

    def keep(self, fresh: Mapping[str, OrtValue]) -> None:
        """Take over what a REFRESH wrote, by cache name."""
        for name, value in fresh.items():
            if self.count % self._sizes[name] == len(self._rings[name]):
                self._rings[name].append(value)
        self.count += 1

    def _at(self, name: str, refresh: int) -> OrtValue:
        return self._rings[name][refresh % self._sizes[name]]


def no_refreshes(manifest: Manifest, device: str) -> KeptRefreshes:
    """An empty store for one call of a step, with fixed addresses where the layout allows it."""
    slots = frozenset(name for record in manifest.modes for name in record.reads)
    if manifest.layout is not Layout.PAIR:
        return MovingRefreshes(manifest.caches, manifest.history, slots, device)
    reads = frozenset(manifest.mode(StepMode.REFRESH).reads)
    return FixedRefreshes(manifest.caches, manifest.history, slots, reads, device)


def zeros(cache: TensorSpec, device: str) -> OrtValue:
    """A value for a cache that is never really read."""
    return onnx_runtime().OrtValue.ortvalue_from_numpy(np.zeros(cache.shape, cache.dtype), device)


def _depth(cache: TensorSpec, slots: frozenset[str], history: int) -> int:
    """How many refreshes of a cache are kept: as many as some mode reads, one at the least."""
    read = (back for back in range(history) if slot_name(cache.name, back) in slots)
    return max(read, default=0) + 1
