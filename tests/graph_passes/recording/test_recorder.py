"""What a recording says of itself: computed once, anew where it has grown, or with steps in one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calicache.graph_passes.common.errors import DependenceError, NoSampler, RecordError
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.recorder import Recorder, record
from calicache.graph_passes.recording.recording import Recording

DERIVED = ("timestep", "denoisings", "runs", "run_outputs", "ends", "steps", "dependence")
TIMES = (9.0, 5.0, 1.0)


class Denoiser(nn.Module):
    """Takes what real ones take; what it computes does not matter here."""

    def forward(self, x: Tensor, timestep: Tensor, cond: Any = None) -> tuple[Any, ...]:
        return x, timestep, cond


def add_call(recorder: Recorder, time: float, cond: Tensor | None = None, rows: int = 2) -> None:
    call = {"x": torch.randn(rows, 3), "timestep": torch.full((rows,), time)}
    recorder.append(Denoiser(), (), {**call, "cond": cond})


def recorded(runs: int = 1, conditions: Sequence[Tensor] = (), *, finish: bool = True) -> Recorder:
    """Runs over `TIMES`; with conditions, a step calls once for each of them."""
    recorder = Recorder()
    for run in range(runs):
        for time in TIMES:
            for cond in conditions or (None,):
                add_call(recorder, time, cond)
        if finish:
            recorder.finish(torch.full((2, 3), float(run)))
    return recorder


def derived(recording: Recording) -> dict[str, Any]:
    return {name: getattr(recording, name) for name in DERIVED}


# --- computed once --------------------------------------------------------------------------------


def test_what_is_read_twice_is_one_object() -> None:
    recorder = recorded(2)
    first = derived(recorder)
    assert all(value is first[name] for name, value in derived(recorder).items())
    assert (len(first["runs"]), first["steps"]) == (2, 3)


def test_a_loaded_recording_computes_the_same_once(tmp_path: Path) -> None:
    recorder = recorded(2)
    recorder.save(tmp_path / "runs")
    loaded = Recording.load(tmp_path / "runs")
    first = derived(loaded)
    assert all(value is first[name] for name, value in derived(loaded).items())
    for name in ("timestep", "steps", "dependence"):
        assert first[name] == getattr(recorder, name)
    assert [len(run) for run in first["runs"]] == [3, 3]


def test_a_recording_takes_neither_calls_nor_results(tmp_path: Path) -> None:
    recorded().save(tmp_path / "runs")
    loaded = Recording.load(tmp_path / "runs")
    assert not hasattr(loaded, "append")
    assert not hasattr(loaded, "finish")
    with pytest.raises(TypeError, match="item assignment"):
        Recording([], None).results[1] = torch.zeros(2, 3)  # type: ignore[index]


# --- growing --------------------------------------------------------------------------------------


def test_a_call_is_seen_in_all_that_was_read_before() -> None:
    recorder = recorded(finish=False)
    before = derived(recorder)
    add_call(recorder, TIMES[0])  # the timestep turns back
    assert [len(run) for run in recorder.runs] == [3, 1]
    assert len(recorder.ends) == 2
    assert [len(run) for run in before["runs"]] == [3]  # what was handed out does not change


def test_a_longer_run_has_more_steps() -> None:
    recorder = recorded(finish=False)
    assert recorder.steps == 3
    add_call(recorder, 0.5)
    assert recorder.steps == 4
    assert len(recorder.calls) == 4


def test_a_result_is_seen_where_none_was() -> None:
    recorder = recorded(finish=False)
    assert recorder.ends == (None,)
    recorder.finish(torch.ones(2, 3))
    (end,) = recorder.ends
    assert end is not None
    assert torch.equal(end, torch.ones(2, 3))


def test_a_second_run_tells_what_one_could_not() -> None:
    """A timestep for every token is latent in one run, and known in advance in two."""
    recorder, mask = Recorder(), torch.tensor([0.0, 1.0, 1.0])
    kinds = []
    for _ in range(2):
        for time in TIMES:
            add_call(recorder, time, time * mask)
        kinds.append(recorder.dependence["cond"])
    assert kinds == [Dependence.LATENT, Dependence.STEP]


def test_calls_inside_the_block_are_seen_there() -> None:
    model = Denoiser()
    with record(model) as recording:
        assert list(recording.calls) == []
        for number, time in enumerate(TIMES, start=1):
            model(torch.randn(2, 3), torch.full((2,), time))
            assert len(recording.calls) == number
        assert recording.steps == 3
    model(torch.randn(2, 3), torch.full((2,), 0.0))
    assert recording.steps == 3


def test_a_refused_call_leaves_everything_as_it_was() -> None:
    recorder = recorded()
    before = derived(recorder)
    with pytest.raises(RecordError, match="argument x"):
        add_call(recorder, 0.5, rows=5)
    assert len(recorder.calls) == 3
    assert all(value is before[name] for name, value in derived(recorder).items())


def test_one_step_tells_no_classes_until_there_is_another() -> None:
    recorder = Recorder()
    add_call(recorder, 9.0)
    with pytest.raises(DependenceError, match="expected a run of at least 2 steps"):
        _ = recorder.dependence
    add_call(recorder, 5.0)
    assert recorder.dependence == {"x": Dependence.LATENT, "timestep": Dependence.STEP}


# --- all calls of a step in one -------------------------------------------------------------------

# Of several numbers each: one number that changes from call to call would count the steps.
PAIR = (torch.arange(8.0).view(2, 4), torch.arange(8.0).view(2, 4) + 1)


def test_one_call_a_step_is_the_recording_itself() -> None:
    recorder = recorded()
    assert recorder.calls_per_step == 1
    assert recorder.by_step() is recorder


def test_two_calls_of_a_step_become_one() -> None:
    recorder = recorded(2, PAIR)
    whole = recorder.by_step()
    assert (recorder.calls_per_step, whole.calls_per_step) == (2, 1)
    assert (len(recorder.calls), len(whole.calls)) == (12, 6)
    assert (len(recorder.runs), len(whole.runs)) == (4, 2)
    assert recorder.steps == whole.steps == 3
    shapes = {spec.name: spec.shape for spec in whole.signature.tensors}
    assert shapes == {"x": (4, 3), "timestep": (4,), "cond": (4, 4)}
    for number, call in enumerate(whole.calls):
        parts = recorder.calls[2 * number : 2 * number + 2]
        for name, value in call.items():
            assert torch.equal(value, torch.cat([part[name] for part in parts]))
    assert list(whole.results) == [3, 6]
    assert [float(end[0, 0]) for end in whole.ends if end is not None] == [0.0, 1.0]


def test_what_has_no_batch_dimension_stays_where_both_calls_agree() -> None:
    shared = torch.arange(5.0)
    whole = recorded(1, (shared, shared.clone())).by_step()
    assert {spec.name: spec.shape for spec in whole.signature.tensors}["cond"] == (5,)
    assert all(torch.equal(call["cond"], shared) for call in whole.calls)


def test_calls_that_differ_in_what_has_no_batch_dimension_are_refused() -> None:
    recorder = recorded(1, (torch.arange(5.0), torch.arange(5.0) + 1))
    with pytest.raises(NoSampler) as refusal:
        recorder.by_step()
    assert refusal.value.reason == (
        "the calls of a step differ in cond, which has no batch dimension"
    )
    assert str(refusal.value).startswith("sampler: recording: expected a sampler whose latents")


# --- some runs ------------------------------------------------------------------------------------


def test_runs_can_be_taken_in_any_order_and_twice() -> None:
    recorder = recorded(3)
    part = recorder.take_runs([2, 0, 2])
    assert [len(run) for run in part.runs] == [3, 3, 3]
    assert [float(end[0, 0]) for end in part.ends if end is not None] == [2.0, 0.0, 2.0]
    for run, place in zip(part.runs, (2, 0, 2), strict=True):
        assert all(a is b for a, b in zip(run, recorder.runs[place], strict=True))
