"""Which step does what: the search for schedules, on rehearsals small enough to look through."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import modes
from support.search.toy_runs import random_scales, toy_span

from calicache.graph_passes import StepMode, spread_schedule
from calicache.graph_passes.sampler.replay import Answer
from calicache.graph_passes.search import placement
from calicache.graph_passes.search.placement import (
    LEAST_GAIN,
    NEAR,
    POWERS,
    Limits,
    Schedule,
    best_starts,
    improve,
    neighbours,
    starts,
)
from calicache.graph_passes.search.rehearse import Rehearsal, Span

R, C, U, F = StepMode
PRICES = {R: 1.0, C: 0.35, U: 0.1, F: 0.0}
ALL = (R, C, U, F)
SETS = [(R, F), (R, U, F), ALL]


def cost(schedule: Sequence[StepMode]) -> float:
    """Share of the full run."""
    return sum(PRICES[mode] for mode in schedule) / len(schedule)


def rehearsal_of(steps: int, seed: int = 0) -> Rehearsal:
    """A toy run whose model answers differently at every step."""
    draw = np.random.default_rng(seed)
    gains, spreads = draw.uniform(-0.3, 0.8, steps), draw.uniform(0.0, 0.3, steps)
    answers = tuple(Answer(float(g), float(s)) for g, s in zip(gains, spreads, strict=True))
    scales = {U: random_scales(steps, seed + 1), C: random_scales(steps, seed + 2)}
    return Rehearsal(toy_span(steps, seed=seed), answers, scales)


def everything(steps: int, allowed: Sequence[StepMode], budget: float) -> list[Schedule]:
    """All schedules within the budget that start with REFRESH."""
    tails = product(allowed, repeat=steps - 1)
    return [(R, *tail) for tail in tails if cost((R, *tail)) <= budget]


def near_moves(schedule: Schedule, allowed: Sequence[StepMode]) -> set[Schedule]:
    """One step in another mode, or two steps at most NEAR apart exchanged; never the first."""
    moves = set()
    for step in range(1, len(schedule)):
        for mode in allowed:
            moves.add((*schedule[:step], mode, *schedule[step + 1 :]))
        for other in range(step + 1, min(step + NEAR, len(schedule) - 1) + 1):
            moves.add(exchanged(schedule, step, other))
    return moves - {schedule}


def exchanged(schedule: Schedule, one: int, other: int) -> Schedule:
    moved = list(schedule)
    moved[one], moved[other] = schedule[other], schedule[one]
    return tuple(moved)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 20),
    steps=st.integers(2, 8),
    allowed=st.sampled_from(SETS),
    budget=st.floats(0.15, 0.9),
    order=st.sampled_from([0, 1, 2]),
    data=st.data(),
)
def test_improved_schedule_is_no_worse_and_no_neighbour_is_much_better(
    seed: int,
    steps: int,
    allowed: tuple[StepMode, ...],
    budget: float,
    order: int,
    data: st.DataObject,
) -> None:
    rehearsal = rehearsal_of(steps, seed)
    tail = data.draw(st.lists(st.sampled_from(allowed), min_size=steps - 1, max_size=steps - 1))
    start: Schedule = (R, *tail)
    budget = max(budget, cost(start))
    best, error = improve(rehearsal, start, order, Limits(allowed, cost, budget))
    assert best[0] is R
    assert len(best) == steps
    assert set(best) <= set(allowed) | set(start)
    assert cost(best) <= budget
    # The same rehearsal in a batch of another size: float64 rounding, below 1e-9 of an error.
    assert error == pytest.approx(rehearsal.errors([best], order)[0], rel=1e-9, abs=1e-12)
    assert error <= rehearsal.errors([start], order)[0] * (1 + 1e-9) + 1e-12
    pairs = [(a, b) for a in range(1, steps) for b in range(a + 1, steps)]
    around = near_moves(best, allowed) | {exchanged(best, a, b) for a, b in pairs}
    within = [schedule for schedule in around if cost(schedule) <= budget]
    if within:
        assert min(rehearsal.errors(within, order)) >= error * (1 - LEAST_GAIN) - 1e-12


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(("allowed", "share"), [((R, F), 0.0), ((R, U, F), 0.02)])
def test_best_of_all_schedules_is_found_where_they_can_be_looked_through(
    allowed: tuple[StepMode, ...], share: float, order: int
) -> None:
    budget, steps = 0.5, 7
    for seed in (0, 1):
        rehearsal = rehearsal_of(steps, seed)
        errors = rehearsal.errors(everything(steps, allowed, budget), order)
        (start, _), *_ = best_starts(rehearsal, order, Limits(allowed, cost, budget))
        _, error = improve(rehearsal, start, order, Limits(allowed, cost, budget))
        # Moves that gain less than LEAST_GAIN (0.005) are not made. With two modes the exchanges
        # reach everything; with three a local search may stop short, among the best of some 300.
        assert min(errors) * (1 - 1e-9) <= error <= np.quantile(errors, share) * 1.006


def test_far_steps_exchange_where_nothing_near_helps() -> None:
    """One REFRESH besides the first is paid for, and only the last step has another output."""
    steps = 12
    span = toy_span(steps)
    outputs = span.outputs[:1].repeat(steps, 1, 1)
    outputs[-1] = span.outputs[-1]
    latents = [span.latents[0]]
    for row, output in zip(span.weights, outputs, strict=True):
        latents.append(row[0] * latents[-1] + row[1] * output[0])
    changed = Span(torch.stack(latents), outputs, span.weights)
    rehearsal = Rehearsal(changed, (Answer(0.0, 0.0),) * steps, {})
    start = modes("RR" + "F" * (steps - 2))
    best, error = improve(rehearsal, start, 0, Limits((R, F), cost, 2 / steps))
    assert best == modes("R" + "F" * (steps - 2) + "R")
    assert error == pytest.approx(0.0, abs=1e-6)  # exact but for the ridge


def test_nothing_moves_where_the_budget_allows_no_neighbour() -> None:
    rehearsal, start = rehearsal_of(5), modes("RFFFF")
    best = improve(rehearsal, start, 1, Limits((R, F), cost, 1 / 5))
    assert best == (start, rehearsal.errors([start], 1)[0])


# --- where to start -----------------------------------------------------------------------------


@settings(deadline=None)
@given(steps=st.integers(1, 30), allowed=st.sampled_from(SETS), budget=st.floats(0.01, 0.95))
def test_starts_refresh_first_and_stay_within_the_budget(
    steps: int, allowed: tuple[StepMode, ...], budget: float
) -> None:
    schedules = list(starts(steps, Limits(allowed, cost, budget)))
    for schedule in schedules:
        assert len(schedule) == steps
        assert schedule[0] is R
        assert set(schedule) <= set(allowed)
        assert cost(schedule) <= budget
    affordable = [mode for mode in allowed[1:] if cost((R, *(steps - 1) * (mode,))) <= budget]
    for mode in affordable:  # one REFRESH fits: every pattern of that mode is there
        assert sum(set(schedule) <= {R, mode} for schedule in schedules) >= len(POWERS)
    if not affordable:
        assert all(len(set(schedule)) > 2 for schedule in schedules)


def test_start_of_one_cheap_mode_spreads_as_many_refreshes_as_fit() -> None:
    schedules = list(starts(20, Limits((R, F), cost, 0.3)))
    assert schedules == [spread_schedule(20, 6, power, F) for power in POWERS]  # 0.3 * 20 = 6


def test_two_cheap_modes_take_turns_after_every_refresh() -> None:
    schedules = list(starts(10, Limits((R, U, F), cost, 0.27)))  # two REFRESH and some REUSE
    assert modes("RUFUFUFUFR") in schedules
    assert modes("RFUFUFUFUR") in schedules
    assert len(schedules) == 4 * len(POWERS)


def test_refresh_and_calibrate_steps_are_spread_together_with_forecasts_between() -> None:
    def price(schedule: Sequence[StepMode]) -> float:
        return (schedule.count(R) + 0.4 * schedule.count(C)) / len(schedule)

    schedules = list(starts(13, Limits((R, C, F), price, 0.3)))
    # As many computed steps as cost 3.9, evenly; of every two, three, four, ... one is REFRESH.
    for letters in ("RFFCFFRFFCFFR", "RFCFCFFRFCFFC", "RFCFFCFCFFRFC"):
        assert modes(letters) in schedules
    assert not any(C in schedule for schedule in starts(13, Limits((R, F), price, 0.3)))


@pytest.mark.parametrize("allowed", SETS)
def test_best_starts_are_all_starts_by_error(allowed: tuple[StepMode, ...]) -> None:
    rehearsal = rehearsal_of(12)
    ranking = best_starts(rehearsal, 2, Limits(allowed, cost, 0.4))
    every = set(starts(12, Limits(allowed, cost, 0.4)))
    errors = {schedule: rehearsal.errors([schedule], 2)[0] for schedule in every}
    assert {schedule for schedule, _ in ranking} == every
    assert len(ranking) == len(every)
    # Alone and in a batch: float64 rounding.
    for (schedule, error), least in zip(ranking, sorted(errors.values()), strict=True):
        assert error == pytest.approx(errors[schedule], rel=1e-9)
        assert error == pytest.approx(least, rel=1e-9)


def test_budget_below_one_refresh_has_no_start() -> None:
    assert best_starts(rehearsal_of(10), 1, Limits((R, F), cost, 0.09)) == []
    assert best_starts(rehearsal_of(10), 1, Limits((R, F), cost, 0.1))


# --- all neighbours -----------------------------------------------------------------------------


@pytest.mark.parametrize("letters", ["RFRFFUCFRF", "RRRRRFFFFF", "RFFFFFFFFF"])
@pytest.mark.parametrize("allowed", SETS)
def test_neighbours_are_all_near_moves_that_the_budget_allows_best_first(
    allowed: tuple[StepMode, ...], letters: str
) -> None:
    rehearsal, schedule = rehearsal_of(10), modes(letters)
    budget = cost(schedule) + 0.05
    ranking = neighbours(rehearsal, schedule, 1, Limits(allowed, cost, budget))
    expected = {s for s in near_moves(schedule, allowed) if cost(s) <= budget}
    assert {s for s, _ in ranking} == expected
    assert len(ranking) == len(expected)
    errors = [error for _, error in ranking]
    assert errors == sorted(errors)
    for moved, error in ranking:
        assert error == pytest.approx(rehearsal.errors([moved], 1)[0], rel=1e-9)


def test_no_neighbour_within_the_budget_gives_none() -> None:
    assert neighbours(rehearsal_of(5), modes("RFFFF"), 1, Limits((R, F), cost, 1 / 5)) == []


def test_more_neighbours_than_one_batch_are_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal, schedule = rehearsal_of(10), modes("RFRFFUCFRF")
    at_once = neighbours(rehearsal, schedule, 1, Limits(ALL, cost, 0.5))
    monkeypatch.setattr(placement, "BATCH", 7)
    assert len(at_once) > 3 * 7
    in_parts = dict(neighbours(rehearsal, schedule, 1, Limits(ALL, cost, 0.5)))
    assert in_parts == pytest.approx(dict(at_once), rel=1e-9)  # float64, in blocks of another size


def test_searches_are_the_same_every_time() -> None:
    def search() -> tuple[object, ...]:
        rehearsal = rehearsal_of(10, seed=3)
        (start, _), *_ = best_starts(rehearsal, 2, Limits(ALL, cost, 0.4))
        better, _ = improve(rehearsal, start, 2, Limits(ALL, cost, 0.4))
        order = [s for s, _ in neighbours(rehearsal, better, 2, Limits(ALL, cost, 0.4))]
        return start, better, order

    assert search() == search()
