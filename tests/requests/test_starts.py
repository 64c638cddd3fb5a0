"""Runs that begin mid-way, and runs that are broken off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusion import GuidedDDIM, add_noise, ddim_timesteps
from model import FashionDiT
from support.models import relative
from torch import Tensor, nn

from calicache.graph_passes import OptimizedModel, Plan, Recording, optimize, record

pytestmark = pytest.mark.slow

STEPS = 12


@pytest.fixture(scope="module")
def recording(model: FashionDiT) -> Recording:
    noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with record(model) as recording:
        recording.finish(GuidedDDIM(STEPS, 1.5, 10).sample(model, noise, torch.arange(2)))
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
    assert pair[0].state.calls[-1].start == start


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
    exact.reset()
    noise = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(9))
    for call in recording.calls[:2]:
        exact(**{**call, "hidden_states": noise})
    # At the very next timestep, of another image: a run of its own.
    result = exact(**recording.calls[2])
    assert (exact.state.calls[-1].start, exact.step) == (2, 3)
    # A REFRESH: float32 rounding of the plain graph.
    assert relative(result, model(**recording.calls[2])) < 1e-5
