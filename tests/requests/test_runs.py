"""Several denoisings at once: in turn, in threads, in asyncio tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from diffusion import GuidedDDIM
from model import FashionDiT
from support.models import STEPS, relative
from torch import Tensor, nn
from weights import DIT_WEIGHTS, load_weights

from calicache.graph_passes import OptimizedModel, Plan, Recording, optimize, record
from calicache.graph_passes.common.errors import RunError
from calicache.graph_passes.sampler.run_state import RunState

RUNS = 4


@pytest.fixture(scope="module")
def fast(dit: FashionDiT, dit_plan: Plan) -> OptimizedModel:
    return optimize(dit, dit_plan.with_schedule("RCURCU"))


def steps_of(model: nn.Module, seed: int, images: int = 2) -> Iterator[Tensor]:
    """Latents after every step of one run."""
    noise = torch.randn(images, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(images) + seed % 3
    yield from GuidedDDIM(STEPS, 1.5, 10).latents(model, noise, labels)


def whole(model: nn.Module, seed: int) -> Tensor:
    *_, last = steps_of(model, seed)
    return last


@pytest.fixture(scope="module")
def alone(fast: OptimizedModel) -> list[Tensor]:
    """Every run by itself."""
    return [whole(fast, seed) for seed in range(RUNS)]


def assert_all_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)  # the same program on the same numbers


def test_started_runs_in_turn_are_as_alone(fast: OptimizedModel, alone: list[Tensor]) -> None:
    def started(seed: int) -> Iterator[Tensor]:
        """One generator is one run; it is bound again at each of its steps."""
        steps = steps_of(fast, seed)
        while True:
            with fast.start_run(states[seed]):
                latents = next(steps, None)
            if latents is None:
                return
            yield latents

    states = [RunState() for _ in range(RUNS)]
    latest: dict[int, Tensor] = {}
    runs = [started(seed) for seed in range(RUNS)]
    for _ in range(STEPS + 1):
        for seed, run in enumerate(runs):
            latest[seed] = next(run, latest.get(seed))
    assert_all_equal([latest[seed] for seed in range(RUNS)], alone)


@pytest.mark.slow
def test_runs_in_turn_that_nobody_started_are_computed_in_full() -> None:
    # The trained sample: latents of random weights move as far as from one noise to another.
    model = load_weights(FashionDiT(), DIT_WEIGHTS).requires_grad_(False)
    with record(model) as recording:
        whole(model, 5)
    plan = Plan.from_trajectory(model, recording, schedule=3, rank=8, correct=False)
    fast = optimize(model, plan)
    one, other = steps_of(fast, 0), steps_of(fast, 3)  # the same labels, other noise
    for latents in zip(one, other, strict=True):
        last = latents
    for seed, latents in zip((0, 3), last, strict=True):
        # Every step a REFRESH: float32 rounding over a run.
        assert relative(latents, whole(model, seed)) < 1e-5


@pytest.mark.parametrize("hand", [True, False])
def test_runs_in_threads_are_as_alone(
    fast: OptimizedModel, alone: list[Tensor], hand: bool
) -> None:
    barrier = Barrier(RUNS)

    def run(seed: int) -> Tensor:
        steps = steps_of(fast, seed)
        latents = torch.zeros(0)
        for _ in range(STEPS + 1):
            barrier.wait()  # all threads are at the same step
            latents = next(steps, latents)
        return latents

    def started(seed: int) -> Tensor:
        with fast.start_run():
            return run(seed)

    with ThreadPoolExecutor(RUNS) as pool:
        got = list(pool.map(started if hand else run, range(RUNS)))
    assert_all_equal(got, alone)


def test_runs_in_tasks_are_as_alone(fast: OptimizedModel, alone: list[Tensor]) -> None:
    async def run(seed: int) -> Tensor:
        with fast.start_run():
            for latents in steps_of(fast, seed):
                last = latents
                await asyncio.sleep(0)
        return last

    async def all_runs() -> list[Tensor]:
        return list(await asyncio.gather(*(run(seed) for seed in range(RUNS))))

    assert_all_equal(asyncio.run(all_runs()), alone)


def test_a_run_inside_another_is_apart(fast: OptimizedModel, alone: list[Tensor]) -> None:
    fast.reset()
    outer = steps_of(fast, 0)
    next(outer)
    with fast.start_run():
        assert torch.equal(whole(fast, 1), alone[1])
    *_, last = outer
    assert torch.equal(last, alone[0])


def test_runs_of_two_models_are_apart(
    fast: OptimizedModel, dit: FashionDiT, alone: list[Tensor]
) -> None:
    other = optimize(dit, fast.plan)
    with fast.start_run(), other.start_run():
        for one, two in zip(steps_of(fast, 0), steps_of(other, 1), strict=True):
            last = [one, two]
    assert_all_equal(last, alone[:2])


def test_bytes_of_a_run_are_known_before_it_starts(fast: OptimizedModel) -> None:
    with fast.start_run() as run:
        next(steps_of(fast, 0))
        (state,) = run.calls
    kept = sum(value.nbytes for values in state.kept.values() for value in values)
    rows = fast.plan.binding.signature.tensors[0].shape[0]
    assert fast.run_bytes == kept * rows // 4  # two images with guidance are four rows


def test_what_a_run_keeps_goes_with_it(fast: OptimizedModel) -> None:
    with fast.start_run() as run:
        next(steps_of(fast, 0))
        assert fast.state is run
        assert run.calls
    assert fast.state is not run


def test_rows_at_different_timesteps_are_refused(fast: OptimizedModel) -> None:
    rows = {"hidden_states": torch.zeros(4, 1, 28, 28), "class_labels": torch.zeros(4).long()}
    with pytest.raises(RunError, match="argument timestep: expected one timestep in a call, got 2"):
        fast(**rows, timestep=torch.tensor([9, 9, 5, 5]))


@pytest.mark.parametrize("told", [{"step_index": 0}, {"sigma": 0.9}, {}], ids=str)
def test_a_pipeline_may_say_that_a_run_begins(
    fast: OptimizedModel, dit: FashionDiT, dit_recording: Recording, told: dict[str, Any]
) -> None:
    """Timestep, prompt and latents are those of the next step: the index or the noise tells."""
    first, second = dit_recording.calls[:2]
    with fast.start_run() as run, torch.no_grad():
        with fast.cache_context("cond", step_index=0, sigma=0.5):
            fast(**first)
        with fast.cache_context("cond", **told):
            output = fast(**second)
    assert [state.start for state in run.calls] == [1 if told else 0]
    # A REFRESH is the plain model, in float32; what is calibrated at rank 4 is not.
    assert (relative(output, dit(**second)) < 1e-5) == bool(told)


@pytest.mark.parametrize(
    ("context", "match"),
    [
        ({"step_index": -1}, "step_index: expected 0 or more, got -1"),
        ({"step_index": 0.5}, "step_index: expected a whole number"),
        ({"sigma": "low"}, "sigma: expected a number"),
    ],
)
def test_what_is_no_index_and_no_sigma_is_refused(
    fast: OptimizedModel, context: dict[str, Any], match: str
) -> None:
    with pytest.raises(RunError, match=match), fast.cache_context("cond", **context):
        pass
    with fast.cache_context("cond", step_index=torch.tensor(2), num_inference_steps=5):
        context_now = fast.state.context
    assert (context_now.name, context_now.index, context_now.sigma) == ("cond", 2, None)
    assert fast.state.context.name is None
