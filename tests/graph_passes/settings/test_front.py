"""Errors in a few numbers, and the points that no other beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.search.fronts import front_of

from calicache.graph_passes import ErrorSummary, FrontPoint, StepMode
from calicache.graph_passes.settings.front import CONFIDENCE, pareto
from calicache.graph_passes.settings.student import student_quantile

R, C, U, F = StepMode
errors_of_samples = st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=30)
# Means of at most 4,000 doubles, through a logarithm and back.
ROUNDING = 1e-9


# --- errors -------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(errors=errors_of_samples)
def test_summary_is_that_of_numpy(errors: list[float]) -> None:
    got, logarithms = ErrorSummary.of(errors), np.log(errors)
    several = len(errors) > 1
    assert CONFIDENCE == 0.99
    assert got.samples == len(errors)
    assert got.worst == max(errors)
    assert math.isclose(got.mean, np.mean(errors), rel_tol=ROUNDING)
    deviation = float(np.std(errors, ddof=1)) if several else 0.0
    # Equal values: NumPy's mean of them is off by a rounding.
    assert math.isclose(got.deviation, deviation, rel_tol=1e-6, abs_tol=1e-12 * max(errors))
    if several:
        spread = float(np.std(logarithms, ddof=1))
        reach = student_quantile(0.99, len(errors) - 1) * math.sqrt(1 + 1 / len(errors))
        with np.errstate(over="ignore"):
            bound = float(np.exp(np.mean(logarithms) + reach * spread))
        assert math.isclose(got.bound, bound, rel_tol=1e-9)


def test_bound_of_errors_known_in_advance() -> None:
    # Logarithms of mean log 0.02 and standard deviation log 2.
    got = ErrorSummary.of([0.01, 0.02, 0.04])
    assert math.isclose(got.mean, 0.07 / 3, rel_tol=ROUNDING)
    assert got.worst == 0.04
    # 6.9646 is the 99 % quantile of Student's t with two degrees, to five digits.
    assert math.isclose(got.bound, 0.02 * 2 ** (6.9646 * math.sqrt(4 / 3)), rel_tol=1e-4)


@pytest.mark.parametrize("error", [1e-9, 0.02, 7.0])
def test_one_sample_says_nothing_of_new_ones(error: float) -> None:
    assert ErrorSummary.of([error]) == ErrorSummary(error, 0.0, error, 1, math.inf)


@settings(max_examples=50, deadline=None)
@given(errors=errors_of_samples, scale=st.floats(1e-2, 1e2))
def test_bound_scales_with_the_errors_and_lies_above_their_middle(
    errors: list[float], scale: float
) -> None:
    got, scaled = ErrorSummary.of(errors), ErrorSummary.of([scale * error for error in errors])
    # Where errors are nearly equal, rounding of their logarithms (1e-15) is all the spread.
    # With two samples a thousand times that rounding counts.
    assert scaled.bound == got.bound or math.isclose(scaled.bound, scale * got.bound, rel_tol=1e-6)
    assert got.bound >= math.exp(float(np.mean(np.log(errors)))) * (1 - ROUNDING)


@pytest.mark.parametrize("samples", [2, 3, 30])
def test_bound_holds_for_new_samples_of_a_lognormal_error(samples: int) -> None:
    draw = np.random.default_rng(0)
    trials = np.exp(draw.normal(-4.0, 0.7, (4000, samples + 1)))
    below = [row[0] <= ErrorSummary.of(row[1:].tolist()).bound for row in trials]
    share = float(np.mean(below))
    # Four deviations of a share of 0.99 over 4,000 trials are 0.0063.
    assert abs(share - 0.99) <= 0.0063, f"{share:.4f} of new samples are below the bound"


def test_exact_results_have_a_summary() -> None:
    got = ErrorSummary.of([0.0, 0.0])
    assert (got.mean, got.deviation, got.worst) == (0.0, 0.0, 0.0)
    assert 0.0 <= got.bound <= 1e-11


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 1])
def test_run_that_diverged_is_infinitely_far_off(bad: float, place: int) -> None:
    errors = [0.1, 0.2]
    errors[place] = bad
    got = ErrorSummary.of(errors)
    assert got == ErrorSummary(math.inf, math.inf, math.inf, 2, math.inf)


# --- the front ----------------------------------------------------------------------------------


def points_of(pairs: Sequence[tuple[float, float]]) -> list[FrontPoint]:
    like = front_of((0.5,), (0.1,), choice=0).points[0]
    return [
        replace(like, cost=cost, error=replace(like.error, mean=error)) for cost, error in pairs
    ]


def beats(one: FrontPoint, other: FrontPoint) -> bool:
    """At least as good in both, better in one."""
    mine, its = (one.cost, one.error.mean), (other.cost, other.error.mean)
    return mine != its and mine[0] <= its[0] and mine[1] <= its[1]


# Few values, so that there are many ties.
coordinates = st.one_of(st.sampled_from([0.1, 0.2, 0.3, 0.5]), st.floats(0.0, 1.0))


@settings(max_examples=200, deadline=None)
@given(pairs=st.lists(st.tuples(coordinates, coordinates), max_size=25))
def test_front_is_what_nothing_beats(pairs: list[tuple[float, float]]) -> None:
    points = points_of(pairs)
    front = pareto(points)
    kept = [(point.cost, point.error.mean) for point in front]
    assert not any(beats(one, other) for one in points for other in front)
    for point in points:  # every other one is beaten, or equal to one that is there
        pair = point.cost, point.error.mean
        assert pair in kept or any(beats(one, point) for one in front)
    assert len(set(kept)) == len(kept)
    costs, errors = [cost for cost, _ in kept], [error for _, error in kept]
    assert costs == sorted(costs)
    assert errors == sorted(errors, reverse=True)
    assert all(any(point is one for one in points) for point in front)


def test_front_of_nothing_is_empty() -> None:
    assert pareto([]) == ()


def test_point_that_diverged_hides_no_other() -> None:
    good = points_of([(0.3, 0.1)])[0]
    lost = replace(good, cost=0.2, error=ErrorSummary.of([math.nan, 0.1]))
    assert pareto([lost, good]) == (lost, good)
    assert pareto([replace(lost, cost=0.4), good]) == (good,)


@pytest.mark.parametrize(
    ("schedule", "label"),
    [
        ((R, F, F, R, F), "2 REFRESH + 3 FORECAST"),
        ((R, U, C, F, R, C), "2 REFRESH + 2 CALIBRATE + 1 REUSE + 1 FORECAST"),
        ((R,), "1 REFRESH"),
        ((R, *(U,) * 12), "1 REFRESH + 12 REUSE"),
    ],
)
def test_label_counts_the_steps_of_every_mode(schedule: tuple[StepMode, ...], label: str) -> None:
    assert replace(points_of([(0.1, 0.1)])[0], schedule=schedule).label == label
