"""Calibration branches in integers: y_ref + Q(W) Q(x - x_ref), against the formula."""

from __future__ import annotations

import copy
import pickle
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from support.golden import assert_golden, graph_text
from support.models import relative, shake
from torch import Tensor, nn

from calicache.graph_passes import (
    OptimizedModel,
    Plan,
    Recording,
    SiteRule,
    StepMode,
    optimize,
    record,
)
from calicache.graph_passes.graph.operations import quantise, quantised_product, token_scales

REFRESH, CALIBRATE, REUSE, FORECAST = StepMode
SCHEDULE = "RCRCCRCC"


class Block(nn.Module):
    """x + out(gelu(q n) * v n) with n the normed x: two layers read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.q, self.v, self.out = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n = self.norm(x)
        return x + self.out(F.gelu(self.q(n)) * self.v(n))


class Whole(nn.Module):
    """x + W x + b, W of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randint(-63, 64, (6, 6)))
            self.layer.weight[:, 0] = 63.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


@cache
def block() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shake(Block(), 0.2)


def walk(steps: int = len(SCHEDULE)) -> list[Tensor]:
    """Inputs that change a little from step to step, (2, 5, 8)."""
    start, change = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    return [start + 0.1 * k * change for k in range(steps)]


def recorded(model: nn.Module, inputs: list[Tensor]) -> Recording:
    with record(model) as recording, torch.no_grad():
        for x in inputs:
            model(x)
    return recording


def plan_of(model: nn.Module, inputs: list[Tensor], **options: object) -> Plan:
    settings = {"schedule": SCHEDULE, "branch": "int8", "correct": False, "order": 0, **options}
    return Plan.from_trajectory(model, recorded(model, inputs), **settings)  # type: ignore[arg-type]


def fast_of(inputs: list[Tensor], **options: object) -> OptimizedModel:
    return optimize(block(), plan_of(block(), inputs, **options))


def near(y_ref: Tensor, layer: nn.Linear, x: Tensor, x_ref: Tensor) -> Tensor:
    """The formula in doubles, for one layer."""
    weight, increment = layer.weight.double(), (x - x_ref).double()
    weight_scale = (weight.abs().amax(1) / 63)[:, None]
    scale = increment.abs().amax(-1, keepdim=True) / 127
    levels = (increment / scale).round()
    return y_ref + scale * (levels @ (weight_scale * (weight / weight_scale).round()).T)


