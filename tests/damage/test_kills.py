"""A save that is killed leaves the old or the new one, whole, and the next one cleans up."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from damage.formats import SAVES
from damage.kills import kill_at_calls, kill_at_moments

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", SAVES)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(name: str, tmp_path: Path) -> None:
    states = kill_at_moments(name, tmp_path, kills=10)
    assert set(states) <= {"old", "new"}


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_kill_at_any_system_call_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    states = kill_at_calls("plan", tmp_path, "%file,%desc")
    assert set(states) == {"old", "new"}
    assert states["old"] > 10  # nearly all calls come before the exchange
