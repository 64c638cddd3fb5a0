"""optimize(): what it refuses, what it leaves alone, what it shares."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from model import FashionDiT
from support.models import STEPS, diffusers_calls, sample_dit, shake
from torch import Tensor, nn

from calicache.graph_passes import (
    Granularity,
    OptimizedModel,
    Plan,
    Recording,
    SiteMode,
    SiteRule,
    StepMode,
    Weighting,
    optimize,
    record,
)
from calicache.graph_passes.common.errors import CaptureError, PlanError
from calicache.graph_passes.common.progress import Progress
from calicache.graph_passes.factors.statistics import ChannelStatistics

REFRESH, CALIBRATE, REUSE, FORECAST = StepMode


@pytest.fixture(scope="module")
def fast(dit: FashionDiT, dit_plan: Plan) -> OptimizedModel:
    return optimize(dit, dit_plan.with_schedule((REFRESH, CALIBRATE, REUSE) * 2))


@pytest.fixture(scope="module")
def diffusers_plan(diffusers_dit: DiTTransformer2DModel, diffusers_recording: Recording) -> Plan:
    return Plan.from_trajectory(diffusers_dit, diffusers_recording, schedule=3, rank=4)


def told(seen: Sequence[Progress]) -> list[tuple[float, float]]:
    """What was told once there was something done."""
    assert len({progress.stage for progress in seen[:2]}) == 2  # capturing, then factors alone
    assert len({progress.stage for progress in seen[1:]}) == 1
    return [(progress.done, progress.total) for progress in seen if progress.done]


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.slow
def test_other_weights_are_refused(dit: FashionDiT, dit_plan: Plan) -> None:
    other = copy.deepcopy(dit)
    other.blocks[1].mlp.fc2.bias[3] += 1e-3
    with pytest.raises(PlanError, match="the checkpoint the plan was made from") as raised:
        optimize(other, dit_plan)
    assert raised.value.where == "weights"
    assert dit_plan.binding.weights_hash[:12] in str(raised.value)
    other.blocks[1].mlp.fc2.bias.copy_(dit.blocks[1].mlp.fc2.bias)
    assert isinstance(optimize(other, dit_plan), OptimizedModel)  # equal weights, another object


def test_another_precision_is_refused(dit: FashionDiT, dit_plan: Plan) -> None:
    with pytest.raises(PlanError, match="weights"):
        optimize(copy.deepcopy(dit).bfloat16(), dit_plan)


def test_training_mode_is_refused(dit: FashionDiT, dit_plan: Plan) -> None:
    with pytest.raises(CaptureError, match=r"training mode.*eval\(\)"):
        optimize(copy.deepcopy(dit).train(), dit_plan)


def test_rank_above_every_layer_is_the_full_rank_of_each(dit: FashionDiT, dit_plan: Plan) -> None:
    full, above = (optimize(dit, dit_plan.with_rank(rank)) for rank in (32, 500))
    assert above.compiled.targets == full.compiled.targets
    assert {target.rank for target in above.compiled.targets} == {32}


def test_rank_too_high_in_a_rule_names_the_layer_and_its_limit(
    dit: FashionDiT, dit_plan: Plan
) -> None:
    rules = (SiteRule("blocks.1.attn.k", SiteMode.CALIBRATE, rank=33),)
    recipe = dataclasses.replace(dit_plan.recipe, rules=rules)
    with pytest.raises(PlanError, match=r"0 \.\. 32 for 32 -> 32, got 33") as raised:
        optimize(dit, dataclasses.replace(dit_plan, recipe=recipe))
    assert raised.value.where == "rank of blocks.1.attn.k"


def with_statistics(plan: Plan, name: str, value: ChannelStatistics | None) -> Plan:
    statistics: Mapping[str, ChannelStatistics] = {
        key: kept for key, kept in {**plan.statistics, name: value}.items() if kept is not None
    }
    return dataclasses.replace(plan, statistics=statistics)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["input", "output"])
def test_statistics_that_are_not_finite_are_refused(
    dit: FashionDiT, dit_plan: Plan, part: str, bad: float
) -> None:
    name = "blocks.1.attn.v"
    good = dit_plan.statistics[name]
    values = getattr(good, part).clone()
    values[5] = bad
    broken = with_statistics(dit_plan, name, dataclasses.replace(good, **{part: values}))
    with pytest.raises(PlanError, match="NaN or Inf") as raised:
        optimize(dit, broken)
    assert raised.value.where == f"statistics of {name}"


def test_statistics_that_do_not_fit_are_refused(dit: FashionDiT, dit_plan: Plan) -> None:
    name = "blocks.0.mlp.fc1"
    swapped = ChannelStatistics(torch.ones(128), torch.ones(32))
    for value in (swapped, None):
        with pytest.raises(PlanError, match=r"'input': \(32,\), 'output': \(128,\)") as raised:
            optimize(dit, with_statistics(dit_plan, name, value))
        assert raised.value.where == f"statistics of {name}"


def test_plain_svd_needs_no_statistics(dit: FashionDiT, dit_plan: Plan) -> None:
    recipe = dataclasses.replace(dit_plan.recipe, weighting=Weighting.NONE)
    fast = optimize(dit, Plan(dit_plan.binding, recipe, {}))
    assert set(fast.compiled.factors) == {
        site.name for site in fast.compiled.analysis.sites.linears
    }


# --- what the plan decides --------------------------------------------------------------------


@pytest.mark.slow
def test_patterns_of_the_plan_choose_the_sites(dit: FashionDiT, dit_plan: Plan) -> None:
    recipe = dataclasses.replace(dit_plan.recipe, include=("*.mlp.*",), exclude=("blocks.0.*",))
    fast = optimize(dit, dataclasses.replace(dit_plan, recipe=recipe))
    assert list(fast.compiled.factors) == ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]


@pytest.mark.parametrize("schedule", [(REFRESH, CALIBRATE), (REFRESH, REUSE), (REFRESH, REFRESH)])
def test_only_the_modes_of_the_schedule_are_made(
    dit: FashionDiT, dit_plan: Plan, schedule: tuple[StepMode, ...]
) -> None:
    seen: list[Progress] = []
    fast = optimize(dit, dit_plan.with_schedule(schedule), on_progress=seen.append)
    assert set(fast.compiled.variant_set.variants) == set(schedule)
    # No layer is decomposed for nothing.
    layers = 12 if CALIBRATE in schedule else 0
    # A model that is run whole has no graph before it is asked for.
    whole = set(schedule) == {REFRESH}
    assert (seen == []) if whole else (told(seen) == [(k, layers) for k in range(1, layers + 1)])
    assert len(fast.compiled.factors) == layers


# --- what is left alone, what is shared -------------------------------------------------------


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.slow
def test_model_is_not_changed(dit: FashionDiT, dit_plan: Plan) -> None:
    mine = copy.deepcopy(dit)
    before = {name: value.clone() for name, value in tensors(mine).items()}
    objects, image = dict(mine.named_modules()), sample_dit(mine)
    hooks = {name: len(module._forward_pre_hooks) for name, module in objects.items()}
    fast = optimize(mine, dit_plan)
    sample_dit(fast)
    assert dict(mine.named_modules()) == objects
    assert {n: len(module._forward_pre_hooks) for n, module in objects.items()} == hooks
    assert tensors(mine).keys() == before.keys()
    for name, value in tensors(mine).items():
        assert torch.equal(value, before[name]), name  # bitwise: not written at all
    assert not mine.training
    # The same program on the same numbers.
    assert torch.equal(sample_dit(mine), image)


@pytest.mark.slow
def test_model_of_diffusers_is_not_changed(
    diffusers_dit: DiTTransformer2DModel, diffusers_plan: Plan
) -> None:
    before = diffusers_calls(diffusers_dit)
    diffusers_calls(optimize(diffusers_dit, diffusers_plan))
    # The same program on the same numbers.
    for got, expected in zip(diffusers_calls(diffusers_dit), before, strict=True):
        assert torch.equal(got, expected)


def test_weights_are_shared_by_all_variants(dit: FashionDiT, fast: OptimizedModel) -> None:
    own = {name: value.data_ptr() for name, value in tensors(dit).items()}
    seen: dict[str, int] = {}
    for variant in fast.compiled.variant_set.variants.values():
        for name, value in tensors(variant.module).items():
            assert seen.setdefault(name, value.data_ptr()) == value.data_ptr(), name
    assert {name: seen[name] for name in own if name in seen} == own
    assert {name.split(".")[0] for name in seen.keys() - own.keys()} == {"calibration"}


def test_parameters_are_counted_once(dit: FashionDiT, fast: OptimizedModel) -> None:
    plain = sum(value.numel() for value in dit.parameters())
    assert sum(value.numel() for value in fast.parameters()) == plain


def test_result_keeps_what_each_stage_made(fast: OptimizedModel, dit: FashionDiT) -> None:
    assert fast.original is dit
    assert len(fast.plan.schedule) == STEPS
    assert {factors.rank for factors in fast.compiled.factors.values()} == {4}
    modes = fast.compiled.cost.modes
    assert modes[REUSE] < modes[CALIBRATE] < fast.compiled.cost.plain_macs
    assert list(fast.compiled.cost.targets) == [target.name for target in fast.compiled.targets]


# --- forecasts, rules, output weights ---------------------------------------------------------


def test_plan_with_everything_makes_all_modes(dit: FashionDiT, forecast_plan: Plan) -> None:
    seen: list[Progress] = []
    fast = optimize(dit, forecast_plan, on_progress=seen.append)
    assert set(fast.compiled.variant_set.variants) == set(StepMode)
    # q, k and v together, proj, fc1, fc2; twice.
    assert [len(target.sites) for target in fast.compiled.targets] == [3, 1, 1, 1] * 2
    assert told(seen) == [(done, 8) for done in range(1, 9)]
    assert fast.compiled.cost.modes[FORECAST] == 0
    assert set(fast.compiled.variant_set.tables) == {
        *(f"anchor_weight_{k}" for k in range(3)),
        *(f"output_weight_{k}" for k in range(5)),
    }
    for place in range(5):
        column = tuple(row[place] for row in forecast_plan.recipe.output_weights)
        assert fast.compiled.variant_set.tables[f"output_weight_{place}"] == column


def test_saved_plan_makes_the_same_model(
    dit: FashionDiT, forecast_plan: Plan, tmp_path: Path
) -> None:
    forecast_plan.save(tmp_path / "plan")
    fast, again = optimize(dit, forecast_plan), optimize(dit, Plan.load(tmp_path / "plan"))
    # The same program on the same numbers: JSON keeps every digit of the output weights.
    assert torch.equal(sample_dit(fast), sample_dit(again))


def test_rules_decide_what_a_step_calibrates(dit: FashionDiT, dit_recording: Recording) -> None:
    rules = (
        SiteRule("blocks.0.attn", SiteMode.REUSE),
        SiteRule("blocks.0.mlp", SiteMode.CALIBRATE, 3, Granularity.BRANCH),
        SiteRule("blocks.1.mlp.fc1", SiteMode.FULL),
    )
    plan = Plan.from_trajectory(dit, dit_recording, rank=4, rules=rules, correct=False)
    fast = optimize(dit, plan)
    assert [(target.name, target.granularity, target.rank) for target in fast.compiled.targets] == [
        ("blocks.0.attn", Granularity.BRANCH, 0),
        ("blocks.0.mlp", Granularity.BRANCH, 3),
        ("blocks.1.attn.q+k+v", Granularity.LINEAR, 6),
        ("blocks.1.attn.proj", Granularity.LINEAR, 4),
        ("blocks.1.mlp.fc2", Granularity.LINEAR, 4),
    ]
    assert list(fast.compiled.factors) == [target.name for target in fast.compiled.targets[1:]]
    read = {str(n.target) for n in fast.variants["CALIBRATE"].graph.nodes if n.op == "get_attr"}
    assert "blocks.1.mlp.fc1.weight" in read
    assert "blocks.0.mlp.fc1.weight" not in read


def test_branch_granularity_calibrates_every_branch_as_a_whole(
    dit: FashionDiT, dit_recording: Recording
) -> None:
    plan = Plan.from_trajectory(
        dit, dit_recording, rank=4, granularity="branch", correct=False, order=1
    )
    fast = optimize(dit, plan)
    assert {target.granularity for target in fast.compiled.targets} == {Granularity.BRANCH}
    assert len(fast.compiled.targets) == len(fast.compiled.analysis.sites.branches) == 4
    for target in fast.compiled.targets:  # 32 channels at rank 4, over 4 x 49 tokens
        assert fast.compiled.cost.targets[target.name].calibrate_macs == 4 * 49 * 4 * (32 + 32)
    assert fast.compiled.cost.modes[CALIBRATE] < 0.5 * fast.compiled.cost.plain_macs


class Turned(nn.Module):
    """A branch whose entry has channels first and whose exit has tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x).transpose(1, 2))
        return x.transpose(1, 2) + torch.tanh(self.inner(x.transpose(1, 2)))


