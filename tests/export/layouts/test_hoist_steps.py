"""What the timestep decides is computed for all steps at once, where that is worth it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.models import relative
from torch import Tensor, nn

from calicache.export.layouts.hoist_steps import StepValues, hoist_steps
from calicache.graph_passes import OptimizedModel, Plan, StepMode, optimize, record
from calicache.graph_passes.graph.operations import LINEAR
from calicache.graph_passes.rewriting.variants import Variant

R, C, U, _ = StepMode
STEPS, WIDTH = 5, 32


class Modulated(nn.Module):
    """adaLN: shift, scale and gate come from timestep and label; one block."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Embedding(4, WIDTH)
        self.embed, self.modulation = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        condition = F.silu(self.embed(timestep[:, None]) + self.label(label))
        shift, scale, gate = self.modulation(condition)[:, None].chunk(3, -1)  # (B, 1, C) each
        h = F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift
        return x + gate * self.down(F.gelu(self.up(h)))


def call(step: int, batch: int = 2) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {
        "x": torch.randn(batch, 4, WIDTH, generator=draw),
        "timestep": torch.full((batch,), 1.0 - step / STEPS),
        "label": torch.arange(batch) % 4,
    }


def compiled(batch: int = 2) -> tuple[OptimizedModel, dict[str, Tensor]]:
    """A model and the table of its timesteps, (T, B)."""
    torch.manual_seed(0)
    model = Modulated().eval().requires_grad_(False)
    with record(model) as recording:
        for step in range(STEPS):
            model(**call(step, batch))
    plan = Plan.from_trajectory(model, recording, schedule=(R, C, U, R, U), rank=4, correct=False)
    table = torch.stack([call(step, batch)["timestep"] for step in range(STEPS)])
    return optimize(model, plan), {"timestep": table}


@pytest.fixture(scope="module")
def fast() -> tuple[OptimizedModel, dict[str, Tensor]]:
    return compiled()


@pytest.fixture(scope="module")
def hoisted(fast: tuple[OptimizedModel, dict[str, Tensor]]) -> tuple[StepValues, dict]:
    model, tables = fast
    dependence = model.plan.binding.dependence
    before, variants = hoist_steps(
        model.compiled.captured, dependence, model.compiled.variant_set.variants, tables
    )
    assert before is not None
    return before, dict(variants)


def linears(variant: Variant) -> int:
    return sum(node.target is LINEAR for node in variant.module.graph.nodes)


def test_variants_lose_embedder_and_modulation(fast, hoisted) -> None:
    model, (_, variants) = fast[0], hoisted
    for mode in (R, C):
        assert linears(variants[mode]) == linears(model.compiled.variant_set.variants[mode]) - 2
    names = [node.name for node in variants[R].module.graph.nodes if node.op == "placeholder"]
    assert [name for name in names if name.startswith("step_")] == list(variants[R].reads[-2:])


def test_one_table_serves_all_views_of_a_value(hoisted) -> None:
    before, _ = hoisted
    # shift and gate are views of the modulation; 1 + scale is a value of its own.
    shapes = sorted(tuple(value.shape) for value in before.values.values())
    assert shapes == [(2, 1, WIDTH), (2, 3 * WIDTH)]


def test_values_of_all_steps_are_those_of_each(fast, hoisted) -> None:
    model, tables = fast
    before, variants = hoisted
    assert before.inputs == ("timestep", "label")
    stacks = before.module(tables["timestep"], call(0)["label"])
    with torch.no_grad():
        for step in range(STEPS):
            inputs = list(call(step).values())
            values = dict(zip(before.values, (stack[step] for stack in stacks), strict=True))
            reads = variants[R].reads
            got = variants[R].module(*inputs, *(values[name] for name in reads if name in values))
            expected = model.compiled.captured.module(*inputs)
            # The same float32 products; one GEMM over all steps may sum in another order.
            assert relative(got[0], expected[0]) < 1e-6


def test_variants_that_need_nothing_of_the_step_stay_as_they_were(hoisted) -> None:
    _, variants = hoisted
    assert not any(name.startswith("step_") for name in variants[U].reads)


def test_given_variants_are_not_changed(fast, hoisted) -> None:
    model, _ = fast
    assert not any(
        name.startswith("step_")
        for variant in model.compiled.variant_set.variants.values()
        for name in variant.reads
    )


def test_second_time_there_is_nothing_to_hoist(fast, hoisted) -> None:
    model, tables = fast
    _, variants = hoisted
    dependence = model.plan.binding.dependence
    again, same = hoist_steps(model.compiled.captured, dependence, variants, tables)
    assert again is not None  # the plain graph still has the values
    assert {mode: linears(v) for mode, v in same.items()} == {
        mode: linears(v) for mode, v in variants.items()
    }
    assert {mode: v.reads for mode, v in same.items()} == {m: v.reads for m, v in variants.items()}


def test_tables_larger_than_the_weights_are_not_made() -> None:
    # 5 steps of 64 samples of 4 x 32 numbers, against 33 x 32 + 32 x 96 weights.
    model, tables = compiled(batch=64)
    variants = model.compiled.variant_set.variants
    before, same = hoist_steps(
        model.compiled.captured, model.plan.binding.dependence, variants, tables
    )
    assert before is None
    assert same is variants


def test_no_step_inputs_mean_no_values(fast) -> None:
    model, _ = fast
    variants = model.compiled.variant_set.variants
    assert (
        hoist_steps(model.compiled.captured, model.plan.binding.dependence, variants, {})[0] is None
    )
