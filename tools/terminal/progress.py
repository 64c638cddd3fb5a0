"""How far a plan search is: a bar on a terminal, lines in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from calicache.graph_passes.common.progress import Progress

_SPEED_SECONDS = 1800.0  # one call of a large model may take minutes
_BAR_COLUMNS = 20


@contextmanager
def progress_shown(console: Console) -> Iterator[Callable[[Progress], None]]:
    """Give what `Plan.search` takes as `on_progress`; a bar is gone afterwards, lines stay."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (  # the stage last: its length changes
        BarColumn(bar_width=_BAR_COLUMNS),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(
        *columns, console=console, transient=True, speed_estimate_period=_SPEED_SECONDS
    ) as progress:
        yield _Bar(progress)


class _Bar:
    """Moves a progress bar."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("load the model", total=None)
        self._begun = False

    def __call__(self, now: Progress) -> None:
        if not self._begun:
            # What an earlier, interrupted search did must not count as speed.
            self._begun = True
            self._progress.reset(self._task, total=now.total, completed=int(now.done))
        self._progress.update(
            self._task, description=now.stage, total=now.total, completed=now.done
        )


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
