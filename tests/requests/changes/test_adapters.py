"""LoRA by peft, as pipelines of diffusers load it: never left out without a word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from zoo.drive import DenoisingRun, make_model, run_sampler
from zoo.finding import full_rank, relative
from zoo.report import ENTRIES

from calicache.graph_passes import OptimizedModel, Plan, optimize, record
from calicache.graph_passes.common.errors import RunError

pytestmark = pytest.mark.slow

WAN = ENTRIES["WanTransformer3DModel"]
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
# float32 rounding through a few blocks and steps.
SAME = 1e-4


def adapter(rank: int = 4) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=8, init_lora_weights=False, target_modules=LAYERS)


@dataclass(frozen=True, slots=True)
class Adapted:
    """A transformer with an adapter, and a plan for it at full rank."""

    model: nn.Module
    plan: Plan


@pytest.fixture
def adapted() -> Adapted:
    model = make_model(WAN)
    model.add_adapter(adapter())
    assert any(module.training for module in model.modules())  # as peft makes its layers
    with record(model) as recording:
        recording.finish(run_sampler(model, WAN, linear=True).latents)
    plan = Plan.from_trajectory(
        model, recording, schedule="RCRCR", rank=0, order=0, weighting="none", correct=False
    )
    sites = optimize(model, plan).compiled.analysis.sites
    return Adapted(model, full_rank(plan, sites))


def same_runs(fast: OptimizedModel, plain: DenoisingRun) -> bool:
    outputs = run_sampler(fast, WAN, linear=True).outputs
    return max(map(relative, outputs, plain.outputs)) < SAME


def test_an_adapter_is_part_of_the_graph(adapted: Adapted) -> None:
    fast = optimize(adapted.model, adapted.plan)
    names = {site.name for site in fast.compiled.analysis.sites.linears}
    assert any("lora_A" in name for name in names)
    with_adapter = run_sampler(adapted.model, WAN, linear=True)
    assert same_runs(fast, with_adapter)
    adapted.model.disable_adapters()
    without = run_sampler(adapted.model, WAN, linear=True)
    assert relative(with_adapter.outputs[-1], without.outputs[-1]) > 0.1


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "scaled": lambda model: model.set_adapters(["default"], [0.3]),
    "switched off": lambda model: model.disable_adapters(),
    "fused": lambda model: model.fuse_lora(),
    "another": lambda model: model.add_adapter(adapter(2), "second"),
    "deleted": lambda model: model.delete_adapters("default"),
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_adapter_is_refused_or_followed(change: str, adapted: Adapted) -> None:
    strict = optimize(adapted.model, adapted.plan)
    assert same_runs(strict, run_sampler(adapted.model, WAN, linear=True))
    CHANGES[change](adapted.model)
    with pytest.raises(RunError, match=r"expected the (weights|settings) that the model was opt"):
        run_sampler(strict, WAN, linear=True)


def test_another_scale_is_followed_where_that_is_asked_for(adapted: Adapted) -> None:
    fast = optimize(adapted.model, adapted.plan, on_change="refactor")
    before = run_sampler(fast, WAN, linear=True)
    adapted.model.set_adapters(["default"], [0.3])
    plain = run_sampler(adapted.model, WAN, linear=True)
    assert relative(before.outputs[-1], plain.outputs[-1]) > 0.05
    assert same_runs(fast, plain)


def test_methods_of_the_original_are_followed_where_that_is_asked_for() -> None:
    """What pipelines call when they load adapters or fuse projections."""
    model = make_model(WAN)
    with record(model) as recording:
        recording.finish(run_sampler(model, WAN, linear=True).latents)
    plan = Plan.from_trajectory(
        model, recording, schedule=2, rank=4096, weighting="none", correct=False
    )
    fast = optimize(model, plan, on_change="refactor")
    before = run_sampler(model, WAN, linear=True)
    for call in ("fuse_qkv_projections", "unfuse_qkv_projections"):
        getattr(fast, call)()
        assert same_runs(fast, run_sampler(model, WAN, linear=True)), call
    fast.add_adapter(adapter())
    adapted = run_sampler(model, WAN, linear=True)
    assert relative(adapted.outputs[-1], before.outputs[-1]) > 0.1
    assert same_runs(fast, adapted)
    fast.unload_lora()
    assert same_runs(fast, before)
    with pytest.raises(RunError, match=r"enable_cache\(\)"):
        fast.enable_cache(None)


def test_a_model_inside_of_peft_is_recorded_by_its_own_arguments() -> None:
    """`get_peft_model` wraps the model, and calls may be positional."""
    torch.manual_seed(0)

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return x + self.fc2(torch.tanh(self.fc1(x * timestep[:, None, None])))

    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["fc1", "fc2"])
    model = get_peft_model(Small(), config).eval().requires_grad_(False)
    steps = [(torch.randn(2, 5, 8), torch.full((2,), 1 - 0.1 * k)) for k in range(4)]
    with record(model) as recording:
        expected = [model(x, t) for x, t in steps]
    fast = optimize(model, Plan.from_trajectory(model, recording, schedule="RCCC", rank=8))
    for (x, t), want in zip(steps, expected, strict=True):
        # Rank 8 is all of a layer of 8 channels.
        assert relative(fast(x, t), want) < SAME
