"""Where timesteps lie among the recorded ones, and how far latents may move between them."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch

from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.recording.grid import (
    MAX_CHANGE,
    Grid,
    best_grid,
    grid_of,
    relative_change,
    whole_grid,
)
from calicache.graph_passes.recording.recorder import Recorder

DOWN = Grid((900.0, 700.0, 400.0, 100.0), (0.0, 0.1, 0.2, 0.3))
UP = Grid((0.0, 0.25, 0.5, 1.0), (0.0, 0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("timestep", "place"),
    [
        (900.0, 0.0),
        (400.0, 2.0),
        (100.0, 3.0),
        (800.0, 0.5),
        (250.0, 2.5),
        (1000.0, -0.5),  # the first two are 200 apart
        (70.0, 3.1),  # the last two are 300 apart
    ],
)
def test_places_of_timesteps_that_fall(timestep: float, place: float) -> None:
    assert DOWN.place(timestep) == pytest.approx(place, abs=1e-12)


@pytest.mark.parametrize(("timestep", "place"), [(0.25, 1.0), (0.75, 2.5), (-0.25, -1.0), (2, 5)])
def test_places_of_timesteps_that_rise(timestep: float, place: float) -> None:
    assert UP.place(timestep) == pytest.approx(place, abs=1e-12)


def test_recorded_timesteps_are_known_up_to_rounding() -> None:
    for step, value in enumerate(DOWN.timesteps):
        assert DOWN.place(value + 5e-4) == step  # of 900, float32 rounds at 5e-5
        assert DOWN.place(value + 5e-3) != step


def test_one_timestep_has_one_place() -> None:
    grid = Grid((5.0, 5.0), (0.0, 0.1))
    assert [grid.place(value) for value in (7.0, 5.0, 1.0)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("place", "before", "now", "expected"),
    [
        (0.0, 900.0, 700.0, 1.0),
        (0.0, 900.0, 400.0, 2.0),  # a coarser sampler leaves steps out
        (0.0, 900.0, 800.0, 0.5),
        (1.0, 700.0, 700.0, None),
        (1.0, 700.0, 900.0, None),
        (3.0, 100.0, 99.0, 3 + 1 / 300),
    ],
)
def test_what_may_follow_lies_later(
    place: float, before: float, now: float, expected: float | None
) -> None:
    following = DOWN.following(place, before, now)
    assert following == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_a_timestep_that_was_recorded_twice_may_follow_itself_once() -> None:
    heun = Grid((9.0, 6.0, 6.0, 3.0), (0.0, 0.1, 0.1, 0.1))
    assert heun.following(0.0, 9.0, 6.0) == 1.0
    assert heun.following(1.0, 6.0, 6.0) == 2.0
    assert heun.following(2.0, 6.0, 6.0) is None
    assert heun.following(2.0, 6.0, 3.0) == 3.0


def test_without_a_timestep_steps_are_counted_to_the_last() -> None:
    grid = Grid((), (0.0, 0.1, 0.1))
    assert [grid.following(step, None, None) for step in (0.0, 1.0, 2.0)] == [1.0, 2.0, None]


def test_another_number_of_steps_is_counted() -> None:
    grid = DOWN.counted(7)
    assert (grid.timesteps, grid.steps) == ((), 7)
    # Half of a recorded step each.
    assert grid.changes == pytest.approx((0.0, 0.05, 0.05, 0.1, 0.1, 0.15, 0.15), abs=1e-12)
    assert DOWN.counted(2).changes == pytest.approx((0.0, 0.6), abs=1e-12)
    assert DOWN.counted(1).changes == (0.0,)
    assert [grid.following(k, 9.0, 3.0) for k in (0.0, 5.0, 6.0)] == [1.0, 6.0, None]


@pytest.mark.parametrize(
    ("before", "place", "change"),
    [
        (0.0, 1.0, 0.1),
        (0.0, 2.0, 0.3),
        (1.0, 1.5, 0.1),
        (0.5, 2.5, 0.05 + 0.2 + 0.15),
        (2.0, 4.0, 0.6),  # beyond the end at the last pace
        (-1.0, 0.0, 0.1),  # before the start at the first
    ],
)
def test_latents_reach_five_times_as_far_as_recorded(
    before: float, place: float, change: float
) -> None:
    assert DOWN.reach(before, place) == pytest.approx(min(5 * change, 1.2), rel=1e-12)


def test_latents_never_reach_another_noise_but_where_recorded_steps_do() -> None:
    long = Grid((4.0, 3.0, 2.0, 1.0), (0.0, 0.8, 1.2, 1e-4))
    # Two draws of noise are 1.41 apart.
    assert long.reach(0, 1) == 1.2
    assert long.reach(0, 1.25) == 1.2
    assert long.reach(1, 3) == inf
    assert long.reach(2, 3) == 0.05


class Both(torch.nn.Module):
    """Something that is called with a latent and a time."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x + t


def recording_of(*runs: tuple[float, ...]) -> Recorder:
    """Runs whose latent has these values, at timesteps that fall by one."""
    recorder = Recorder()
    model = Both()
    for run in runs:
        for step, value in enumerate(run):
            x = torch.tensor([[value, 0.0]])
            recorder.append(model, (x, torch.tensor(9.0 - step)), {})
    return recorder


