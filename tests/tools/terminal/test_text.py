"""Pieces of text that several commands print."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from calicache.export.artifact.manifest import FileRecord
from calicache.graph_passes import StepMode, uniform_schedule
from calicache.graph_passes.recording.signature import ConstantSpec
from calicache.tools.terminal.text import (
    constants_in_words,
    fact_grid,
    files_in_words,
    format_count,
    schedule_strip,
    some_of,
)


def test_schedule_strip_breaks_after_fifty_steps() -> None:
    schedule = uniform_schedule(51, 2, StepMode.REUSE)
    lines = [line.plain for line in schedule_strip(schedule)]
    assert lines[0] == "   0  " + "RU" * 25
    assert lines[1] == "  50  R"
    assert lines[2].strip() == "R refresh, C calibrate, U reuse, F forecast"


def test_schedule_strip_has_a_letter_for_every_mode() -> None:
    assert next(schedule_strip(tuple(StepMode))).plain == "   0  RCUF"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1000, "1 k"), (1.234e9, "1.23 G"), (5e13, "50 T")]
)
def test_format_count(value: float, text: str) -> None:
    assert format_count(value) == text


def test_fact_grid_breaks_long_values_and_reads_no_markup() -> None:
    file = io.StringIO()
    grid = fact_grid([("name", "[red]" + "x" * 20)])
    Console(file=file, width=20, highlight=False).print(grid)
    assert file.getvalue().split() == ["name", "[red]xxxxxxxxx", "xxxxxxxxxxx"]


def test_many_items_are_cut_with_their_number() -> None:
    assert some_of(["a", "b", "c"], most=2) == "a\nb\nand 1 more"
    assert some_of(["a", "b"], most=2) == "a\nb"


def test_files_have_sizes_and_digests() -> None:
    files = [FileRecord("a.bin", 1500, "0123456789abcdef" * 4)]
    assert files_in_words(files) == "a.bin, 1.5 kB, sha256 0123456789abcdef"


def test_constants_leave_none_out() -> None:
    assert constants_in_words([ConstantSpec("a", None)]) == "tensors alone"
    assert constants_in_words([ConstantSpec("a", 1), ConstantSpec("b", "x")]) == "a=1, b='x'"
