"""What starting takes: CPU seconds of what nobody should wait for."""

from __future__ import annotations

import os
import subprocess
import sys
from statistics import median

STARTS = {
    "import calicache": ("-c", "import calicache"),
    "calicache --help": ("-c", "from calicache.tools.cli import app; app(['--help'])"),
}
REPEATS = 5


def measure_start() -> dict[str, float]:
    """Medians over new processes, Python's own start included, by what is done."""
    return {
        name: median(_cpu_seconds(arguments) for _ in range(REPEATS))
        for name, arguments in STARTS.items()
    }


def _cpu_seconds(arguments: tuple[str, ...]) -> float:
    before = os.times()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system
