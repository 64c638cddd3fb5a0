"""A cast after optimising, autocast around a run."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import relative
from support.pipelines.tiny import CASES
from torch import Tensor, nn

from calicache.graph_passes import Plan, optimize, record
from calicache.graph_passes.common.errors import RunError

PIXART = next(case for case in CASES if case.name == "pixart")
pytestmark = pytest.mark.slow

PROMPT = "a photo of a cat"
EVERYTHING = 1 << 10  # more than any layer has directions


def latents(model: nn.Module, dtype: torch.dtype, *, cast: bool = True) -> Tensor:
    """What the pipeline makes with a transformer, all of it cast afterwards."""
    pipe = PIXART.build()
    pipe.transformer = model
    return PIXART.latents(pipe.to(dtype) if cast else pipe, PROMPT)


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return copy.deepcopy(PIXART.build().transformer)


@pytest.fixture(scope="module")
def plan(original: nn.Module) -> Plan:
    """Of graphs, at full rank."""
    with record(original) as recording:
        latents(original, torch.float32)
    options = {"rank": EVERYTHING, "order": 0, "weighting": "none", "correct": False}
    return Plan.from_trajectory(original, recording, schedule="RCRCRC", **options)


# Of float64 what is left is what the factors lost in float32. In bfloat16, of 8 bits, a run of 6
# steps rounds by 0.004; what is cached and wrong makes more by far, as half of the steps are cheap.
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-7), (torch.bfloat16, 0.02)])
def test_a_cast_is_carried_out(
    dtype: torch.dtype, rtol: float, original: nn.Module, plan: Plan
) -> None:
    fast = optimize(copy.deepcopy(original), plan)
    latents(fast, torch.float32)
    expected = latents(copy.deepcopy(original), dtype)
    got = latents(fast, dtype)
    assert got.dtype is dtype
    assert relative(got, expected) < rtol


def test_a_cast_of_a_whole_model_is_carried_out(original: nn.Module) -> None:
    with record(original) as recording:
        latents(original, torch.float32)
    forecasts = Plan.from_trajectory(original, recording, schedule="RRFRRF", order=1)
    expected = latents(optimize(copy.deepcopy(original), forecasts), torch.float32)
    got = latents(optimize(copy.deepcopy(original), forecasts), torch.float64)
    assert got.dtype is torch.float64
    # Latents drawn in float64 are others: both are forecasts of a like run.
    plain = latents(copy.deepcopy(original), torch.float64)
    plain_error = relative(expected, latents(original, torch.float32))
    assert relative(got, plain) < 3 * plain_error


def test_tensors_of_another_precision_without_a_cast_are_refused(
    original: nn.Module, plan: Plan
) -> None:
    fast = optimize(copy.deepcopy(original), plan)
    signature = plan.binding.signature
    call = {
        spec.name: torch.zeros(spec.shape, dtype=spec.torch_dtype) for spec in signature.tensors
    }
    call["hidden_states"] = call["hidden_states"].double()
    with pytest.raises(RunError, match=r"float64 .*, for which the plan has no graph"):
        fast(**signature.unflatten([call[spec.name] for spec in signature.tensors]))


def test_autocast_rounds_as_in_the_plain_model(original: nn.Module, plan: Plan) -> None:
    fast = optimize(copy.deepcopy(original), plan)
    plain = latents(original, torch.float32, cast=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = latents(original, torch.float32, cast=False)
        got = latents(fast, torch.float32, cast=False)
    rounding = relative(expected, plain)
    assert rounding > 1e-3
    # The same operations in other orders round otherwise, by as much.
    assert relative(got, expected) < 2 * rounding
