"""How far a piece of work is: never back, never past its total, the total never smaller."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calicache.graph_passes.common.errors import CalicacheError
from calicache.graph_passes.common.progress import Meter, Progress, part_of

works = st.floats(0, 1e6, allow_nan=False)


@pytest.mark.parametrize(
    ("total", "second", "done", "grown"),
    [(2.0, 2.5, 3.5, 3.5), (3.0, 2.0, 3.0, 3.0)],  # more than was expected, and just that
)
def test_meter_tells_of_every_stage_and_piece_and_never_more_than_the_total(
    total: float, second: float, done: float, grown: float
) -> None:
    seen: list[Progress] = []
    meter = Meter(total, seen.append)
    meter.stage("one")
    meter.add()
    meter.stage("two")
    meter.add(second)
    assert seen == [
        Progress(0.0, total, "one"),
        Progress(1.0, total, "one"),
        Progress(1.0, total, "two"),
        Progress(done, grown, "two"),
    ]


def test_a_piece_is_worth_what_its_stage_says() -> None:
    seen: list[Progress] = []
    meter = Meter(4, seen.append)
    meter.stage("halves", 0.5)
    meter.add(3)
    meter.stage("wholes")
    meter.add()
    assert [progress.done for progress in seen] == [0, 1.5, 1.5, 2.5]


def test_nobody_has_to_listen() -> None:
    meter = Meter(2)
    meter.stage("alone")
    meter.add(2)
    assert (meter.done, meter.total, meter.name) == (2, 2, "alone")


def test_more_work_than_was_promised_makes_the_total_grow() -> None:
    seen: list[Progress] = []
    meter = Meter(1, seen.append)
    meter.add(1)
    meter.add(0.5)
    assert [(progress.done, progress.total) for progress in seen] == [(1, 1), (1.5, 1.5)]


def test_work_that_is_expected_counts_from_what_is_done() -> None:
    meter = Meter(0)
    meter.expect(4)
    assert (meter.done, meter.total) == (0, 4)
    meter.add(3)
    meter.expect(4)
    assert (meter.done, meter.total) == (3, 7)
    meter.expect(1)  # less than is promised already
    assert meter.total == 7


@settings(deadline=None)
@given(
    total=works,
    pieces=st.lists(st.tuples(st.sampled_from(["add", "expect", "stage"]), works), max_size=30),
)
def test_nothing_ever_goes_back(total: float, pieces: list[tuple[str, float]]) -> None:
    seen: list[Progress] = []
    meter = Meter(total, seen.append)
    for kind, work in pieces:
        if kind == "stage":
            meter.stage(f"{work}")
        else:
            getattr(meter, kind)(work)
    assert len(seen) == sum(kind != "expect" for kind, _ in pieces)
    assert all(progress.done <= progress.total for progress in seen)
    for before, after in pairwise(seen):
        assert before.done <= after.done
        assert before.total <= after.total


@settings(deadline=None)
@given(parts=st.lists(st.lists(st.tuples(works, works), max_size=5), min_size=2, max_size=3))
def test_parts_of_a_work_are_told_as_one(parts: list[list[tuple[float, float]]]) -> None:
    seen: list[Progress] = []
    names = [f"part {number}" for number in range(len(parts))]
    for number, told in enumerate(parts):
        tell = part_of(seen.append, names, number)
        assert tell is not None
        for done, total in told:
            tell(Progress(done, total, "stage"))
            assert number <= seen[-1].done <= number + 1
            assert (seen[-1].total, seen[-1].stage) == (len(parts), f"part {number}: stage")
    assert [one.done for one in seen] == sorted(one.done for one in seen)


def test_one_part_alone_is_told_as_it_is() -> None:
    seen: list[Progress] = []
    assert part_of(seen.append, ["all"], 0) == seen.append
    assert part_of(None, ["one", "two"], 1) is None
    with pytest.raises(CalicacheError, match="on_progress: expected a function"):
        part_of("listener", ["one", "two"], 1)  # type: ignore[arg-type]


def test_what_was_told_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Progress(1, 2, "stage").done = 3  # type: ignore[misc]
