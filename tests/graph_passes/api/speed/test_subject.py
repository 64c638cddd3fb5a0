"""Pipelines by duck typing: what is put in place, what is seen of a run, what is left as it was."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from support.small.subjects import STEPS, small_model
from torch import Tensor, nn

from calicache import OptimizedModel, Plan, optimize, record, restore
from calicache.graph_passes.api.speed.runs import KeywordCall, fingerprint, requests_of
from calicache.graph_passes.api.speed.subject import Subject
from calicache.graph_passes.common.errors import PlanError, RecordError


class Scheduler:
    """Euler's method, as the schedulers of diffusers are called."""

    def __init__(self, size: float = 0.1) -> None:
        self.size = size

    def step(self, output: Tensor, sample: Tensor, *, generator: Any = None) -> tuple[Tensor]:
        assert generator is None
        return (sample - self.size * output,)


class Pipeline:
    """As much of a pipeline as speed_up looks at: a model for each half of the run."""

    def __init__(self) -> None:
        self.transformer, self.transformer_2 = small_model(), small_model(seed=1)
        self.scheduler = Scheduler()
        self.seen: list[dict[str, Any]] = []

    def __call__(
        self, prompt: str = "", generator: Any = None, output_type: str = "pil", steps: int = STEPS
    ) -> Tensor:
        self.seen.append({"prompt": prompt, "generator": generator, "output": output_type})
        extra = {"generator": None} if _takes_generator(self.scheduler.step) else {}
        x = torch.randn(2, 5, 4, generator=generator)
        for step in range(steps):
            model = self.transformer if step < steps // 2 else self.transformer_2
            (x,) = self.scheduler.step(model(x, torch.full((2,), 1 - step / steps)), x, **extra)
        return x


def _takes_generator(step: Any) -> bool:
    """What the pipelines of diffusers ask of a scheduler."""
    return "generator" in inspect.signature(step).parameters


def forecasting(model: nn.Module) -> OptimizedModel:
    with record(model) as recording:
        for step in range(4):
            model(torch.randn(2, 5, 4), torch.full((2,), 1 - step / 4))
    plan = Plan.from_trajectory(model, recording, mode="FORECAST", order=0, correct=False)
    return optimize(model, plan)


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline()


def test_parts_are_the_transformers(pipe: Pipeline) -> None:
    subject = Subject.of(pipe)
    assert subject.plain == {"transformer": pipe.transformer, "transformer_2": pipe.transformer_2}
    assert subject.scheduler is pipe.scheduler
    del pipe.transformer_2
    assert set(Subject.of(pipe).plain) == {"transformer"}


def test_a_model_is_taken_as_it_is(model: nn.Module) -> None:
    subject = Subject.of(model)
    assert (subject.plain, subject.is_pipeline, subject.scheduler) == (
        {"model": model},
        False,
        None,
    )
    assert Subject.of(forecasting(model)).plain == {"model": model}


@pytest.mark.parametrize("value", [None, 3, object()])
def test_what_has_no_transformer_is_refused(value: object) -> None:
    with pytest.raises(PlanError) as caught:
        Subject.of(value)
    assert caught.value.where == "pipe"
    assert type(value).__name__ in caught.value.got


def test_a_run_shows_the_latents_after_every_model(pipe: Pipeline) -> None:
    subject = Subject.of(pipe)
    run = subject.run(KeywordCall({}, 0), subject.plain, seed=0)
    torch.manual_seed(9)  # a keyword call has a generator of its own
    final = pipe(generator=torch.Generator().manual_seed(0))
    assert run.final is not None
    assert torch.equal(run.final, final)
    with record(pipe.transformer_2) as second:
        pipe(generator=torch.Generator().manual_seed(0))
    assert torch.equal(run.latents["transformer"], second.calls[0]["x"])
    assert "step" not in vars(pipe.scheduler)
    assert (pipe.seen[0]["output"], pipe.seen[1]["output"]) == ("latent", "pil")


def test_models_are_in_place_for_a_run_alone(pipe: Pipeline) -> None:
    subject, fast, seen = Subject.of(pipe), forecasting(pipe.transformer), list[nn.Module]()
    before = [pipe.transformer, pipe.transformer_2]

    def request(owner: Pipeline) -> None:
        seen.extend((owner.transformer, owner.transformer_2))
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        subject.run(request, {**subject.plain, "transformer": fast}, seed=0)
    assert seen == [fast, before[1]]
    assert [pipe.transformer, pipe.transformer_2] == before
    assert vars(pipe.scheduler) == {"size": 0.1}


