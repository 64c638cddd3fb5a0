"""What is said of a schedule."""

from __future__ import annotations

import pytest

from calicache.graph_passes import StepMode
from calicache.tools.inspect.facts import schedule_facts

MODES = {"R": StepMode.REFRESH, "F": StepMode.FORECAST}


@pytest.mark.parametrize(
    ("letters", "spacing"),
    [
        ("RFFRFFRF", "interval 3"),  # the last interval may be shorter
        ("RFFRFFF", "REFRESH steps at most 4 apart"),
        ("RFFRFRFF", "REFRESH steps at most 3 apart"),
        ("RRFF", "REFRESH steps at most 3 apart"),
        ("RFFF", "interval 4"),
        ("RRR", "interval 1"),
    ],
)
def test_an_interval_is_told_where_there_is_one(letters: str, spacing: str) -> None:
    schedule = [MODES[letter] for letter in letters]
    assert schedule_facts(schedule, order=0).spacing == spacing
