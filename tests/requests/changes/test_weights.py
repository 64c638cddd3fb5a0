"""Weights that are not those of the plan: noticed, or what the plan is given."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model import FashionDiT
from support.models import relative, sample_dit
from torch import nn

from calicache.graph_passes import Plan, Recording, StepMode, optimize, record
from calicache.graph_passes.api.running.weights import WeightVersions
from calicache.graph_passes.common.errors import PlanError, RunError

pytestmark = pytest.mark.slow


@pytest.fixture
def tuned(dit: FashionDiT) -> FashionDiT:
    """The model after some training, or with a LoRA fused."""
    model, draw = copy.deepcopy(dit), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in model.blocks:
            weight = block.mlp.fc1.weight
            down, up = (torch.randn(n, 2, generator=draw) for n in weight.shape)
            weight += 0.01 * down @ up.T
    return model


def test_a_plan_for_other_weights_is_refused_with_the_way_out(
    tuned: FashionDiT, dit_plan: Plan
) -> None:
    with pytest.raises(PlanError, match="rebind"):
        optimize(tuned, dit_plan)


def test_a_plan_is_carried_to_other_weights(
    tuned: FashionDiT, dit: FashionDiT, dit_plan: Plan
) -> None:
    plan = dit_plan.rebind(tuned)
    assert (plan.recipe.schedule, plan.statistics) == (dit_plan.schedule, dit_plan.statistics)
    assert "the error was not measured" in plan.recipe.correction
    assert plan.front is None
    full = plan.with_rank(64)
    got = sample_dit(optimize(tuned, full))
    # Factors of the new weights, at full rank: float32 through two orders of the same products.
    assert relative(got, sample_dit(tuned)) < 1e-4
    assert relative(got, sample_dit(dit)) > 1e-3


def test_with_a_recording_everything_is_fitted_anew(tuned: FashionDiT, dit_plan: Plan) -> None:
    with record(tuned) as recording:
        recording.finish(sample_dit(tuned))
    plan = dit_plan.rebind(tuned, recording)
    fresh = Plan.from_trajectory(
        tuned,
        recording,
        schedule=dit_plan.schedule,
        rank=dit_plan.recipe.rank,
        order=dit_plan.recipe.order,
        weighting=dit_plan.recipe.weighting,
        correct=dit_plan.recipe.output_weights is not None,
    )
    assert replace(plan.recipe, correction="") == replace(fresh.recipe, correction="")
    assert plan.binding == fresh.binding
    assert plan.statistics.keys() == fresh.statistics.keys()


@pytest.mark.parametrize("correct", [True, False])
def test_with_a_recording_the_error_is_measured(
    tuned: FashionDiT, dit: FashionDiT, dit_recording: Recording, correct: bool, tmp_path: Path
) -> None:
    old = Plan.from_trajectory(dit, dit_recording, schedule=3, rank=4, correct=correct)
    with record(tuned) as recording:
        end = sample_dit(tuned)
        recording.finish(end)
    plan = old.rebind(tuned, recording)
    assert (plan.recipe.output_weights is None) == (not correct)
    assert plan.in_sample is not None
    errors = [relative(*pair) for pair in zip(sample_dit(optimize(tuned, plan)), end, strict=True)]
    assert plan.in_sample.samples == len(end)
    # The same run of the sampler; its own update is recovered from the recording, to 1e-5.
    assert plan.in_sample.mean == pytest.approx(sum(errors) / len(errors), rel=1e-2)
    assert plan.in_sample.worst == pytest.approx(max(errors), rel=1e-2)
    assert f"error: {plan.in_sample.mean:.3g} in sample" in plan.describe()
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").in_sample == plan.in_sample
    assert plan.rebind(dit).in_sample is None
    assert plan.rebind(dit).describe().endswith("error: not measured")


@pytest.mark.parametrize("how", ["written", "replaced", "added"])
def test_a_change_is_noticed_when_a_run_begins(
    dit: FashionDiT, dit_recording: Recording, dit_plan: Plan, how: str
) -> None:
    model = copy.deepcopy(dit)
    fast = optimize(model, dit_plan)
    first, second = dit_recording.calls[:2]
    fast(**first)
    layer = model.blocks[0].mlp.fc1
    if how == "written":
        layer.weight.mul_(1.5)
    elif how == "replaced":
        layer.weight = torch.nn.Parameter(layer.weight.clone(), requires_grad=False)
    else:
        layer.extra = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    fast(**second)  # the run that goes on has its caches
    with pytest.raises(RunError, match=r"blocks\.0\.mlp\.fc1\.(weight|extra).*rebind"):
        fast(**first)


def test_changed_weights_get_factors_of_their_own(
    dit: FashionDiT, dit_recording: Recording, dit_plan: Plan
) -> None:
    model = copy.deepcopy(dit)
    fast = optimize(model, dit_plan, on_change="refactor")
    calls = dit_recording.calls[:3]
    before = [fast(**call) for call in calls]
    model.blocks[0].mlp.fc1.weight.mul_(1.5)
    model.blocks[1].attn.proj.weight = torch.nn.Parameter(
        model.blocks[1].attn.proj.weight.flip(0), requires_grad=False
    )
    expected = optimize(model, dit_plan.rebind(model))
    for call, old in zip(calls, before, strict=True):
        actual = fast(**call)
        assert torch.equal(actual, expected(**call))
        assert relative(actual, old) > 1e-3  # the change shows
    assert fast.plan.recipe == dit_plan.rebind(model).recipe
    assert (
        fast.variants["CALIBRATE"] is fast.compiled.variant_set.variants[StepMode.CALIBRATE].module
    )


def test_another_word_for_a_change_is_refused(dit: FashionDiT, dit_plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"onchange: expected refuse \| refactor, got 'ignore'"):
        optimize(dit, dit_plan, on_change="ignore")


def test_moving_and_copying_is_no_change(
    dit: FashionDiT, dit_recording: Recording, dit_plan: Plan
) -> None:
    fast = optimize(copy.deepcopy(dit), dit_plan)
    for model in (fast.to("cpu"), copy.deepcopy(fast), fast.requires_grad_(False)):
        model.reset()
        model(**dit_recording.calls[0])


SETTINGS: dict[str, tuple[Any, Any]] = {
    "a fraction": (0.5, 0.25),
    "a switch": (False, True),
    "a text": ("default", "second"),
    "an adapter's scales": ({"default": 2.0}, {"default": 1.0}),
    "adapters that are fused": ([], ["default"]),
    "lists in lists": ({"a": [("x", 1)]}, {"a": [("x", 2)]}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_modules_count(setting: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before, after = SETTINGS[setting]
    model[1].setting = before
    state = WeightVersions.of(model)
    assert state.refusal(model) is None
    model[1].setting = after
    refusal = state.refusal(model)
    assert refusal is not None
    assert refusal.where == "1"
    assert refusal.got == "others in 1 of 3 modules"


def test_what_a_model_keeps_while_it_runs_is_no_setting() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    model[0].longest, model[0].shape, model[0].table = 77, (2, 3), {"angles": torch.ones(2)}
    state = WeightVersions.of(model)
    model[0].longest, model[0].shape, model[0].table = 512, (4, 9), {"angles": torch.ones(3)}
    model.train()
    assert state.refusal(model) is None
