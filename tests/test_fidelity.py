"""The paper's ordering on the trained sample model, on seeds that no statistics have seen."""

from __future__ import annotations

import pytest
import torch
from conftest import relative
from diffusion import GuidedDDIM
from model import FashionDiT
from weights import DIT_WEIGHTS, load_weights

from calicache.graph_passes import Plan, StepMode, optimize, record, uniform_schedule

STEPS, INTERVAL = 35, 3


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """Relative L2 error of the final images, by method, over 16 held-out seeds."""
    model = load_weights(FashionDiT(), DIT_WEIGHTS)
    rank = round(model.config.width / 9)
    sampler = GuidedDDIM(STEPS, 1.5, model.null_class)

    def sample(denoiser: torch.nn.Module, seed: int) -> torch.Tensor:
        noise = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
        return sampler.sample(denoiser, noise, torch.arange(16) % 10)

    with record(model) as trajectory:
        sample(model, seed=11)
    full = sample(model, seed=12)
    errors = {}
    for weighting in ("none", "activation", "increment"):
        plan = Plan.from_trajectory(
            model, trajectory, interval=INTERVAL, rank=rank, weighting=weighting
        )
        errors[weighting] = relative(sample(optimize(model, plan), seed=12), full)
    reuse = plan.with_schedule(uniform_schedule(STEPS, INTERVAL, StepMode.REUSE))
    errors["reuse"] = relative(sample(optimize(model, reuse), seed=12), full)
    return errors


def test_both_channel_aware_weightings_beat_the_plain_decomposition(
    errors: dict[str, float],
) -> None:
    assert errors["activation"] < errors["none"]
    assert errors["increment"] < errors["none"]


def test_the_plain_decomposition_beats_reuse(errors: dict[str, float]) -> None:
    assert errors["none"] < errors["reuse"]


def test_calibrated_images_stay_close_to_the_full_ones(errors: dict[str, float]) -> None:
    # A bound far above what was measured, to catch a broken branch and nothing finer.
    assert errors["increment"] < 0.15
