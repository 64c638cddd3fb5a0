"""Memory that some work needs of its own, without pages of files: the system takes those back."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread

from calicache.tools.bench.prepare import status_bytes

ANONYMOUS = "RssAnon"
INTERVAL = 0.002  # seconds between two looks: the system keeps no high-water mark of it


@dataclass(slots=True)
class NeededMemory:
    """Anonymous memory of this process in bytes.

    Attributes:
        before: when the work began.
        highest: the most that was seen since.
    """

    before: int
    highest: int

    def look(self) -> None:
        """Look again."""
        self.highest = max(self.highest, status_bytes(ANONYMOUS))

    @property
    def added(self) -> int:
        """What the work added at its highest."""
        return self.highest - self.before


@contextmanager
def needed_memory() -> Iterator[NeededMemory]:
    """Watch the memory of what is done inside, which begins with nothing left to be freed."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc: pieces that were freed are else taken without being counted
        trim(0)
    now = status_bytes(ANONYMOUS)
    memory, ended = NeededMemory(now, now), Event()

    def watch() -> None:
        while not ended.wait(INTERVAL):
            memory.look()

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield memory
    finally:
        ended.set()
        watcher.join()
        memory.look()
