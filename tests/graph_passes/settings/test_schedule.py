"""Step modes of a run, and the weights that forecast an anchor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import modes

from calicache.graph_passes import StepMode, spread_schedule, uniform_schedule
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.settings.schedule import (
    anchor_table,
    kept_outputs,
    kept_refreshes,
    lagrange_weights,
    named_schedule,
    output_table,
)

REFRESH, CALIBRATE, REUSE, FORECAST = StepMode

cheap_modes = st.sampled_from([CALIBRATE, REUSE, FORECAST])
schedules = st.lists(st.sampled_from(list(StepMode)), max_size=30).map(
    lambda rest: (REFRESH, *rest)
)


@pytest.mark.parametrize(
    ("steps", "interval", "expected"),
    [(5, 3, "RCCRC"), (6, 3, "RCCRCC"), (4, 1, "RRRR"), (3, 9, "RCC"), (1, 1, "R")],
)
def test_uniform_schedule_refreshes_every_interval(
    steps: int, interval: int, expected: str
) -> None:
    assert uniform_schedule(steps, interval) == modes(expected)


def test_uniform_schedule_takes_any_mode_between() -> None:
    assert uniform_schedule(4, 2, REUSE) == modes("RURU")
    assert uniform_schedule(4, 3, FORECAST) == modes("RFFR")


@pytest.mark.parametrize(("steps", "interval", "name"), [(0, 3, "steps"), (5, 0, "interval")])
def test_uniform_schedule_refuses_nothing_to_do(steps: int, interval: int, name: str) -> None:
    with pytest.raises(PlanError) as caught:
        uniform_schedule(steps, interval)
    assert str(caught.value) == f"plan: {name}: expected 1 or more, got 0. Raise {name}."


@pytest.mark.parametrize(
    ("steps", "refreshes", "power", "expected"),
    [
        (9, 3, 1.0, "RCCCRCCCR"),
        (9, 3, 0.5, "RCCCCCRCR"),  # 8 x (1/2)^0.5 = 5.7: denser towards the end
        (9, 3, 2.0, "RCRCCCCCR"),  # 8 x (1/2)^2 = 2: denser towards the start
        (5, 1, 1.0, "RCCCC"),
        (5, 5, 0.3, "RRRRR"),
        (1, 1, 1.0, "R"),
        (6, 4, 9.0, "RRRCCR"),  # three marks wish for the start: each takes the next free step
        (6, 4, 0.05, "RCCRRR"),
    ],
)
def test_spread_schedule_places_refreshes_at_powers_of_their_share(
    steps: int, refreshes: int, power: float, expected: str
) -> None:
    assert spread_schedule(steps, refreshes, power) == modes(expected)


@settings(deadline=None)
@given(
    steps=st.integers(1, 60),
    power=st.floats(1e-6, 1e6) | st.just(math.inf),
    mode=cheap_modes,
    data=st.data(),
)
def test_spread_schedule_always_has_the_refreshes_asked_for(
    steps: int, power: float, mode: StepMode, data: st.DataObject
) -> None:
    refreshes = data.draw(st.integers(1, steps))
    schedule = spread_schedule(steps, refreshes, power, mode)
    assert len(schedule) == steps
    assert schedule.count(REFRESH) == refreshes
    assert schedule[0] is REFRESH
    assert set(schedule) <= {REFRESH, mode}
    if refreshes > 1:
        assert schedule[-1] is REFRESH


@settings(deadline=None)
@given(steps=st.integers(1, 60), data=st.data())
def test_evenly_spread_gaps_differ_by_one_at_most(steps: int, data: st.DataObject) -> None:
    schedule = spread_schedule(steps, data.draw(st.integers(1, steps)))
    marks = [k for k, mode in enumerate(schedule) if mode is REFRESH]
    gaps = [after - before for before, after in pairwise(marks)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("refreshes", "message"),
    [
        (-1, "expected 1 .. 5, got -1. Raise"),
        (0, "expected 1 .. 5, got 0. Raise"),
        (6, "expected 1 .. 5, got 6. Lower"),
    ],
)
def test_spread_schedule_refuses_a_count_that_does_not_fit(refreshes: int, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        spread_schedule(5, refreshes)
    assert str(caught.value) == f"plan: refreshes: {message} refreshes."


@pytest.mark.parametrize("value", ["2", 2.0, None, True, torch.ones(2)])
def test_counts_that_are_no_whole_numbers_are_refused(value: Any) -> None:
    for name, make in (
        ("steps", lambda: uniform_schedule(value, 2)),
        ("interval", lambda: uniform_schedule(4, value)),
        ("refreshes", lambda: spread_schedule(4, value)),
    ):
        with pytest.raises(PlanError, match=f"^plan: {name}: expected a whole number, 1"):
            make()


@pytest.mark.parametrize("mode", ["X", 1, None])
def test_schedules_of_an_unknown_mode_are_refused(mode: Any) -> None:
    for make in (uniform_schedule, spread_schedule):
        with pytest.raises(PlanError, match=r"^plan: step mode: expected REFRESH"):
            make(4, 2, mode=mode)


def test_whole_numbers_may_be_numpys() -> None:
    assert uniform_schedule(np.int64(4), np.int32(2)) == modes("RCRC")


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan])
def test_spread_schedule_refuses_a_power_that_is_not_positive(power: float) -> None:
    with pytest.raises(PlanError, match=r"^plan: power: expected above 0, got"):
        spread_schedule(5, 2, power)


@pytest.mark.parametrize(
    "schedule",
    [
        "RCUF",
        "rcuf",
        ("REFRESH", "calibrate", "Reuse", "F"),
        [REFRESH, "C", REUSE, "forecast"],
        tuple(StepMode),
    ],
)
def test_named_schedule_takes_modes_names_and_letters(schedule: Sequence[StepMode | str]) -> None:
    named = named_schedule(schedule, 99)  # the steps of a run are for intervals alone
    assert named == tuple(StepMode)
    assert all(type(mode) is StepMode for mode in named)


def test_named_schedule_of_an_interval_calibrates_between() -> None:
    assert named_schedule(3, 6) == uniform_schedule(6, 3) == modes("RCCRCC")
    assert named_schedule(1, 4) == modes("RRRR")


@pytest.mark.parametrize("mode", [*StepMode, "reuse", "F"])
def test_named_schedule_takes_the_mode_between_two_refreshes(mode: StepMode | str) -> None:
    expected = StepMode.of(mode)
    assert named_schedule(3, 5, mode) == (REFRESH, expected, expected, REFRESH, expected)


def test_named_schedule_may_be_empty_or_start_with_anything() -> None:
    """That it starts with REFRESH is the recipe's to say."""
    assert named_schedule("", 6) == ()
    assert named_schedule("CR", 6) == modes("CR")


