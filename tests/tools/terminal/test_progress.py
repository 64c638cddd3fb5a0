"""Progress of long work in a log: one line, with the time left."""

from __future__ import annotations

import pytest

from calicache.graph_passes.common.progress import Progress
from calicache.tools.terminal import progress
from calicache.tools.terminal.progress import progress_shown


def shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, done: float
) -> str:
    """What is printed of ten pieces that take a second each, begun with some of them done."""
    clock = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with progress_shown() as on_progress:
        for piece in range(11):
            on_progress(Progress(done + piece, done + 10, f"piece {piece}"))
    return capsys.readouterr().err


@pytest.mark.parametrize("done", [0.0, 30.0])
def test_one_line_tells_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], done: float
) -> None:
    (line,) = shown(monkeypatch, capsys, done=done).splitlines()
    # The clock was read once before: 5 seconds for 4 pieces, and 6 are left.
    assert line == f"{(done + 4) / (done + 10):.0%} done, 0:00:08 left: piece 4"


def test_short_work_is_done_in_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SOON", 60.0)
    assert shown(monkeypatch, capsys, done=0.0) == ""