def oracle(model: Block, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs of all steps by the formula."""
    double = Block().double()
    double.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    kept: dict[str, Tensor] = {}
    outputs = []
    for letter, value in zip(SCHEDULE, inputs, strict=True):
        x = value.double()
        stream = double.embed(x)  # before the first branch: no site
        fresh: dict[str, Tensor] = {}
        n = fresh["n"] = double.norm(stream)
        for name in ("q", "v"):
            layer = getattr(double, name)
            fresh[name] = layer(n) if letter == "R" else near(kept[name], layer, n, kept["n"])
        inner = fresh["inner"] = F.gelu(fresh["q"]) * fresh["v"]
        if letter == "R":
            fresh["out"], kept = double.out(inner), fresh
        else:
            fresh["out"] = near(kept["out"], double.out, inner, kept["inner"])
        outputs.append(stream + fresh["out"])
    return outputs


@pytest.mark.parametrize("order", [0, 2])
def test_every_step_is_that_of_the_formula(order: int) -> None:
    """Whatever the order of anchors: the newest refresh alone counts."""
    inputs = walk()
    fast = fast_of(inputs, order=order)
    with torch.no_grad():
        for x, expected in zip(inputs, oracle(block(), inputs), strict=True):  # type: ignore[arg-type]
            # A level of one increment can fall to the other side of a tie in float32: one of 127
            # levels of a tenth of the value.
            assert relative(fast(x), expected) < 1e-3


def test_rounding_is_a_share_of_the_increment() -> None:
    inputs = walk()
    fast, model = fast_of(inputs), block()
    with torch.no_grad():
        errors = [relative(fast(x), model(x)) for x in inputs]
    stale = [relative(model(inputs[k - 1]), model(inputs[k])) for k in (1, 3, 6)]
    assert max(errors) < 0.02 * min(stale)


def test_whole_levels_are_exact() -> None:
    """Weights and increments that 7 and 8 bits hold give what the layer gives."""
    model = Whole().eval()
    start, change = torch.randint(-9, 9, (2, 3, 6)), torch.randint(-127, 128, (2, 3, 6))
    change[..., 0] = 127
    inputs = [start.float(), (start + change).float()]
    fast = optimize(model, plan_of(model, inputs, schedule="RC"))
    assert [target.name for target in fast.compiled.targets] == ["layer"]
    with torch.no_grad():
        for x in inputs:
            # Sums of whole numbers below 2 ** 24, and a bias.
            torch.testing.assert_close(fast(x), model(x), rtol=1e-6, atol=1e-3)


def test_layers_that_read_one_value_share_its_levels() -> None:
    graph = fast_of(walk()).compiled.variant_set.variants[CALIBRATE].module.graph
    counts = {
        operation: sum(node.target is operation for node in graph.nodes)
        for operation in (token_scales, quantise, quantised_product)
    }
    assert counts == {token_scales: 2, quantise: 2, quantised_product: 3}


def test_graph_of_a_calibrate_step() -> None:
    variant = fast_of(walk(), order=2).compiled.variant_set.variants[CALIBRATE]
    assert_golden("rewriting/calibrate_int8.txt", graph_text(variant.module.graph))


def test_caches_hold_whole_values_of_the_newest_refresh() -> None:
    compiled = fast_of(walk(), order=2).compiled
    caches = {cache.node: (cache.folded, cache.history) for cache in compiled.variant_set.caches}
    read = {target.input_node for target in compiled.targets}
    outputs = {node for target in compiled.targets for node in target.nodes}
    assert caches == dict.fromkeys(read | outputs, (None, 1))
    assert compiled.variant_set.tables == {}


def test_low_rank_branches_beside_it_keep_their_order() -> None:
    rules = (SiteRule("out", "calibrate", rank=4, branch="low_rank"),)  # type: ignore[arg-type]
    inputs = walk()
    fast = fast_of(inputs, order=2, rules=rules)
    targets = {target.name: target for target in fast.compiled.targets}
    histories = {cache.node: cache.history for cache in fast.compiled.variant_set.caches}
    assert histories[targets["out"].nodes[0]] == 3
    assert histories[targets["q"].nodes[0]] == 1
    model = block()
    with torch.no_grad():
        assert max(relative(fast(x), model(x)) for x in inputs) < 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_keep_theirs(dtype: torch.dtype) -> None:
    model = Block().to(dtype).eval()
    inputs = [x.to(dtype) for x in walk()]
    fast = optimize(model, plan_of(model, inputs))
    with torch.no_grad():
        outputs = [(fast(x), model(x)) for x in inputs]
    assert {own.dtype for own, _ in outputs} == {dtype}
    # Rounding of the increments, or of the dtype: 2 ** -9 for bfloat16.
    assert max(relative(own, plain) for own, plain in outputs) < 0.01


def test_costs_are_those_of_whole_products_and_of_bytes() -> None:
    compiled = fast_of(walk()).compiled
    cost, tokens = compiled.cost, 2 * 5
    assert cost.modes[CALIBRATE] == cost.plain_macs
    target = cost.targets["q"]
    assert target.calibrate_macs == target.full_macs == tokens * 8 * 16
    assert target.factor_bytes == 8 * 16 + 4 * 16
    assert target.fold_macs == 0


def test_other_batches_have_the_same_integers() -> None:
    """Of a batch of three, each sample is what it is by itself: scales belong to tokens."""
    model, inputs = block(), walk()
    fast = optimize(model, plan_of(model, inputs))
    alone = optimize(model, plan_of(model, inputs))
    with torch.no_grad():
        for x in inputs:
            together = fast(torch.cat([x, x[:1]]))
            # The same integers; sums of float32 in another order elsewhere.
            torch.testing.assert_close(together[:2], alone(x), rtol=1e-4, atol=1e-4)


def test_copies_and_pickles_run_alike() -> None:
    inputs = walk()
    fast = fast_of(inputs)
    others = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
    with torch.no_grad():
        for x in inputs:
            expected = fast(x)
            assert all(torch.equal(other(x), expected) for other in others)
