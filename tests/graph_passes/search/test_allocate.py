"""Water-filling against brute force over all combinations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calicache.graph_passes import CalibrationTarget, Granularity, SiteMode, SiteRule
from calicache.graph_passes.search.allocate import (
    MULTIPLE,
    Allocation,
    BranchOption,
    RankCurve,
    allocate,
)
from calicache.graph_passes.settings.latency import BranchChoice

FULL, LINEAR, INT8, BRANCH, REUSE = BranchChoice
seeds = st.integers(0, 2**31)
# Sums of fewer than 20 doubles; a price within 1e-15 of where two choices tie may take either.
EXACT = {"rel_tol": 1e-9, "abs_tol": 1e-12}

Options = dict[str, list[BranchOption]]
Point = tuple[float, float]  # cost, error


def target_of(name: str, width: int = 24, outs: Sequence[int] = (24,)) -> CalibrationTarget:
    return CalibrationTarget(
        name=name,
        granularity=Granularity.LINEAR,
        sites=(name,),
        input_node="x",
        nodes=tuple(f"{name}_{k}" for k in range(len(outs))),
        weights=(),
        in_features=width,
        out_features=tuple(outs),
        tokens=10,
        rank=width,
    )


def curve_of(name: str, errors: Sequence[float]) -> RankCurve:
    return RankCurve(target_of(name), tuple(errors))


def random_options(seed: int) -> Options:
    """One to three branches with two to four choices each; errors at any rank, not even falling."""
    draw = np.random.default_rng(seed)
    options: Options = {}
    for number in range(draw.integers(1, 4)):
        name = f"blocks.{number}"
        places = draw.integers(1, 5)
        layers = [
            (10.0 ** draw.uniform(-4, 2, places)).tolist() for _ in range(draw.integers(1, 3))
        ]
        whole = curve_of(name, (10.0 ** draw.uniform(-4, 2, places)).tolist())
        saved, per_mac = draw.uniform(0.05, 0.3), draw.uniform(1e-6, 2e-5)
        curves = tuple(curve_of(f"{name}.{k}", errors) for k, errors in enumerate(layers))
        extra = [
            BranchOption(LINEAR, -0.8 * saved, per_mac, curves, (name,)),
            BranchOption(BRANCH, -saved, per_mac, (whole,), (name,)),
            BranchOption(REUSE, -saved * draw.uniform(0.9, 1.1), per_mac, (whole,), (name,)),
        ]
        picks = draw.permutation(3)[: draw.integers(1, 4)]
        full = BranchOption(FULL, 0.0, patterns=(name,))
        options[name] = [full, *(extra[k] for k in sorted(picks))]
    return options


def branch_points(options: Sequence[BranchOption]) -> Iterator[tuple[Point, str, dict[str, int]]]:
    """Cost, error, choice and ranks of all that can be done with one branch."""
    for option in options:
        only_zero = option.choice is REUSE
        lengths = [1 if only_zero else len(curve.errors) for curve in option.curves]
        for places in itertools.product(*map(range, lengths)):
            cost, error, ranks = option.cost, 0.0, dict[str, int]()
            for curve, place in zip(option.curves, places, strict=True):
                target = curve.target
                width = target.in_features + sum(target.out_features)
                cost += option.per_mac * 8 * place * target.tokens * width
                error += curve.errors[place]
                if not only_zero:
                    ranks[target.name] = 8 * place
            yield (cost, error), option.choice, ranks


def all_points(options: Options, full: float) -> list[Point]:
    """Of all combinations."""
    points = []
    for chosen in itertools.product(*(list(branch_points(o)) for o in options.values())):
        points.append((full + sum(p[0][0] for p in chosen), sum(p[0][1] for p in chosen)))
    return points


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """Corners where the error falls, by rising cost: Andrew's monotone chain."""
    corners: list[Point] = []
    for cost, error in sorted(points):
        if corners and error >= corners[-1][1]:
            continue
        while len(corners) > 1:
            (a, b), (c, d) = corners[-2:]
            if (c - a) * (error - b) > (d - b) * (cost - a):  # turns left: convex
                break
            corners.pop()
        corners.append((cost, error))
    return corners


# --- a whole allocation against brute force -----------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(seed=seeds, share=st.floats(-0.1, 1.1))
def test_result_is_the_dearest_corner_of_the_lower_hull_that_fits(seed: int, share: float) -> None:
    options = random_options(seed)
    corners = lower_hull(all_points(options, 1.0))
    low, high = corners[0][0], corners[-1][0]
    wanted = low + share * (high - low + 1e-3)
    got = allocate(options, wanted)
    fitting = [corner for corner in corners if corner[0] <= wanted] or corners[:1]
    assert math.isclose(got.cost, fitting[-1][0], **EXACT)
    assert math.isclose(got.error, fitting[-1][1], **EXACT)


