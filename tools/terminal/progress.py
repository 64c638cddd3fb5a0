"""How far a piece of work is: a bar on a terminal, one line in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars

from calicache.graph_passes.common.progress import OnProgress, Progress

_SPEED_SECONDS = 1800.0  # one call of a large model may take minutes
_BAR_COLUMNS = 20
_SOON = 5.0  # seconds; nobody asks how long shorter work takes
_ENOUGH = 0.1  # of all work, to reckon with what it took


@contextmanager
def progress_shown() -> Iterator[OnProgress]:
    """Give a listener that shows work on the error stream, and takes a bar away afterwards."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _OneLine(console)
        return
    columns = (  # the stage last: its length changes
        BarColumn(bar_width=_BAR_COLUMNS),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with ProgressBars(
        *columns, console=console, transient=True, speed_estimate_period=_SPEED_SECONDS
    ) as bars:
        yield _Bar(bars)


class _Bar:
    """Moves a progress bar."""

    def __init__(self, bars: ProgressBars) -> None:
        self._bars = bars
        self._task = bars.add_task("load the model", total=None)
        self._begun = False

    def __call__(self, now: Progress) -> None:
        if not self._begun:
            # What an earlier, interrupted search did must not count as speed.
            self._begun = True
            self._bars.reset(self._task, total=now.total, completed=int(now.done))
        self._bars.update(self._task, description=now.stage, total=now.total, completed=now.done)


class _OneLine:
    """Prints one line when work takes long: for logs, which no bar can move in."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._first: tuple[float, float] | None = None  # when work began, and how far it was
        self._told = False

    def __call__(self, now: Progress) -> None:
        begun, done = self._first = self._first or (time.monotonic(), now.done)
        seconds, gained = time.monotonic() - begun, now.done - done
        if self._told or seconds < _SOON or gained < _ENOUGH * (now.total - done):
            return
        self._told = True
        left = timedelta(seconds=round(seconds * (now.total - now.done) / gained))
        share = now.done / now.total
        self._console.print(f"{share:.0%} done, {left} left: {now.stage}", markup=False)