def test_restore_puts_back_the_same_objects(pipe: Pipeline) -> None:
    before = [pipe.transformer, pipe.transformer_2]
    subject = Subject.of(pipe)
    subject.place({"transformer": forecasting(pipe.transformer)})
    restore(pipe)
    assert [pipe.transformer, pipe.transformer_2] == before
    restore(pipe)  # nothing to do
    assert [pipe.transformer, pipe.transformer_2] == before


def test_all_models_are_placed_or_none() -> None:
    class Fixed(Pipeline):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "transformer_2" and isinstance(value, OptimizedModel):
                raise AttributeError(name)
            super().__setattr__(name, value)

    pipe = Fixed()
    before = [pipe.transformer, pipe.transformer_2]
    fast = {name: forecasting(model) for name, model in Subject.of(pipe).plain.items()}
    with pytest.raises(AttributeError):
        Subject.of(pipe).place(fast)
    assert [pipe.transformer, pipe.transformer_2] == before


# Calls.


def test_one_call_is_three_runs_of_other_noise(pipe: Pipeline) -> None:
    requests = requests_of(Subject.of(pipe), {"prompt": "A cat"})
    assert requests == [KeywordCall({"prompt": "A cat"}, turn) for turn in range(3)]
    ends = [request(pipe) for request in requests]
    assert not torch.equal(ends[0], ends[1])
    assert torch.equal(ends[2], requests[2](pipe))


def test_two_calls_are_three_runs_and_five_are_five(pipe: Pipeline) -> None:
    calls = [{"prompt": str(number)} for number in range(5)]
    subject = Subject.of(pipe)
    assert requests_of(subject, calls[:2])[2] == KeywordCall(calls[0], 1)
    assert requests_of(subject, calls) == [KeywordCall(call, 0) for call in calls]
    functions = [lambda pipe: pipe(), lambda pipe: pipe(steps=8)]
    assert requests_of(subject, functions) == [*functions, functions[0]]


def test_generators_that_are_given_stay_as_they_are(pipe: Pipeline) -> None:
    given = torch.Generator().manual_seed(7)
    state = given.get_state()
    for turn in range(2):
        KeywordCall({"generator": given}, turn)(pipe)
    KeywordCall({"generator": [given]}, 1)._generator([given])
    assert torch.equal(given.get_state(), state)
    assert [seen["generator"].initial_seed() for seen in pipe.seen] == [7, 8]


@pytest.mark.parametrize("calls", [[], None, 3, ["A cat"]])
def test_what_is_no_call_is_refused(calls: Any, pipe: Pipeline) -> None:
    with pytest.raises(RecordError) as caught:
        requests_of(Subject.of(pipe), calls)
    assert caught.value.where == "calls"


def test_keywords_are_no_call_of_a_model(model: nn.Module) -> None:
    with pytest.raises(RecordError, match="functions that sample"):
        requests_of(Subject.of(model), {"prompt": "A cat"})


# Fingerprints.


def printed(pipe: Pipeline, **keywords: Any) -> str:
    return fingerprint(Subject.of(pipe), KeywordCall(keywords, 0))


def test_prompts_and_seeds_make_no_difference(pipe: Pipeline) -> None:
    first = printed(pipe, prompt="A cat")
    torch.manual_seed(8)
    other = Pipeline()
    assert printed(other, prompt="Ships", generator=torch.Generator().manual_seed(5)) == first


def test_the_sampler_and_its_steps_make_a_difference(pipe: Pipeline) -> None:
    prints = {printed(pipe), printed(pipe, steps=STEPS + 2)}
    pipe.scheduler.size = 0.2
    assert len(prints | {printed(pipe)}) == 3


def test_every_model_is_run_once_and_left_as_it_was(pipe: Pipeline) -> None:
    ran: list[str] = []
    handles = [
        model.embed.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, model in Subject.of(pipe).plain.items()
    ]
    before = pipe(generator=torch.Generator().manual_seed(0))
    ran.clear()
    printed(pipe)
    assert ran == ["transformer", "transformer_2"]
    for handle in handles:
        handle.remove()
    assert torch.equal(pipe(generator=torch.Generator().manual_seed(0)), before)
    assert all("forward" not in vars(model) for model in Subject.of(pipe).plain.values())
