"""Which input counts down, how often the model is called in a step, and where runs end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from calicache.graph_passes.common.errors import RunError
from calicache.graph_passes.recording.timestep import Timestep, cut_runs, find_timestep, one_number

DOWN = [9.0, 7.0, 4.0, 1.0]
NAMES = ("latent", "timestep")
Calls = list[dict[str, Tensor]]


def calls(times: Sequence[float], **more: Sequence[float]) -> Calls:
    """A latent that differs from call to call, times, and other inputs that are one number."""
    draw = torch.Generator().manual_seed(0)
    series = []
    for place, time in enumerate(times):
        call = {"latent": torch.randn(2, 3, generator=draw), "timestep": torch.full((2,), time)}
        call |= {name: torch.tensor(values[place]) for name, values in more.items()}
        series.append(call)
    return series


def find(times: Sequence[float], *ends: int) -> Timestep | None:
    return find_timestep(NAMES, calls(times), ends)


def lengths(times: Sequence[float], *ends: int) -> list[int]:
    series = calls(times)
    return [len(run) for run in cut_runs(find_timestep(NAMES, series, ends), series, ends)]


def repeated(times: Sequence[float], each: int) -> list[float]:
    return [time for time in times for _ in range(each)]


@pytest.mark.parametrize("steps", [2, 4])
def test_labels_of_three_calls_are_no_timestep_where_ends_are_known(steps: int) -> None:
    times = repeated(DOWN[:steps], 3) * 2
    series = calls(times, label=[0.0, 1.0, 2.0] * (len(times) // 3))
    ends = (len(times) // 2, len(times))
    timestep = find_timestep((*NAMES, "label"), series, ends)
    assert timestep is not None
    assert (timestep.name, timestep.calls) == ("timestep", 3)


@pytest.mark.parametrize("rows", [[], [1.0, 2.0]])
def test_a_call_has_one_timestep(rows: list[float]) -> None:
    with pytest.raises(RunError, match=f"one timestep in a call, got {len(rows)}"):
        Timestep("t", True).value({"t": torch.tensor(rows)})


# --- the input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "descends"), [(DOWN, True), (DOWN[::-1], False)])
def test_it_is_one_number_that_changes_one_way(times: list[float], descends: bool) -> None:
    timestep = find(times)
    assert timestep == Timestep("timestep", descends)
    assert timestep is not None
    assert (timestep.repeats, timestep.calls) == (False, 1)


def test_it_is_the_one_that_changes_most_often() -> None:
    series = calls(DOWN, scale=[1.0, 1.0, 2.0, 2.0], sigma=[5.0, 4.0, 3.0, 3.0])
    assert find_timestep(list(series[0]), series, ()) == Timestep("timestep", True)
    # The first of two that change as often.
    series = calls(DOWN, sigma=[0.1, 0.4, 0.7, 0.9])
    assert find_timestep(["sigma", "timestep"], series, ()) == Timestep("sigma", False)
    assert find_timestep(["timestep", "sigma"], series, ()) == Timestep("timestep", True)


@pytest.mark.parametrize("runs", [1, 2, 3])
@pytest.mark.parametrize("times", [DOWN, [9.0, 1.0], DOWN[::-1]])
def test_a_label_that_alternates_between_the_calls_of_a_step_is_none(
    times: list[float], runs: int
) -> None:
    each = repeated(times, 2) * runs
    labels = [3.0, 10.0] * (len(each) // 2)
    series = calls(each, label=labels)
    for names in (["label", "timestep"], ["timestep", "label"]):
        timestep = find_timestep(names, series, ())
        assert timestep == Timestep("timestep", times[0] > times[-1], calls=2)


def test_a_run_or_two_do_not_hide_the_direction() -> None:
    assert find([*DOWN, *DOWN, *DOWN]) == Timestep("timestep", True)
    assert find([*DOWN[::-1], *DOWN[::-1]]) == Timestep("timestep", False)


@pytest.mark.parametrize("times", [[3.0], [3.0, 3.0, 3.0], []])
def test_there_is_none_where_nothing_changes(times: list[float]) -> None:
    assert find(times) is None
    assert lengths(times) == [len(times)]


def test_an_input_that_is_one_number_only_at_times_is_none() -> None:
    series = calls(DOWN)
    series[2]["timestep"] = torch.tensor([4.0, 5.0])
    assert find_timestep(NAMES, series, ()) is None


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (torch.tensor(3), 3.0),
        (torch.full((2, 2), 0.5), 0.5),
        (torch.tensor([True, True]), 1.0),
        (torch.tensor([1.0, 2.0]), None),
        (torch.full((2,), float("nan")), None),
        (torch.empty(0), None),
        (torch.ones(2, dtype=torch.complex64), None),
    ],
    ids=str,
)
def test_one_number(value: Tensor, number: float | None) -> None:
    assert one_number(value) == number


# --- calls of a step -----------------------------------------------------------------------------


@pytest.mark.parametrize("times", [DOWN, DOWN[::-1]], ids=["down", "up"])
@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("each", [1, 2, 3])
def test_calls_in_a_row_at_one_time_are_a_step(times: list[float], runs: int, each: int) -> None:
    recorded = repeated(times, each) * runs
    timestep = find(recorded)
    assert timestep is not None
    assert (timestep.calls, timestep.repeats) == (each, each > 1)
    assert timestep == Timestep("timestep", times == DOWN, calls=each)
    assert lengths(recorded) == [each * len(times)] * runs


@pytest.mark.parametrize(
    "times",
    [
        [9.0, 7.0, 7.0, 4.0, 4.0, 1.0, 1.0],
        [9.0, 9.0, 7.0, 7.0, 4.0],
        [9.0, 9.0, 7.0, 7.0, 7.0, 4.0, 4.0],
    ],
    ids=["Heun", "one call at the end", "three once"],
)
def test_times_that_repeat_unevenly_are_one_call_a_step(times: list[float]) -> None:
    timestep = find(times * 2)
    assert timestep is not None
    assert (timestep.calls, timestep.repeats) == (1, True)
    assert lengths(times * 2) == [len(times)] * 2


def test_a_multiple_of_the_calls_is_two_steps_at_one_time() -> None:
    timestep = find([9.0] * 4 + [7.0] * 2 + [4.0] * 2)
    assert timestep is not None
    assert timestep.calls == 2


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_ends_where_the_times_turn_back() -> None:
    assert lengths([*DOWN, *DOWN]) == [4, 4]
    assert lengths([*DOWN[::-1], *DOWN[::-1], *DOWN[::-1]]) == [4, 4, 4]


def test_all_calls_are_kept_in_order() -> None:
    series = calls([*DOWN, *DOWN[:2]])
    runs = cut_runs(find_timestep(NAMES, series, ()), series, ())
    assert [call for run in runs for call in run] == series


def test_a_run_that_was_broken_off_ends_where_the_next_begins() -> None:
    assert lengths([*DOWN[:2], *DOWN]) == [2, 4]
    assert lengths([*DOWN, *DOWN[:3]]) == [4, 3]
    for each in (2, 3):
        times = [*repeated(DOWN[:2], each), *repeated(DOWN, each)]
        assert lengths(times) == [2 * each, 4 * each]
        timestep = find(times)
        assert timestep is not None
        assert timestep.calls == each


def test_the_same_time_again_is_a_new_run_where_none_repeats() -> None:
    once = Timestep("timestep", True)
    assert once.turns_back(9.0, 9.0)
    assert not Timestep("timestep", True, repeats=True).turns_back(9.0, 9.0)
    series = calls([9.0, 9.0])
    assert [len(run) for run in cut_runs(once, series, ())] == [1, 1]


@pytest.mark.parametrize("descends", [True, False])
def test_times_turn_back_against_their_direction_alone(descends: bool) -> None:
    timestep = Timestep("timestep", descends)
    assert timestep.turns_back(5.0, 6.0) == descends
    assert timestep.turns_back(6.0, 5.0) == (not descends)


def test_a_result_ends_a_run_that_the_times_do_not() -> None:
    times = [9.0, 7.0, 4.0, 3.0, 2.0]  # the second run starts below the end of the first
    assert lengths(times) == [5]
    assert lengths(times, 3) == [3, 2]
    assert lengths([3.0] * 4, 2) == [2, 2]  # without a timestep nothing else tells


def test_a_result_where_the_times_turn_back_ends_one_run() -> None:
    assert lengths([*DOWN, *DOWN], 4) == [4, 4]
    assert lengths([*DOWN, *DOWN], 4, 8) == [4, 4]  # the last has no call behind it


def test_a_result_tells_runs_apart_whose_times_touch() -> None:
    # Ends and starts at 4: four calls in a row at one time are two steps of two runs.
    times = repeated([9.0, 4.0], 2) + repeated([4.0, 1.0], 2)
    assert lengths(times, 4) == [4, 4]
    timestep = find(times, 4)
    assert timestep is not None
    assert timestep.calls == 2