@settings(max_examples=100, deadline=None)
@given(seed=seeds, wanted=st.floats(0.0, 1.5))
def test_never_costs_more_than_the_target_when_something_fits(seed: int, wanted: float) -> None:
    options = random_options(seed)
    points = all_points(options, 1.0)
    least = min(cost for cost, _ in points)
    got = allocate(options, wanted)
    if least <= wanted:
        assert got.cost <= wanted
    else:  # sums in another order
        assert math.isclose(got.cost, least, **EXACT)
    for cost, error in points:  # none that costs as little has a smaller error
        assert cost > got.cost - 1e-9 or error > got.error or math.isclose(error, got.error)


@settings(max_examples=100, deadline=None)
@given(seed=seeds, one=st.floats(0.0, 1.2), other=st.floats(0.0, 1.2))
def test_error_falls_and_cost_rises_with_the_target(seed: int, one: float, other: float) -> None:
    options = random_options(seed)
    less, more = (allocate(options, wanted) for wanted in sorted((one, other)))
    assert less.cost <= more.cost
    assert less.error >= more.error


@settings(max_examples=60, deadline=None)
@given(seed=seeds, wanted=st.floats(0.2, 1.2))
def test_parts_of_the_result_add_up_to_it(seed: int, wanted: float) -> None:
    options = random_options(seed)
    got = allocate(options, wanted)
    assert list(got.choices) == list(options)
    assert all(type(rank) is int and rank % 8 == 0 for rank in got.ranks.values())
    cost, error, expected = 1.0, 0.0, dict[str, int]()
    for name, choices in options.items():
        for point, choice, ranks in branch_points(choices):
            if choice == got.choices[name] and ranks.items() <= got.ranks.items():
                cost, error = cost + point[0], error + point[1]
                expected |= ranks
                break
    assert got.ranks == expected
    assert math.isclose(got.cost, cost, **EXACT)
    assert math.isclose(got.error, error, **EXACT)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, wanted=st.floats(0.2, 1.2), full=st.floats(0.3, 1.5))
def test_full_is_what_savings_are_taken_from(seed: int, wanted: float, full: float) -> None:
    options = random_options(seed)
    moved, plain = allocate(options, wanted + full - 1.0, full), allocate(options, wanted)
    corners = [corner[0] for corner in lower_hull(all_points(options, 1.0))]
    if any(math.isclose(corner, wanted, rel_tol=1e-9) for corner in corners):
        return  # rounding decides
    assert (moved.choices, moved.ranks) == (plain.choices, plain.ranks)
    assert math.isclose(moved.cost, plain.cost + full - 1.0, **EXACT)
    assert moved.error == plain.error


def test_nothing_to_choose_costs_a_full_step() -> None:
    assert allocate({}, 0.5) == Allocation((), {}, {}, 1.0, 0.0)
    assert allocate({"a": [BranchOption(FULL, 0.0, patterns=("a",))]}, 0.1, 0.9) == Allocation(
        (SiteRule("a", SiteMode.FULL),), {}, {"a": FULL}, 0.9, 0.0
    )


# --- what the choices become --------------------------------------------------------------------


def whole(name: str, errors: Sequence[float], choice: BranchChoice) -> BranchOption:
    return BranchOption(choice, -0.2, 1e-6, (curve_of(name, errors),), (name,))


def layers(name: str, errors: Sequence[float], cost: float) -> BranchOption:
    curves = (curve_of(f"{name}.q+k+v", errors), curve_of(f"{name}.proj", errors))
    return BranchOption(LINEAR, cost, 1e-6, curves, (name,))


def one_of_each() -> Options:
    """In every branch one choice is far better than the others at any sensible price."""
    good, bad = (1.0, 1e-6, 1e-7), (1e3, 1e3, 1e3)
    full = {
        name: BranchOption(FULL, 0.0, patterns=(name,))
        for name in ("kept", "layers", "map", "anchor")
    }
    return {
        "kept": [full["kept"], layers("kept", bad, -0.2), whole("kept", bad, BRANCH)],
        "layers": [full["layers"], layers("layers", good, -0.2)],
        "map": [full["map"], layers("map", good, -0.1), whole("map", good, BRANCH)],
        "anchor": [full["anchor"], whole("anchor", (1e-6,), REUSE)],
        "site": [BranchOption(FULL, 0.0, patterns=("one", "two"))],
    }


def test_choices_become_rules_and_ranks_by_target_name() -> None:
    got = allocate(one_of_each(), 0.414)  # not enough for a rank of 16 anywhere
    assert got.choices == {
        "kept": FULL,
        "layers": LINEAR,
        "map": BRANCH,
        "anchor": REUSE,
        "site": FULL,
    }
    assert got.rules == (
        SiteRule("kept", SiteMode.FULL),
        SiteRule("map", SiteMode.CALIBRATE, granularity=Granularity.BRANCH),
        SiteRule("anchor", SiteMode.REUSE),
        SiteRule("one", SiteMode.FULL),
        SiteRule("two", SiteMode.FULL),
    )
    assert dict(got.ranks) == {"layers.q+k+v": 8, "layers.proj": 8, "map": 8}
    # Three savings of 0.2, three maps of rank 8 over 10 tokens of 24 and 24 channels.
    assert math.isclose(got.cost, 1.0 - 0.6 + 3 * 1e-6 * 10 * 8 * 48, **EXACT)
    assert math.isclose(got.error, 4e-6, **EXACT)


