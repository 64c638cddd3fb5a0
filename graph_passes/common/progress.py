"""How far a long piece of work is: one form of it for planning, searching and optimising."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from calicache.graph_passes.common.errors import CalicacheError


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a piece of work is.

    Attributes:
        done: work done so far; it never falls.
        total: all of it, in the same unit; an estimate where the work depends on what it finds.
        stage: what is being done.
    """

    done: float
    total: float
    stage: str


OnProgress = Callable[[Progress], None]


def check_listener(on_progress: object) -> None:
    """Refuse a listener that cannot be told anything.

    Raises:
        CalicacheError: it cannot be called.
    """
    if on_progress is not None and not callable(on_progress):
        raise CalicacheError(
            "on_progress",
            expected="a function of one argument, or None",
            got=repr(on_progress),
            fix="Give such a value as on_progress.",
        )


def part_of(on_progress: OnProgress | None, names: Sequence[str], number: int) -> OnProgress | None:
    """What one of several pieces of work tells its progress to; each counts as 1 of them all.

    Args:
        on_progress: who is told of all; told as it is where there is one piece alone.
        names: of the pieces.
        number: of the piece among them.

    Raises:
        CalicacheError: the listener cannot be called.
    """
    check_listener(on_progress)
    if on_progress is None or len(names) == 1:
        return on_progress
    done = float(number)

    def tell(progress: Progress) -> None:
        nonlocal done  # a total that grows does not take back what was told
        done = max(done, number + progress.done / max(progress.total, progress.done, 1e-9))
        on_progress(Progress(done, float(len(names)), f"{names[number]}: {progress.stage}"))

    return tell


class Meter:
    """Counts work over all stages, and tells a listener after every piece.

    Args:
        total: expected work, such as calls of the plain model.
        on_progress: the listener; None for none.

    Raises:
        CalicacheError: the listener cannot be called.
    """

    def __init__(self, total: float, on_progress: OnProgress | None = None) -> None:
        check_listener(on_progress)
        self.total, self.on_progress = total, on_progress
        self.done, self.name, self.piece = 0.0, "", 1.0

    def stage(self, name: str, piece: float = 1.0) -> None:
        """Begin a stage.

        Args:
            name: what is done in it.
            piece: work of one of its pieces, which the function that does it does not know.
        """
        self.name, self.piece = name, piece
        self.add(0.0)

    def expect(self, work: float) -> None:
        """So much work is still to come, at least."""
        self.total = max(self.total, self.done + work)

    def add(self, pieces: float = 1.0) -> None:
        """Count pieces of the stage; the total grows with them rather than be passed."""
        self.done += pieces * self.piece
        self.total = max(self.total, self.done)
        if self.on_progress:
            self.on_progress(Progress(self.done, self.total, self.name))
