"""Plans with a recipe for each of several grids of timesteps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusion import GuidedDDIM, add_noise, ddim_timesteps
from model import FashionDiT
from support.models import relative
from support.pipelines.tiny import CASES
from torch import Tensor, nn

from calicache.graph_passes import OptimizedModel, Plan, Recording, optimize, record
from calicache.graph_passes.common.errors import CalicacheWarning, RunError
from calicache.graph_passes.sampler.run_state import RunState

FEW, MANY = 12, 20
Sampler = Callable[[nn.Module, int], Iterator[Tensor]]


def ddim(model: nn.Module, steps: int, seed: int = 7) -> Iterator[Tensor]:
    """Latents after every step; all grids begin at 999."""
    noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    yield from GuidedDDIM(steps, 1.5, 10).latents(model, noise, torch.arange(2))


def parted(model: nn.Module, steps: int, seed: int = 7) -> Iterator[Tensor]:
    """The same with guidance by two calls a step."""

    def denoiser(**call: Tensor) -> Tensor:
        halves = ({name: v.chunk(2)[k] for name, v in call.items()} for k in (0, 1))
        return torch.cat([model(**half) for half in halves])

    noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    yield from GuidedDDIM(steps, 1.5, 10).latents(denoiser, noise, torch.arange(2))


def alike(got: Tensor, expected: Tensor, bits: bool) -> bool:
    """Equal bits, from the same programs on the same numbers.

    Untold, a run under the second recipe has its first output from the first one: it is a REFRESH
    under both, whose own output weighs 1 up to float32 rounding.
    """
    return torch.equal(got, expected) if bits else relative(got, expected) < 1e-5


def last(latents: Iterator[Tensor]) -> Tensor:
    *_, end = latents
    return end


def by_itself(model: OptimizedModel, steps: int, seed: int = 7) -> Tensor:
    """A run that goes on with nothing from before."""
    model.reset()
    return last(ddim(model, steps, seed))


def recorded(model: nn.Module, steps: int, sampler: Sampler = ddim) -> Recording:
    with record(model) as recording:
        recording.finish(last(sampler(model, steps)))
    return recording


@pytest.fixture(scope="module")
def recordings(dit: FashionDiT) -> dict[int, Recording]:
    return {steps: recorded(dit, steps) for steps in (FEW, MANY)}


@pytest.fixture(scope="module", params=["CALIBRATE", "FORECAST"])
def plan(dit: FashionDiT, recordings: dict[int, Recording], request: pytest.FixtureRequest) -> Plan:
    return Plan.from_trajectory(dit, recordings, schedule=3, mode=request.param, rank=8)


@pytest.fixture(scope="module")
def fast(dit: FashionDiT, plan: Plan) -> OptimizedModel:
    return optimize(dit, plan)


@pytest.fixture(scope="module")
def alone(dit: FashionDiT, plan: Plan) -> dict[int, OptimizedModel]:
    """Every recipe by itself."""
    return {steps: optimize(dit, plan.for_grid(steps)) for steps in (FEW, MANY)}


@pytest.mark.parametrize("steps", [FEW, MANY])
@pytest.mark.parametrize("told", [True, False])
def test_every_grid_is_as_under_its_own_plan(
    fast: OptimizedModel, alone: dict[int, OptimizedModel], steps: int, told: bool
) -> None:
    expected = by_itself(alone[steps], steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fast.start_run(timesteps=ddim_timesteps(steps) if told else None):
            got = last(ddim(fast, steps))
    assert alike(got, expected, bits=told or steps == FEW)


def test_a_plan_of_each_by_itself_is_the_same(
    dit: FashionDiT, recordings: dict[int, Recording], fast: OptimizedModel
) -> None:
    mode = fast.plan.for_grid(MANY).schedule[1]
    for steps, recording in recordings.items():
        plan = Plan.from_trajectory(dit, recording, schedule=3, mode=mode, rank=8)
        assert plan.recipe == fast.plan.for_grid(steps).recipe
        with fast.start_run(timesteps=ddim_timesteps(steps)):
            got = last(ddim(fast, steps))
        assert torch.equal(got, by_itself(optimize(dit, plan), steps))


def test_runs_of_two_grids_in_turn_are_as_alone(
    fast: OptimizedModel, alone: dict[int, OptimizedModel]
) -> None:
    states, ends = {FEW: RunState(), MANY: RunState()}, {}
    runs = {steps: ddim(fast, steps, seed=steps) for steps in states}
    for turn in range(MANY + 1):
        for steps, run in runs.items():
            grid = None if turn else ddim_timesteps(steps)
            with fast.start_run(states[steps], timesteps=grid):
                ends[steps] = next(run, ends.get(steps))
    for steps, end in ends.items():
        expected = by_itself(alone[steps], steps, seed=steps)
        assert torch.equal(end, expected)  # the same programs on the same numbers


def test_one_grid_after_the_other_in_a_thread(
    fast: OptimizedModel, alone: dict[int, OptimizedModel]
) -> None:
    fast.reset()
    for steps in (FEW, MANY, MANY, FEW):
        got, expected = last(ddim(fast, steps)), by_itself(alone[steps], steps)
        assert alike(got, expected, bits=steps == FEW)


@pytest.mark.parametrize("steps", [FEW, MANY])
@pytest.mark.parametrize("told", [True, False])
def test_a_later_start_is_under_its_own_recipe(
    fast: OptimizedModel, alone: dict[int, OptimizedModel], steps: int, told: bool
) -> None:
    noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    times = ddim_timesteps(steps)[4:]
    start = add_noise(torch.zeros_like(noise), noise, torch.tensor(times[:1] * 2))

    def outputs(model: nn.Module) -> list[Tensor]:
        x, results = start, []
        for time in times:
            call = {"timestep": torch.full((2,), time), "class_labels": torch.arange(2)}
            with torch.no_grad():
                results.append(model(hidden_states=x, **call))
            x = x - 0.05 * results[-1]
        return results

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fast.start_run(timesteps=times if told else None):
            got = outputs(fast)
    alone[steps].reset()
    for one, other in zip(got, outputs(alone[steps]), strict=True):
        assert alike(one, other, bits=told or steps == FEW)


def test_guidance_by_two_calls_has_both_under_the_run_s_recipe(dit: FashionDiT) -> None:
    recordings = {steps: recorded(dit, steps, parted) for steps in (FEW, MANY)}
    plan = Plan.from_trajectory(dit, recordings, schedule=3, rank=8)
    fast = optimize(dit, plan)
    for steps in (MANY, FEW):
        alone = optimize(dit, plan.for_grid(steps))
        got, expected = last(parted(fast, steps)), last(parted(alone, steps))
        assert alike(got, expected, bits=steps == FEW)
        assert {state.recipe for state in fast.state.calls} == {(FEW, MANY).index(steps)}


# --- grids that no recipe was made for -----------------------------------------------------------


@pytest.mark.parametrize(("steps", "nearest"), [(11, FEW), (14, FEW), (18, MANY), (28, MANY)])
@pytest.mark.parametrize("told", [True, False])
def test_another_grid_has_the_recipe_whose_steps_are_nearest(
    fast: OptimizedModel,
    alone: dict[int, OptimizedModel],
    steps: int,
    nearest: int,
    told: bool,
) -> None:
    with pytest.warns(CalicacheWarning, match="not recorded"):
        expected = by_itself(alone[nearest], steps)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with fast.start_run(timesteps=ddim_timesteps(steps) if told else None):
            got = last(ddim(fast, steps))
    assert [str(one.message)[:37] for one in said] == ["These timesteps were not recorded. RE"]
    assert alike(got, expected, bits=told or nearest == FEW)


def test_strict_refuses_other_grids(
    dit: FashionDiT, plan: Plan, alone: dict[int, OptimizedModel]
) -> None:
    strict = optimize(dit, plan, strict=True)
    both = "timesteps?: expected .*999, 908, .*; or 999, 946, "
    with pytest.raises(RunError, match=both):
        last(ddim(strict, 28))
    with pytest.raises(RunError, match=both):
        strict.start_run(timesteps=ddim_timesteps(28))
    for steps in (FEW, MANY):
        strict.reset()
        got, expected = last(ddim(strict, steps)), by_itself(alone[steps], steps)
        assert alike(got, expected, bits=steps == FEW)


@pytest.mark.parametrize(
    ("timesteps", "match"),
    [
        ([2000.0, 1500.0], "timesteps: expected the recorded ones.*got 2000 to 1500"),
        ([], "timesteps: expected a list of numbers"),
        ("999", "timesteps: expected a list of numbers"),
        (999, "timesteps: expected a list of numbers"),
        ([999, "next"], "timesteps: expected a number"),
    ],
)
def test_timesteps_that_cannot_be_are_refused(
    fast: OptimizedModel, timesteps: Any, match: str
) -> None:
    with pytest.raises(RunError, match=match):
        fast.start_run(timesteps=timesteps)


# --- grids of flow matching ----------------------------------------------------------------------


def shifted(steps: int, shift: float) -> list[float]:
    """Timesteps of flow matching; the first is 1000 whatever the shift and the number of steps."""
    sigmas = torch.linspace(1, 1 / steps, steps)
    return (1000 * shift * sigmas / (1 + (shift - 1) * sigmas)).tolist()


def flow(model: nn.Module, timesteps: list[float]) -> list[Tensor]:
    x = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(5))
    latents = []
    for now, after in zip(timesteps, [*timesteps[1:], 0.0], strict=True):
        with torch.no_grad():
            call = {"timestep": torch.full((2,), now), "class_labels": torch.arange(2)}
            x = x + (after - now) / 1000 * model(hidden_states=x, **call)
        latents.append(x)
    return latents


@pytest.mark.parametrize("told", [True, False])
def test_grids_that_begin_alike_part_where_their_timesteps_do(dit: FashionDiT, told: bool) -> None:
    # The third begins with the first two steps of the first.
    plain, bent = shifted(6, 1.0), shifted(6, 3.0)
    grids = [plain, bent, [*plain[:2], 650.0, 300.0]]
    plans = []
    for grid in grids:
        with record(dit) as recording:
            recording.finish(flow(dit, grid)[-1])
        schedule = "RRCRCC"[: len(grid)]
        plans.append(Plan.from_trajectory(dit, recording, schedule=schedule, rank=8))
    fast = optimize(dit, Plan.join(*plans))
    for grid, plan in zip(grids, plans, strict=True):
        with fast.start_run(timesteps=grid if told else None):
            got = flow(fast, grid)
        for one, other in zip(got, flow(optimize(dit, plan), grid), strict=True):
            assert alike(one, other, bits=told or grid is plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux_cfg"])
def test_pipelines_of_diffusers_have_the_recipe_of_their_steps(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    pipe = case.build()
    model, plans = pipe.transformer, []
    for steps in (6, 9):
        with record(model) as recording:
            case.latents(pipe, "A dog", seed=3, num_inference_steps=steps)
        plans.append(Plan.from_trajectory(model, recording, schedule=3, rank=4, weighting="none"))
    fast = optimize(model, Plan.join(*plans), strict=True)
    for steps, plan in zip((6, 9), plans, strict=True):
        results = []
        for one in (fast, optimize(model, plan)):
            one.reset()
            pipe.transformer = one
            results.append(case.latents(pipe, "A cat", num_inference_steps=steps))
        assert {state.recipe for state in fast.state.calls} == {plans.index(plan)}
        assert alike(*results, bits=steps == 6)