def test_a_grid_has_the_longest_run_and_the_largest_changes() -> None:
    grid = grid_of(recording_of((4.0, 3.0, 3.3), (1.0, 1.1)))
    assert grid.timesteps == (9.0, 8.0, 7.0)
    # |3 - 4| / 4 and |1.1 - 1| / 1; |3.3 - 3| / 3, of float32 numbers.
    assert grid.changes == pytest.approx((0.0, 0.25, 0.1), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64, torch.int32])
def test_changes_are_relative_over_all_latents(dtype: torch.dtype) -> None:
    before = {"a": torch.tensor([3, 0]).to(dtype), "b": torch.tensor([4]).to(dtype)}
    now = {"a": torch.tensor([3, 3]).to(dtype), "b": torch.tensor([0]).to(dtype)}
    assert relative_change(before, now) == pytest.approx(1.0, rel=1e-6)  # sqrt(9 + 16) / 5


def test_changes_are_finite_numbers() -> None:
    zero, one, odd = torch.zeros(2), torch.ones(2), torch.tensor([nan, inf])
    assert relative_change({"x": zero}, {"x": zero}) == 0.0
    assert relative_change({"x": zero}, {"x": one}) == MAX_CHANGE
    for pair in ((odd, one), (one, odd), (odd, odd)):
        assert 0.0 <= relative_change({"x": pair[0]}, {"x": pair[1]}) <= MAX_CHANGE


@pytest.mark.parametrize(
    ("timesteps", "changes"),
    [((3.0, 1.0, 2.0), (0.0,) * 3), ((3.0, 1.0), (0.0,) * 3), ((), ())],
)
def test_numbers_that_are_no_grid_are_refused(
    timesteps: tuple[float, ...], changes: tuple[float, ...]
) -> None:
    with pytest.raises(PlanError, match="grid"):
        Grid(timesteps, changes)


# --- several grids -------------------------------------------------------------------------------

SHORT, LONG = (
    Grid((1000.0, *rest), (0.0,) * (len(rest) + 1)) for rest in ((500.0,), (750, 500, 250))
)
TWICE = Grid((9.0, 6.0, 6.0, 3.0), (0.0, 0.1, 0.1, 0.1))


@pytest.mark.parametrize(
    ("grid", "timesteps", "held"),
    [
        (DOWN, (900.0, 700.0, 400.0, 100.0), True),
        (DOWN, (700.0, 400.0), True),
        (DOWN, (400.0004, 100.0), True),  # of 900, float32 rounds at 5e-5
        (DOWN, (700.0, 100.0), False),
        (DOWN, (100.0, 50.0), False),
        (DOWN, (400.0, 700.0), False),
        (UP, (0.25, 0.5), True),
        (TWICE, (6.0, 3.0), True),
        (TWICE, (6.0, 6.0, 3.0), True),
        (TWICE, (9.0, 6.0, 3.0), False),
        (Grid((), (0.0, 0.1)), (5.0, 4.0), True),  # whose steps are counted
        (Grid((), (0.0, 0.1)), (5.0, 4.0, 3.0), False),
    ],
)
def test_timesteps_one_after_another_are_held(
    grid: Grid, timesteps: tuple[float, ...], held: bool
) -> None:
    assert grid.holds(timesteps) == held


@pytest.mark.parametrize(
    ("timesteps", "best"),
    [
        ((1000.0,), (0, True)),  # both begin so
        ((1000.0, 500.0), (0, False)),
        ((1000.0, 750.0), (1, False)),
        ((250.0,), (1, False)),
        ((500.0,), (0, True)),
        ((800.0,), (0, True)),  # none has it, and one timestep has no length of a step
        ((800.0, 550.0), (1, False)),
        ((800.0, 280.0), (0, False)),
        ((1000.0, 900.0, 800.0), (1, False)),
    ],
)
def test_the_grid_that_holds_timesteps_is_the_best_or_the_one_with_such_steps(
    timesteps: tuple[float, ...], best: tuple[int, bool]
) -> None:
    assert best_grid((SHORT, LONG), timesteps) == best
    assert best_grid((LONG,), timesteps) == (0, False)


def test_of_two_grids_with_whole_timesteps_the_one_that_ends_with_them_counts() -> None:
    begun = Grid((1000.0, 750.0), (0.0, 0.1))
    assert whole_grid((LONG, begun), (1000.0, 750.0)) == (1, True)
    assert whole_grid((LONG, begun), (1000.0, 750.0, 500.0)) == (0, True)  # broken off
    assert whole_grid((LONG, begun), (500.0, 250.0)) == (0, True)
    assert whole_grid((SHORT, LONG), (1000.0, 700.0, 400.0, 100.0)) == (1, False)
    assert whole_grid((Grid((), (0.0, 0.1)),), (3.0, 2.0, 1.0)) == (0, False)


def test_timesteps_between_the_first_and_the_last_are_spanned() -> None:
    assert [DOWN.spans(value) for value in (901.0, 900.0, 300.0, 99.0)] == [
        False,
        True,
        True,
        False,
    ]
    assert Grid((), (0.0, 0.1)).spans(-5.0)


@pytest.mark.parametrize(("ahead", "place"), [(1, 2.0), (2, 3.0), (3, None)])
def test_where_steps_are_counted_an_index_says_how_many(ahead: int, place: float | None) -> None:
    assert Grid((), (0.0, 0.1, 0.1, 0.1)).following(1.0, None, None, ahead) == place
