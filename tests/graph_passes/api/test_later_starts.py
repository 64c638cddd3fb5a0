"""Runs that begin mid-way, that are broken off, and calls that nobody recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusion import GuidedDDIM, add_noise, ddim_timesteps
from model import FashionDiT
from support.models import relative
from torch import Tensor, nn
from weights import DIT_WEIGHTS, load_weights

from calicache.graph_passes import OptimizedModel, Plan, Recording, StepMode, optimize, record
from calicache.graph_passes.common.errors import RunError
from calicache.graph_passes.settings.recipe import Recipe
from calicache.graph_passes.settings.schedule import anchor_table, output_table

STEPS = 12
R, C, U, F = StepMode


@pytest.fixture(scope="module")
def model() -> FashionDiT:
    """The trained sample: what an error is worth shows on a trained model alone."""
    return load_weights(FashionDiT(), DIT_WEIGHTS)


@pytest.fixture(scope="module")
def recording(model: FashionDiT) -> Recording:
    noise = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with record(model) as recording:
        recording.finish(GuidedDDIM(STEPS, 1.5, 10).sample(model, noise, torch.arange(4)))
    return recording


def planned(model: nn.Module, recording: Recording, **options: Any) -> OptimizedModel:
    plan = Plan.from_trajectory(model, recording, **{"order": 2, "rank": 28, **options})
    return optimize(model, plan)


@pytest.fixture(scope="module", params=["CALIBRATE", "FORECAST"])
def pair(
    model: FashionDiT, recording: Recording, request: pytest.FixtureRequest
) -> tuple[OptimizedModel, OptimizedModel]:
    """With fitted weights, and without."""
    options = {"schedule": 3, "mode": request.param}
    return (
        planned(model, recording, **options),
        planned(model, recording, correct=False, **options),
    )


def outputs(model: nn.Module, recording: Recording, start: int) -> list[Tensor]:
    """What a model gives for the recorded calls from a step on, in a new run."""
    if isinstance(model, OptimizedModel):
        model.reset()
    calls = recording.calls[start:STEPS]
    with torch.no_grad():
        return [model(**call) for call in calls]


def worst(model: nn.Module, plain: nn.Module, recording: Recording, start: int) -> float:
    results = outputs(model, recording, start), outputs(plain, recording, start)
    return max(map(relative, *results))


@pytest.fixture(scope="module")
def exact(model: FashionDiT, recording: Recording) -> OptimizedModel:
    return planned(model, recording, schedule=3, rank=256, correct=False)


@pytest.mark.parametrize("start", [1, 3, 5, 10, 11])
def test_a_later_start_is_no_worse_than_without_fitted_weights(
    model: FashionDiT,
    recording: Recording,
    pair: tuple[OptimizedModel, OptimizedModel],
    start: int,
) -> None:
    fitted, plain = (worst(fast, model, recording, start) for fast in pair)
    # Fitted weights count where the refreshes are those that they were fitted to.
    assert fitted <= 1.05 * plain
    assert pair[0].state.start == start


def image_to_image(model: nn.Module, images: Tensor, start: int) -> Tensor:
    """Noise on images as far as a step, taken away again from there on."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    timestep = torch.full((len(images),), ddim_timesteps(STEPS)[start])
    noisy = add_noise(images, noise, timestep)
    with torch.no_grad():
        *_, last = GuidedDDIM(STEPS, 1.5, 10).latents(
            model, noisy, torch.arange(len(images)), start
        )
    return last


@pytest.mark.parametrize("start", [1, 3, 5, 8])
def test_image_to_image_is_as_near_as_a_whole_run(
    model: FashionDiT,
    recording: Recording,
    pair: tuple[OptimizedModel, OptimizedModel],
    start: int,
) -> None:
    images, fast = recording.ends[0], pair[0]
    assert images is not None
    whole, later = (
        relative(image_to_image(fast, images, place), image_to_image(model, images, place))
        for place in (0, start)
    )
    # Counted from step 0, whatever the timestep, FORECAST was 3 to 5 times as far off from
    # step 3, 5 and 8.
    assert later <= 1.5 * whole


@pytest.mark.parametrize("start", range(STEPS))
def test_at_full_rank_every_start_is_exact(
    model: FashionDiT, recording: Recording, exact: OptimizedModel, start: int
) -> None:
    # float32 through two orders of the same products.
    assert worst(exact, model, recording, start) < 1e-4


def test_a_run_broken_off_is_no_part_of_a_later_one(
    model: FashionDiT, recording: Recording, exact: OptimizedModel
) -> None:
    outputs(exact, recording, 0)
    exact.reset()
    for call in recording.calls[:2]:
        exact(**call)
    # From the second step to the seventh: not what comes next, so a new run.
    result = exact(**recording.calls[6])
    assert (exact.state.start, exact.step) == (6, 7)
    assert relative(result, model(**recording.calls[6])) < 1e-4


def test_timesteps_that_are_left_out_are_computed_in_full(
    model: FashionDiT, recording: Recording, exact: OptimizedModel
) -> None:
    exact.reset()
    for call in recording.calls[0:STEPS:2]:
        # A REFRESH: float32 rounding of the plain graph.
        assert relative(exact(**call), model(**call)) < 1e-5


def test_guidance_that_was_not_recorded_is_noticed(
    model: FashionDiT, recording: Recording, exact: OptimizedModel
) -> None:
    exact.reset()
    first, second = recording.calls[:2]
    for call in (first, first, second):  # the second call may be a new run
        exact(**call)
    with pytest.raises(RunError, match="1 calls with one timestep"):
        exact(**second)


def test_an_unknown_timestep_is_counted_from_the_first_step(
    model: FashionDiT, recording: Recording, exact: OptimizedModel
) -> None:
    exact.reset()
    call = {**recording.calls[3]}
    call["timestep"] = call["timestep"] + 1
    exact(**call)
    assert (exact.state.start, exact.step) == (0, 1)


def test_weights_of_a_later_start() -> None:
    schedule = (R, F, R, F, F, R, F, F)
    fitted = tuple((0.5 + step, 0.25, 0.125, -1.0) for step in range(len(schedule)))
    recipe = Recipe(
        schedule,
        0,
        1,
        weighting="covariance",
        output_weights=fitted,
        latent="x",  # type: ignore[arg-type]
    )
    later = (U, U, U, R, F, R, F, F)
    anchors, weights = recipe.weights_from(3)
    assert anchors == anchor_table(later, 1)
    assert weights is not None
    # Step 3 keeps nothing, 4 and 5 one refresh; from 6 on the newest two are 5 and 3, not 5 and 2.
    plain = output_table(later, 1)
    assert weights[3:] == tuple((*row, 0.0) for row in plain[3:])
    anchors, weights = recipe.weights_from(2)
    assert weights is not None
    assert weights[2:6] == tuple((*row, 0.0) for row in output_table((U, U, *schedule[2:]), 1)[2:6])
    assert weights[6:] == fitted[6:]
    assert recipe.weights_from(0) == (anchor_table(schedule, 1), fitted)