def test_branch_that_is_not_token_wise_falls_back_to_its_layers() -> None:
    model = shake(Turned())
    with record(model) as recording, torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 5, 8))
    plan = Plan.from_trajectory(model, recording, rank=2, granularity="branch", correct=False)
    fast = optimize(model, plan)
    assert [(t.name, t.granularity) for t in fast.compiled.targets] == [
        ("inner", Granularity.LINEAR)
    ]
    (rejection,) = [r for r in fast.compiled.rejections if "not token-wise" in r.reason]
    assert rejection.reason == "not token-wise as a whole: from (2, 8, 5) to (2, 5, 8)"


def test_statistics_of_other_steps_than_the_schedule_are_refused(
    dit: FashionDiT, dit_recording: Recording
) -> None:
    plan = Plan.from_trajectory(dit, dit_recording, rank=4, mode=REUSE, correct=False)
    assert plan.statistics == {}
    with pytest.raises(PlanError, match="with the steps it will run"):
        optimize(dit, plan.with_schedule((REFRESH, CALIBRATE)))


class Scaled(nn.Module):
    """No parameter at all; the factor is a buffer, or a number."""

    def __init__(self, *, buffer: bool) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(0.5) if buffer else None)

    def forward(self, x: Tensor) -> Tensor:
        return x * (0.5 if self.factor is None else self.factor)


@pytest.mark.parametrize("buffer", [True, False], ids=["buffer", "number"])
def test_a_model_without_parameters_can_be_forecast(buffer: bool) -> None:
    model = Scaled(buffer=buffer).eval()
    with record(model) as recording:
        for step in range(3):
            model(torch.tensor([[4.0 - step, step]]))
    plan = Plan.from_trajectory(
        model, recording, schedule="RFR", weighting="none", order=0, correct=False
    )
    fast = optimize(model, plan)
    got = [fast(**call) for call in recording.calls]
    assert [float(value[0, 0]) for value in got] == [2.0, 2.0, 1.0]  # halves: exact
