"""How far a piece of work is: a bar on a terminal, lines in a log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars

from calicache.graph_passes.common.progress import OnProgress, Progress

_SPEED_SECONDS = 1800.0  # one call of a large model may take minutes
_BAR_COLUMNS = 20


@contextmanager
def progress_shown() -> Iterator[OnProgress]:
    """Give a listener that shows work on the error stream; a bar is gone afterwards, lines stay."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _Lines(console)
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


class _Lines:
    """Prints a line for every stage and tenth: for logs, which no bar can move in."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = ("", -1)

    def __call__(self, now: Progress) -> None:
        share = min(1.0, now.done / now.total) if now.total else 0.0
        if (now.stage, int(10 * share)) != self._last:
            self._last = (now.stage, int(10 * share))
            self._console.print(f"{share:4.0%}  {now.stage}", markup=False, highlight=False)
