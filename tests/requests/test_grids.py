"""Samplers with other numbers of steps than the recorded one."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusion import GuidedDDIM
from model import FashionDiT
from support.models import relative
from torch import Tensor, nn

from calicache.graph_passes import OptimizedModel, Plan, Recording, optimize, record
from calicache.graph_passes.common.errors import CalicacheWarning, RunError

pytestmark = pytest.mark.slow

STEPS = 20


def sample(model: nn.Module, steps: int, seed: int = 7) -> Tensor:
    noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return GuidedDDIM(steps, 1.5, 10).sample(model, noise, torch.arange(2))


@pytest.fixture(scope="module")
def recording(model: FashionDiT) -> Recording:
    with record(model) as recording:
        recording.finish(sample(model, STEPS, seed=1))
    return recording


@pytest.fixture(scope="module", params=["CALIBRATE", "FORECAST"])
def fast(model: FashionDiT, recording: Recording, request: pytest.FixtureRequest) -> OptimizedModel:
    plan = Plan.from_trajectory(model, recording, schedule=3, mode=request.param, rank=28)
    return optimize(model, plan)


def modes_of(fast: OptimizedModel, steps: int) -> tuple[Tensor, str]:
    """What a run gives, and R or C for each of its steps."""
    ran: list[str] = []

    def see(*_: object) -> None:
        (state,) = fast.state.calls
        ran.append("R" if state.refreshes[0] == state.place else "C")

    handle = fast.register_forward_hook(see)
    fast.reset()
    latents = sample(fast, steps)
    handle.remove()
    return latents, "".join(ran)


@pytest.mark.parametrize("steps", [10, 15, 28, 50])
def test_refreshes_come_where_the_plan_has_them(
    model: FashionDiT, fast: OptimizedModel, steps: int
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorded, modes = modes_of(fast, STEPS)
    assert modes == "RCC" * 6 + "RC"
    with pytest.warns(CalicacheWarning, match="not recorded"):
        latents, modes = modes_of(fast, steps)
    assert len(modes) == steps
    assert steps == 10 or 0.1 < modes.count("R") / steps < 0.6
    error, planned = (
        relative(one, sample(model, count)) for one, count in ((latents, steps), (recorded, STEPS))
    )
    # Without what was fitted, and on steps of another length.
    assert error < 4 * planned


def test_at_full_rank_other_grids_are_exact(model: FashionDiT, recording: Recording) -> None:
    plan = Plan.from_trajectory(model, recording, schedule=3, rank=256, correct=False)
    fast = optimize(model, plan)
    for steps in (6, 14, 33):
        with pytest.warns(CalicacheWarning):
            latents, modes = modes_of(fast, steps)
        assert steps == 6 or "C" in modes
        # float32 through two orders of the same products, over a run.
        assert relative(latents, sample(model, steps)) < 1e-4


def test_strict_refuses_them(model: FashionDiT, fast: OptimizedModel) -> None:
    strict = optimize(model, fast.plan, strict=True)
    with pytest.raises(RunError, match=r"timestep.*999, 946, .*strict"):
        sample(strict, 28)
    assert relative(sample(strict, STEPS), sample(model, STEPS)) < 0.1


def test_another_number_of_steps_leaves_no_trace(fast: OptimizedModel) -> None:
    fast.reset()
    expected = sample(fast, STEPS)
    with pytest.warns(CalicacheWarning):
        sample(fast, 14)
    # The same program on the same numbers.
    assert torch.equal(sample(fast, STEPS), expected)