@pytest.mark.parametrize("mode", [CALIBRATE, "U"])
def test_named_schedule_refuses_a_mode_beside_every_steps(mode: StepMode | str) -> None:
    with pytest.raises(PlanError) as caught:
        named_schedule("RCC", 3, mode)
    assert str(caught.value) == (
        "plan: mode: expected none beside a schedule of every step, "
        f"got {StepMode.of(mode).name}. "
        "Give an interval as the schedule, or write the mode into it."
    )


@pytest.mark.parametrize("schedule", [True, 2.5, None, {"R"}, CALIBRATE])
def test_named_schedule_refuses_what_is_neither_interval_nor_steps(schedule: object) -> None:
    with pytest.raises(PlanError) as caught:
        named_schedule(schedule, 6)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "plan: schedule: expected an interval such as 3, or the mode of every step, "
        f"got {schedule!r}. Give one of these."
    )


@pytest.mark.parametrize("schedule", ["RXC", ["R", "other"], [0, 1], b"RCC"])
def test_named_schedule_refuses_an_unknown_mode(schedule: Sequence[str]) -> None:
    with pytest.raises(PlanError, match=r"^plan: step mode: expected REFRESH \| CALIBRATE"):
        named_schedule(schedule, 6)


@pytest.mark.parametrize("interval", [0, -2])
def test_named_schedule_refuses_an_interval_below_1(interval: int) -> None:
    with pytest.raises(PlanError, match=f"^plan: interval: expected 1 or more, got {interval}"):
        named_schedule(interval, 6)


def test_kept_refreshes_are_the_last_ones_newest_first() -> None:
    schedule = modes("RCRRCUFR")
    assert kept_refreshes(schedule, 6, 2) == (3, 2)
    assert kept_refreshes(schedule, 6, 9) == (3, 2, 0)
    assert kept_refreshes(schedule, 1, 2) == (0,)
    assert kept_refreshes(schedule, 0, 2) == ()
    # The step itself is not before itself.
    assert kept_refreshes(schedule, 7, 1) == (3,)


def test_no_refreshes_are_kept_where_none_are_asked_for() -> None:
    assert kept_refreshes(modes("RCRRC"), 4, 0) == ()


@settings(max_examples=200, deadline=None)
@given(
    places=st.lists(st.integers(0, 100), min_size=1, max_size=3, unique=True),
    target=st.integers(0, 100),
    coefficients=st.lists(st.integers(-9, 9), min_size=3, max_size=3),
)
def test_lagrange_weights_reproduce_polynomials_at_uneven_places(
    places: list[int], target: int, coefficients: list[int]
) -> None:
    def value(at: int) -> int:
        return sum(c * at**k for k, c in enumerate(coefficients[: len(places)]))

    weights = lagrange_weights(places, target)
    terms = [w * value(place) for w, place in zip(weights, places, strict=True)]
    # Each weight is a product of up to two float64 quotients: a few 1e-16 of every term.
    slack = 1e-14 * sum(abs(term) for term in terms)
    assert math.isclose(math.fsum(terms), value(target), rel_tol=0, abs_tol=slack)


