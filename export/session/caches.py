"""Where a session keeps the newest values of every cache, on the provider's device.

Both classes count a cache's values from the start of a run. A value that has not been yet has
weight 0 wherever it is read: the newest one is read in its place, or zeros before the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from calicache.export.artifact.manifest import Layout, Manifest, ModeRecord
from calicache.export.session.runtime import OrtValue, onnx_runtime
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.rewriting.insertion import slot_name


class Caches(Protocol):
    """The caches of one running denoising.

    Attributes:
        counts: values of each cache that this run has had so far, by its name.
        depths: how many of them are kept at the most.
    """

    counts: dict[str, int]
    depths: Mapping[str, int]

    def start(self) -> None:
        """Forget the run before."""

    def read(self, cache: TensorSpec, back: int) -> OrtValue:
        """The value of a cache `back` values before the newest."""

    def buffer(self, name: str) -> OrtValue | None:
        """Where the coming step writes a cache; None where ONNX Runtime allocates it."""

    def keep(self, fresh: Mapping[str, OrtValue]) -> None:
        """Take over what a step wrote, by cache name."""


class MovingCaches:
    """New values from every step that keeps one.

    For `If`, whose outputs cannot be bound beforehand.
    """

    def __init__(
        self, caches: Sequence[TensorSpec], history: int, slots: frozenset[str], device: str
    ) -> None:
        self.depths: Mapping[str, int] = {
            cache.name: _depth(cache, slots, history) for cache in caches
        }
        self.counts = dict.fromkeys(self.depths, 0)
        self._device = device
        self._kept: dict[str, list[OrtValue]] = {}
        self._zeros: dict[str, OrtValue] = {}

    def start(self) -> None:
        """Forget the run before."""
        self.counts, self._kept = dict.fromkeys(self.depths, 0), {}

    def read(self, cache: TensorSpec, back: int) -> OrtValue:
        """The value of a cache `back` values before the newest."""
        kept = self._kept.get(cache.name)
        if not kept:
            if cache.name not in self._zeros:
                self._zeros[cache.name] = zeros(cache, self._device)
            return self._zeros[cache.name]
        return kept[back if back < len(kept) else 0]

    def buffer(self, name: str) -> None:
        """ONNX Runtime allocates all."""

    def keep(self, fresh: Mapping[str, OrtValue]) -> None:
        """Take over what a step wrote, by cache name."""
        for name, value in fresh.items():
            self._kept[name] = [value, *self._kept.get(name, [])][: self.depths[name]]
            self.counts[name] += 1
            self._zeros.pop(name, None)


class FixedCaches:
    """A ring of buffers for every cache, written in turn: the addresses stay the same.

    The buffers are those that ONNX Runtime allocated in the first round. A ring has one more than
    are read where a step that writes it also reads the oldest: it may not write what it reads.
    """

    def __init__(
        self,
        caches: Sequence[TensorSpec],
        history: int,
        slots: frozenset[str],
        writer_reads: frozenset[str],
        device: str,
    ) -> None:
        self._device = device
        self.depths: Mapping[str, int] = {
            cache.name: _depth(cache, slots, history) for cache in caches
        }
        self._sizes = {
            name: depth + (slot_name(name, depth - 1) in writer_reads)
            for name, depth in self.depths.items()
        }
        self._rings: dict[str, list[OrtValue]] = {cache.name: [] for cache in caches}
        self.counts = dict.fromkeys(self._rings, 0)
        self._zeros: dict[str, OrtValue] = {}

    def start(self) -> None:
        """Forget the run before; its buffers are written again."""
        self.counts = dict.fromkeys(self._rings, 0)

    def read(self, cache: TensorSpec, back: int) -> OrtValue:
        """The value of a cache `back` values before the newest."""
        newest = self.counts[cache.name] - 1
        if newest < 0:
            if cache.name not in self._zeros:
                self._zeros[cache.name] = zeros(cache, self._device)
            return self._zeros[cache.name]
        place = newest - back if back <= newest else newest
        return self._rings[cache.name][place % self._sizes[cache.name]]

    def buffer(self, name: str) -> OrtValue | None:
        """The next one of the ring; None in the first round."""
        ring, place = self._rings[name], self.counts[name] % self._sizes[name]
        return ring[place] if place < len(ring) else None

    def keep(self, fresh: Mapping[str, OrtValue]) -> None:
        """Take over what a step wrote, by cache name."""
        for name, value in fresh.items():
            if self.counts[name] % self._sizes[name] == len(self._rings[name]):
                self._rings[name].append(value)
            self.counts[name] += 1


def empty_caches(manifest: Manifest, device: str) -> Caches:
    """Those of one call of a step before a run, with fixed addresses where the layout allows it."""
    slots = frozenset(name for record in manifest.modes for name in record.reads)
    if manifest.layout is not Layout.PAIR:
        return MovingCaches(manifest.caches, manifest.history, slots, device)
    reads = frozenset(slot for record in manifest.modes for slot in _renewed(record, manifest))
    return FixedCaches(manifest.caches, manifest.history, slots, reads, device)


def _renewed(record: ModeRecord, manifest: Manifest) -> set[str]:
    """What a mode reads of the caches that it writes."""
    history = range(manifest.history)
    return {slot_name(name, back) for name in record.writes for back in history} & {*record.reads}


def zeros(cache: TensorSpec, device: str) -> OrtValue:
    """A value for a cache that is never really read."""
    return onnx_runtime().OrtValue.ortvalue_from_numpy(np.zeros(cache.shape, cache.dtype), device)


def _depth(cache: TensorSpec, slots: frozenset[str], history: int) -> int:
    """How many values of a cache are kept: as many as some mode reads, one at the least."""
    read = (back for back in range(history) if slot_name(cache.name, back) in slots)
    return max(read, default=0) + 1
