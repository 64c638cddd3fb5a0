"""The paper's ordering, and ours beyond it, on the trained sample model and held-out seeds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusion import GuidedDDIM
from model import FashionDiT
from support.models import relative
from weights import DIT_WEIGHTS, load_weights

from calicache.graph_passes import Plan, StepMode, optimize, record

STEPS, INTERVAL, RANK = 35, 3, 28
PAPER = {"order": 0, "correct": False}
IMAGES = 6
METHODS: dict[str, dict[str, Any]] = {
    "none": {**PAPER, "weighting": "none"},
    "activation": {**PAPER, "weighting": "activation"},
    "increment": {**PAPER, "weighting": "increment"},
    "covariance": {**PAPER, "weighting": "covariance"},
    "corrected": {"order": 2},
    "reuse": {**PAPER, "mode": StepMode.REUSE},
    "corrected forecast": {"mode": StepMode.FORECAST},
}
PLAIN = {"corrected": "order 2", "corrected forecast": "forecast"}  # the same, nothing fitted

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """Relative L2 error of the final images, by method, over held-out noise."""
    model = load_weights(FashionDiT(), DIT_WEIGHTS)
    sampler = GuidedDDIM(STEPS, 1.5, model.null_class)

    def sample(denoiser: torch.nn.Module, seed: int) -> torch.Tensor:
        noise = torch.randn(IMAGES, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
        return sampler.sample(denoiser, noise, torch.arange(IMAGES))

    with record(model) as recording:
        sample(model, seed=11)
    full = sample(model, seed=12)
    errors = {}
    for name, options in METHODS.items():
        plan = Plan.from_trajectory(model, recording, schedule=INTERVAL, rank=RANK, **options)
        errors[name] = relative(sample(optimize(model, plan), seed=12), full)
        if name in PLAIN:
            recipe = replace(plan.recipe, output_weights=None, latent=None)
            fast = optimize(model, replace(plan, recipe=recipe))
            errors[PLAIN[name]] = relative(sample(fast, seed=12), full)
    return errors


def test_both_channel_aware_weightings_beat_the_plain_decomposition(
    errors: dict[str, float],
) -> None:
    assert errors["activation"] < errors["none"]
    assert errors["increment"] < errors["none"]


def test_covariance_beats_the_channel_aware_weightings(errors: dict[str, float]) -> None:
    assert errors["covariance"] < min(errors["activation"], errors["increment"])


def test_the_plain_decomposition_beats_reuse(errors: dict[str, float]) -> None:
    assert errors["none"] < errors["reuse"]


def test_forecast_anchors_and_fitted_outputs_have_a_third_of_the_papers_error(
    errors: dict[str, float],
) -> None:
    paper = min(errors[name] for name in ("none", "activation", "increment"))
    # Measured: 0.26. The target of 0.35 at equal MACs is on 256 seeds in docs/fidelity.md.
    assert errors["order 2"] < 0.4 * paper
    assert errors["corrected"] < 0.35 * paper


def test_fitted_outputs_help_a_forecast_most(errors: dict[str, float]) -> None:
    # Measured: 0.59.
    assert errors["corrected forecast"] < 0.8 * errors["forecast"]