@settings(max_examples=100, deadline=None)
@given(
    places=st.lists(st.integers(0, 100), min_size=1, max_size=3, unique=True),
    target=st.integers(0, 100),
)
def test_lagrange_weights_solve_the_vandermonde_system(places: list[int], target: int) -> None:
    """Cramer's rule in exact arithmetic: another way to the only solution."""

    def determinant(nodes: list[Fraction]) -> Fraction:
        result = Fraction(1)
        for place, high in enumerate(nodes):
            for low in nodes[:place]:
                result *= high - low
        return result

    exact = [Fraction(place) for place in places]
    expected = [
        float(determinant([*exact[:k], Fraction(target), *exact[k + 1 :]]) / determinant(exact))
        for k in range(len(exact))
    ]
    # Two float64 products and quotients.
    assert lagrange_weights(places, target) == pytest.approx(expected, rel=1e-14, abs=0)


def test_lagrange_weights_of_even_places_are_the_known_ones() -> None:
    assert lagrange_weights((4,), 7) == (1.0,)
    assert lagrange_weights((4, 2), 6) == (2.0, -1.0)
    assert lagrange_weights((4, 2, 0), 6) == (3.0, -3.0, 1.0)


def test_anchor_table_falls_back_where_history_is_short() -> None:
    table = anchor_table(modes("RCRCRC"), 2)
    assert [len(row) for row in table] == [3] * 6
    assert table[1] == (1.0, 0.0, 0.0)  # one refresh: stale
    assert table[3] == (1.5, -0.5, 0.0)  # from 2 and 0: a line to 3
    assert table[5] == (1.875, -1.25, 0.375)  # from 4, 2 and 0: a parabola to 5


def test_anchor_table_of_order_0_names_the_newest_refresh_alone() -> None:
    assert anchor_table(modes("RCURFC"), 0) == ((1.0,),) * 6


@pytest.mark.parametrize("order", [0, 1, 2])
def test_refresh_rows_name_the_newest_value_alone(order: int) -> None:
    schedule = modes("RRRCRUR")
    for mode, row in zip(schedule, anchor_table(schedule, order), strict=True):
        if mode is REFRESH:
            assert row == (1.0,) + (0.0,) * order


@settings(deadline=None)
@given(schedule=schedules, order=st.integers(0, 2))
def test_anchor_rows_are_the_weights_of_what_is_kept(
    schedule: tuple[StepMode, ...], order: int
) -> None:
    table = anchor_table(schedule, order)
    assert len(table) == len(schedule)
    for step, row in enumerate(table):
        assert len(row) == order + 1
        kept = [k for k in range(step) if schedule[k] is REFRESH][::-1][: order + 1]
        if schedule[step] is not REFRESH:
            assert row[: len(kept)] == lagrange_weights(kept, step)
            assert row[len(kept) :] == (0.0,) * (order + 1 - len(kept))
        # A constant is forecast as itself; weights reach 1e3 at 30 steps, with 1e-16 of each.
        assert math.fsum(row) == pytest.approx(1.0, rel=0, abs=1e-12)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (-1, "expected 0 .. 2, got -1. Raise order."),
        (3, "expected 0 .. 2, got 3. Lower order."),
        ("1", "expected a whole number, 0 .. 2, got '1'. Give such a value as order."),
        (1.0, "expected a whole number, 0 .. 2, got 1.0. Give such a value as order."),
        (None, "expected a whole number, 0 .. 2, got None. Give such a value as order."),
    ],
)
def test_unknown_order_is_refused(order: Any, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        anchor_table(modes("RC"), order)
    assert str(caught.value) == f"plan: order: {message}"


def test_output_table_forecasts_forecast_steps_alone() -> None:
    table = output_table(modes("RFRCUF"), 1)
    own = (1.0, 0.0, 0.0)
    # A line through 3, which is CALIBRATE, and 2, at 5; REUSE keeps no output.
    assert table == (own, (0.0, 1.0, 0.0), own, own, own, (0.0, 3.0, -2.0))


@settings(deadline=None)
@given(schedule=schedules, order=st.integers(0, 2))
def test_output_rows_are_a_sum_of_kept_outputs_or_the_own_output(
    schedule: tuple[StepMode, ...], order: int
) -> None:
    for step, row in enumerate(output_table(schedule, order)):
        expected = [1.0]
        if schedule[step] is FORECAST:
            kept = [k for k in range(step) if schedule[k] in (REFRESH, CALIBRATE)][-order - 1 :]
            assert kept_outputs(schedule, step, order + 1) == tuple(reversed(kept))
            expected = [0.0, *lagrange_weights(kept[::-1], step)]
        assert row == (*expected, *(0.0,) * (order + 2 - len(expected)))