def test_cheapest_choices_are_taken_where_nothing_fits() -> None:
    got = allocate(one_of_each(), 0.01)
    assert math.isclose(got.cost, 0.2, **EXACT)
    assert got.choices["kept"] is not FULL
    assert set(got.ranks.values()) == {0}
    # The least error at that cost: the whole branch has one map that goes without, its layers two.
    assert got.choices["kept"] is BRANCH


def test_with_all_the_cost_of_a_full_step_nothing_is_off() -> None:
    got = allocate(one_of_each(), 1.0)
    assert set(got.choices.values()) == {FULL}
    assert (got.cost, got.error, dict(got.ranks)) == (1.0, 0.0, {})


# --- the curve of one target --------------------------------------------------------------------


def test_curve_is_what_every_eighth_rank_leaves_out() -> None:
    spectrum = torch.tensor([float(k) for k in range(20, 0, -1)])  # 20, 19, .. 1
    curve = RankCurve.of(target_of("a", 20, (12, 12)), spectrum, 0.5, unexplained=3.0)
    # Sums 1 .. 20, 1 .. 12 and 1 .. 4.
    assert curve.errors == (0.5 * (210 + 3), 0.5 * (78 + 3), 0.5 * (10 + 3))
    assert curve.macs_per_place == 8 * 10 * (20 + 24)


@pytest.mark.parametrize(
    ("width", "outs", "directions", "places"),
    [
        (24, (24,), 24, 4),  # 0, 8, 16, 24
        (24, (15,), 15, 2),  # no rank above the smaller side
        (23, (64,), 23, 3),
        (64, (8, 8), 16, 3),  # a group's outputs together
        (7, (7,), 7, 1),
        (24, (24,), 9, 2),  # fewer directions than channels
    ],
)
def test_curve_ends_at_the_largest_multiple_of_8(
    width: int, outs: tuple[int, ...], directions: int, places: int
) -> None:
    curve = RankCurve.of(target_of("a", width, outs), torch.ones(directions), 1.0)
    assert curve.errors == tuple(float(directions - 8 * place) for place in range(places))


@settings(max_examples=60, deadline=None)
@given(seed=seeds, directions=st.integers(1, 60), gain=st.floats(1e-9, 1e6), left=st.floats(0, 10))
def test_curve_falls_to_what_nothing_explains(
    seed: int, directions: int, gain: float, left: float
) -> None:
    draw = np.random.default_rng(seed)
    spectrum = np.sort(10.0 ** draw.uniform(-9, 3, directions))[::-1].astype(np.float32)
    target = target_of("a", directions, (directions,))
    curve = RankCurve.of(target, torch.from_numpy(spectrum.copy()), gain, left)
    energies = spectrum.astype(float)
    energies[energies <= 1e-7 * energies.sum()] = 0.0  # the rounding of float32 moments
    exact = [gain * (math.fsum(energies[8 * k :]) + left) for k in range(99)]
    # Tails are differences of float64 sums, known to 1e-16 of the whole.
    slack = gain * 1e-13 * float(spectrum.astype(float).sum())
    assert len(curve.errors) == directions // MULTIPLE + 1
    for got, expected in zip(curve.errors, exact, strict=False):
        assert math.isclose(got, expected, rel_tol=1e-12, abs_tol=slack)
    assert list(curve.errors) == sorted(curve.errors, reverse=True)


def test_directions_of_rounding_energy_are_not_worth_a_rank() -> None:
    spectrum = torch.tensor([1.0] * 8 + [1e-8] * 16)
    curve = RankCurve.of(target_of("a", 24, (24,)), spectrum, 1.0)
    assert curve.errors == (8.0, 0.0, 0.0, 0.0)
    assert curve.cheapest(price=1e-12, per_mac=1e-12) == 1


@settings(max_examples=80, deadline=None)
@given(seed=seeds, places=st.integers(1, 9), price=st.floats(1e-6, 1e6))
def test_cheapest_place_is_the_least_of_error_and_price(
    seed: int, places: int, price: float
) -> None:
    errors = (10.0 ** np.random.default_rng(seed).uniform(-6, 6, places)).tolist()
    curve, per_mac = curve_of("a", errors), 1e-4
    totals = [e + price * per_mac * 8 * 10 * 48 * k for k, e in enumerate(errors)]
    assert math.isclose(totals[curve.cheapest(price, per_mac)], min(totals), **EXACT)


def test_target_that_does_not_matter_gets_no_rank() -> None:
    curve = RankCurve.of(target_of("a"), torch.ones(24), 0.0)
    assert curve.cheapest(1e-9, 1e-9) == 0
    assert curve.errors == (0.0,) * 4
