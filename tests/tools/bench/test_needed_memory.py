"""Memory that compiling needs, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calicache.tools.bench.compile_time import measure_compile
from calicache.tools.bench.needed_memory import needed_memory
from calicache.tools.bench.rows import BenchSettings

HEAVY = f"{Path(__file__).parents[2] / 'support' / 'small' / 'bench.py'}:heavy"
SIZE = 64 * 2**20  # bytes
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")


@needs_proc
def test_what_is_freed_before_the_end_counts() -> None:
    with needed_memory() as memory:
        values = np.ones(SIZE, np.uint8)
        memory.look()
        del values
    # Nothing else in this process takes or gives back a quarter of that meanwhile.
    assert 0.75 * SIZE < memory.added < 1.25 * SIZE


@needs_proc
def test_pages_of_files_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(SIZE))
    with needed_memory() as memory:
        assert not np.memmap(file, np.uint8, "r").any()  # reads every page
    assert memory.added < 0.25 * SIZE


@pytest.mark.slow
@needs_proc
def test_compiling_holds_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    compiled = measure_compile(BenchSettings(HEAVY, 3, 6, 16, 0, 1, tmp_path))
    assert compiled["weight_bytes"] > 140e6
    # Libraries, graphs and factors take about 0.4 here; a copy of the weights would be 1 more.
    assert compiled["peak_bytes"] < 0.8 * compiled["weight_bytes"]
