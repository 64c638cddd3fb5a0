"""Which running denoising a call belongs to: one that was started by hand, or the thread's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from calicache.graph_passes.sampler.run_state import RunState

Run = TypeVar("Run")
_STARTED: ContextVar[tuple[tuple[object, object], ...]] = ContextVar("_STARTED", default=())


class ThreadRun(threading.local):
    """The denoising of every thread that has started none by hand; a new thread has a new one."""

    def __init__(self) -> None:
        self.state = RunState()

    def __reduce__(self) -> tuple[type[ThreadRun], tuple[()], dict[str, RunState]]:
        return ThreadRun, (), {"state": self.state}  # of the thread that copies


def started_run(model: object, kind: type[Run]) -> Run | None:
    """The denoising of a model or session that was started here by hand; None without one."""
    runs = (run for owner, run in reversed(_STARTED.get()) if owner is model)
    return next((run for run in runs if isinstance(run, kind)), None)


@contextmanager
def binding_run(model: object, run: Run) -> Iterator[Run]:
    """Bind a denoising of a model or session to the current thread or asyncio task."""
    token = _STARTED.set((*_STARTED.get(), (model, run)))
    try:
        yield run
    finally:
        _STARTED.reset(token)
