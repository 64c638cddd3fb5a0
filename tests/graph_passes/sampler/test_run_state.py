"""Which call goes on with which, and what begins anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calicache.graph_passes.recording.binding import Binding, bind
from calicache.graph_passes.recording.grid import Grid
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.recorder import record
from calicache.graph_passes.sampler.run_state import (
    Arrival,
    CallContext,
    CallState,
    HeldInput,
    RunState,
    start_place,
)

TIMES = (9.0, 7.0, 5.0, 3.0)
CLASSES = {"x": Dependence.LATENT, "t": Dependence.STEP, "text": Dependence.RUN}
TEXT = torch.arange(3.0)


class Mean(torch.nn.Module):
    """A model that can be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return x * self.weight + t + text.mean()


def latent(step: float, seed: int = 0) -> Tensor:
    """A latent that moves by 0.1 a step."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 50, generator=draw) + 0.1 * step


@pytest.fixture(scope="module")
def binding() -> Binding:
    model = Mean()
    with record(model) as recording:
        for step, time in enumerate(TIMES):
            model(latent(step), torch.tensor(time), TEXT)
    return bind(model, recording)


def arrival(
    binding: Binding,
    step: float,
    *,
    seed: int = 0,
    time: float | None = None,
    text: Tensor = TEXT,
    form: object = "form",
    name: str | None = None,
    index: int | None = None,
    sigma: float | None = None,
) -> Arrival:
    time = 9.0 - 2 * step if time is None else time
    tensors = {"x": latent(step, seed), "t": torch.tensor(time), "text": text}
    return Arrival.of(tensors, CLASSES, binding.timestep, form, CallContext(name, index, sigma))


def serve(run: RunState, arrival: Arrival, binding: Binding, calls: int = 1) -> CallState:
    """What a model does with a call, but for running it."""
    compiled: Any = None
    follows = run.before(arrival, [binding])
    if follows is None:
        run.make_room(arrival, calls)
        place = start_place(arrival, binding.grid)
        state = CallState(compiled, arrival.kept(), place, {}, (place,), (place,), place)
        run.keep(None, state)
        return state
    before, place = follows
    kept = before.refreshes, before.outputs
    state = CallState(compiled, arrival.kept(), place, {}, *kept, before.start)
    run.keep(before, state)
    return state


def test_steps_one_after_another_are_one_run(binding: Binding) -> None:
    run = RunState()
    states = [serve(run, arrival(binding, step), binding) for step in range(4)]
    assert [(state.place, state.start) for state in states] == [(k, 0) for k in (0, 1, 2, 3)]
    assert len(run.calls) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"text": TEXT + 1},
        {"form": "another"},
        {"name": "uncond"},
        {"time": 9.0},
        {"time": 11.0},
    ],
    ids=str,
)
def test_a_call_that_differs_begins_anew(binding: Binding, change: dict[str, Any]) -> None:
    run = RunState()
    serve(run, arrival(binding, 0), binding)
    serve(run, arrival(binding, 1), binding)
    state = serve(run, arrival(binding, 2, **change), binding)
    assert state.start == state.place
    assert run.before(arrival(binding, 3), [binding]) is None or "time" in change


def test_a_later_start_has_its_own_place(binding: Binding) -> None:
    run = RunState()
    assert serve(run, arrival(binding, 2), binding).start == 2.0
    assert serve(run, arrival(binding, 3), binding).start == 2.0


def test_steps_that_were_not_recorded_lie_between(binding: Binding) -> None:
    run = RunState()
    states = [serve(run, arrival(binding, step), binding) for step in (0, 0.5, 1, 2.5, 4)]
    assert [state.place for state in states] == [0, 0.5, 1, 2.5, 4]
    assert {state.start for state in states} == {0}


def test_calls_of_a_step_keep_apart_by_their_text(binding: Binding) -> None:
    run, texts = RunState(), (TEXT, TEXT + 1)
    for step in range(4):
        order = texts if step != 2 else texts[::-1]  # in whatever order
        for text in order:
            state = serve(run, arrival(binding, step, text=text), binding, calls=2)
            assert (state.place, state.start) == (step, 0)
    assert len(run.calls) == 2


def test_calls_of_a_step_that_are_alike_keep_their_order(binding: Binding) -> None:
    run = RunState()
    for step in range(4):
        for _ in range(2):
            state = serve(run, arrival(binding, step), binding, calls=2)
            assert (state.place, state.start) == (step, 0)


def test_guidance_that_was_not_recorded_gets_a_place_of_its_own(binding: Binding) -> None:
    run = RunState()
    for step in range(4):
        guided = (TEXT, TEXT + 1) if step in (1, 2) else (TEXT,)
        states = [serve(run, arrival(binding, step, text=text), binding) for text in guided]
        assert [state.start for state in states] == [0, 1][: len(guided)]
    # The next run takes the places of both.
    serve(run, arrival(binding, 0, seed=1), binding)
    assert len(run.calls) == 1


def test_guidance_that_comes_back_goes_on_with_its_own(binding: Binding) -> None:
    run = RunState()
    for step in range(4):
        for text in (TEXT, TEXT + 1) if step != 2 else (TEXT,):
            state = serve(run, arrival(binding, step, text=text), binding, calls=2)
            assert (state.place, state.start) == (step, 0)


def test_names_tell_calls_apart_that_are_alike(binding: Binding) -> None:
    run = RunState()
    for step in range(4):
        names = ("cond", "uncond") if step % 2 else ("uncond", "cond")
        for name in names:
            serve(run, arrival(binding, step, name=name), binding, calls=2)
    assert {(state.arrival.context.name, state.start) for state in run.calls} == {
        ("cond", 0),
        ("uncond", 0),
    }


def test_an_index_or_a_sigma_that_turns_back_begins_anew(binding: Binding) -> None:
    run = RunState()
    said: list[tuple[dict[str, Any], bool]] = [
        ({"index": 0, "sigma": 0.9}, True),
        ({"index": 1, "sigma": 0.7}, False),
        ({}, False),  # nothing is said
        ({"index": 5, "sigma": 0.5}, False),
    ]
    for step, (context, begins) in enumerate(said):
        state = serve(run, arrival(binding, step, **context), binding)
        assert (state.start == state.place) == begins
    for context in ({"index": 5}, {"index": 4}, {"sigma": 0.6}):
        assert run.before(arrival(binding, 3.5, **context), [binding]) is None
    for context in ({"index": 6}, {"sigma": 0.5}, {"sigma": 0.1}, {}):
        assert run.before(arrival(binding, 3.5, **context), [binding]) is not None


def test_where_nothing_counts_the_steps_an_index_does(binding: Binding) -> None:
    counted = replace(binding, timestep=None, grid=Grid((), (0.0, 0.1, 0.1, 0.1)))
    run = RunState()
    told = [serve(run, arrival(counted, k, index=k), counted) for k in (1, 3)]
    assert [(state.place, state.start) for state in told] == [(1, 1), (3, 1)]
    again = serve(run, arrival(counted, 3.5, index=2), counted)
    assert (again.place, again.start) == (2, 2)
    silent = serve(run, arrival(counted, 4), counted)
    assert (silent.place, silent.start) == (3, 2)


def test_every_call_goes_on_under_its_own_recipe(binding: Binding) -> None:
    fine = replace(binding, grid=Grid((9.0, 8.0, 7.0, 6.0), (0.0, 0.1, 0.1, 0.1)))
    run = RunState()
    serve(run, arrival(binding, 0), binding)
    for recipe, place in ((0, 0.5), (1, 1.0)):
        run.calls = [replace(run.calls[0], recipe=recipe)]
        follows = run.before(arrival(binding, 0.5), [binding, fine])
        assert follows is not None
        assert follows[1] == place


def test_runs_in_turn_never_go_on_with_one_another(binding: Binding) -> None:
    """With room for one, each call of the other begins anew: slow, and right."""
    run = RunState()
    for step in range(4):
        for seed in (0, 1):
            assert serve(run, arrival(binding, step, seed=seed), binding).start == step


def test_what_is_gone_is_told_from_what_is_near(binding: Binding) -> None:
    """Two images that are alike: near enough to be one run, and yet two."""
    run = RunState()

    def call(step: int, shift: float) -> Arrival:
        tensors = {"x": latent(step + shift), "t": torch.tensor(9.0 - 2 * step), "text": TEXT}
        return Arrival.of(tensors, CLASSES, binding.timestep, "form")

    serve(run, call(0, 0.0), binding)
    serve(run, call(0, 3.0), binding)
    for step in (1, 2, 3):
        for shift in (0.0, 3.0):
            assert serve(run, call(step, shift), binding).start == step
    assert len(run.calls) == 1
    assert all(state.kept == {} for state in run.gone)


def test_the_same_image_once_more_goes_on_with_itself(binding: Binding) -> None:
    run = RunState()
    for step in (0, 1, 2):
        serve(run, arrival(binding, step), binding)
    for step in (0, 1, 2, 3):
        assert serve(run, arrival(binding, step), binding).start == 0


def test_a_run_broken_off_makes_room(binding: Binding) -> None:
    run = RunState()
    for text in (TEXT, TEXT + 1):
        serve(run, arrival(binding, 0, text=text), binding, calls=2)
    serve(run, arrival(binding, 1), binding, calls=2)
    for text in (TEXT, TEXT + 1):
        serve(run, arrival(binding, 0, seed=1, text=text), binding, calls=2)
    assert [float(state.arrival.latents["x"][0, 0]) for state in run.calls] == [
        float(latent(0, 1)[0, 0])
    ] * 2


def test_a_restart_forgets(binding: Binding) -> None:
    run = RunState()
    serve(run, arrival(binding, 0), binding)
    run.restart()
    assert run == RunState()


def test_latents_are_copies(binding: Binding) -> None:
    run, call = RunState(), arrival(binding, 0)
    serve(run, call, binding)
    call.latents["x"].fill_(100.0)
    assert run.before(arrival(binding, 1), [binding]) is not None


# --- values that stay the same over a run --------------------------------------------------------


def test_a_held_value_is_the_same_where_it_is_equal() -> None:
    value = torch.arange(3.0)
    held = HeldInput.of(value)
    assert held.same(HeldInput.of(value))
    assert held.same(HeldInput.of(value.clone()))
    assert not held.same(HeldInput.of(value + 1))
    assert not held.same(HeldInput.of(torch.arange(4.0)))


def test_a_held_value_that_is_written_to_is_another() -> None:
    value = torch.arange(3.0)
    held = HeldInput.of(value)
    value[0] = 5.0
    assert not held.same(HeldInput.of(value))
    assert not held.same(HeldInput.of(value.clone()))


def test_a_held_value_of_inference_mode_is_compared_by_what_it_was() -> None:
    with torch.inference_mode():
        value = torch.arange(3.0)
        held = HeldInput.of(value)
        assert held.same(HeldInput.of(value))
        value[0] = 5.0
        assert not held.same(HeldInput.of(value))
