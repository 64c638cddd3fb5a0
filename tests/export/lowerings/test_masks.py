"""Attention masks with empty rows: guarded once, zero as in torch, what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.toys import op_types, run_onnx, targets, trace, written
from torch import Tensor, fx, nn
from torch.nn import functional as F

from calicache.export.lowerings.masks import guard_empty_rows
from calicache.export.translation import translate as translation
from calicache.export.translation.translate import translate
from calicache.graph_passes.graph.operations import ATTENTION

aten = torch.ops.aten
BATCH, HEADS, TOKENS, WIDTH = 2, 3, 5, 4
# float32: sums over 4 channels and 5 keys in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

# Each with at least one row that sees nothing, and one that sees something.
SHAPES = {
    "all": (BATCH, HEADS, TOKENS, TOKENS),
    "every head": (BATCH, 1, TOKENS, TOKENS),
    "every sample": (1, HEADS, TOKENS, TOKENS),
    "keys": (BATCH, 1, 1, TOKENS),
    "queries": (BATCH, 1, TOKENS, 1),
    "no batch": (TOKENS, TOKENS),
}


class Attend(nn.Module):
    """Layers of attention under one mask, which comes first."""

    def __init__(self, layers: int = 1, **options: Any) -> None:
        super().__init__()
        self.layers, self.options = layers, options

    def forward(self, mask: Tensor, x: Tensor) -> Tensor:
        for _ in range(self.layers):
            x = F.scaled_dot_product_attention(x, x * 2, x, attn_mask=mask, **self.options)
        return x


def draw(*shape: int) -> tuple[Tensor, Tensor]:
    mask = torch.rand(shape) > 0.4
    rows = mask.view(-1, shape[-1])
    rows[0], rows[1::3] = True, False
    return mask, torch.randn(BATCH, HEADS, TOKENS, WIDTH)


def empty_rows(mask: Tensor) -> Tensor:
    """(B, H, N): which queries see nothing."""
    full = torch.broadcast_to(mask, (BATCH, HEADS, TOKENS, TOKENS))
    return ~full.any(-1)


def count(module: fx.GraphModule, target: Any) -> int:
    return targets(module).count(target)


def test_the_guard_is_four_operations() -> None:
    mask, x = draw(*SHAPES["every head"])
    module = trace(Attend(scale=0.3), mask, x)
    before = written(module)
    guarded = guard_empty_rows(module)
    assert written(module) == before
    assert targets(guarded) == [
        *(aten.mul.Tensor, aten.any.dim, aten.logical_not.default, aten.logical_or.default),
        *(ATTENTION, aten.masked_fill.Scalar),
    ]
    _, some, empty, full, attention, filled = (
        node for node in guarded.graph.nodes if node.op == "call_function"
    )
    placeholder = next(iter(guarded.graph.nodes))
    assert some.args == (placeholder, -1, True)
    assert full.args == (placeholder, empty)
    assert attention.args[3] is full
    assert dict(attention.kwargs) == {"scale": 0.3}
    assert filled.args == (attention, empty, 0.0)
    shapes = [tuple(node.meta["val"].shape) for node in (some, empty, full, filled)]
    row = (BATCH, 1, TOKENS, 1)
    assert shapes == [row, row, tuple(mask.shape), tuple(x.shape)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_empty_rows_are_zero_in_torch_and_in_onnx_runtime(shape: tuple[int, ...]) -> None:
    mask, x = draw(*shape)
    empty, module = empty_rows(mask), trace(Attend(), mask, x)
    assert empty.any()
    assert not empty.all()
    expected = Attend()(mask, x)
    assert not expected[empty].any()  # torch's own answer
    guarded = guard_empty_rows(module)
    for result in (guarded(mask, x)[0], run_onnx(module, mask, x)[0]):
        assert not result[empty].any()
        torch.testing.assert_close(result, expected, **CLOSE)


@pytest.mark.slow
def test_without_the_guard_they_are_something_else(monkeypatch) -> None:
    kept = tuple(pass_ for pass_ in translation.LOWERINGS if pass_ is not guard_empty_rows)
    monkeypatch.setattr(translation, "LOWERINGS", kept)
    for shape, fused in (("every head", True), ("keys", False)):
        mask, x = draw(*SHAPES[shape])
        module = trace(Attend(), mask, x)
        assert ("MultiHeadAttention" in op_types(translate({"toy": module})["toy"])) == fused
        result = run_onnx(module, mask, x)[0][empty_rows(mask)]
        # No number from the operator; the exporter's own form looks at all keys alike.
        assert result.isnan().all() if fused else result.abs().min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 3])
def test_a_shared_mask_is_guarded_once(layers: int) -> None:
    mask, x = draw(*SHAPES["every head"])
    module = trace(Attend(layers), mask, x)
    guarded = guard_empty_rows(module)
    assert count(guarded, aten.any.dim) == count(guarded, aten.logical_or.default) == 1
    assert count(guarded, ATTENTION) == count(guarded, aten.masked_fill.Scalar) == layers
    expected = Attend(layers)(mask, x)
    torch.testing.assert_close(guarded(mask, x)[0], expected, **CLOSE)
    torch.testing.assert_close(run_onnx(module, mask, x)[0], expected, **CLOSE)


def test_two_masks_are_guarded_each() -> None:
    def model(first: Tensor, second: Tensor, x: Tensor) -> Tensor:
        for mask in (first, ~second, first):
            x = F.scaled_dot_product_attention(x, x, x, mask)
        return x

    (first, x), (second, _) = draw(*SHAPES["all"]), draw(*SHAPES["keys"])
    module = trace(model, first, second, x)
    guarded = guard_empty_rows(module)
    assert count(guarded, aten.any.dim) == 2
    assert count(guarded, aten.masked_fill.Scalar) == 3
    torch.testing.assert_close(guarded(first, second, x)[0], model(first, second, x), **CLOSE)


def test_other_uses_of_the_mask_see_the_mask_itself() -> None:
    def model(mask: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed = F.scaled_dot_product_attention(x, x, x, mask)
        return mixed, mask.sum(-1)

    mask, x = draw(*SHAPES["all"])
    guarded = guard_empty_rows(trace(model, mask, x))
    assert torch.equal(guarded(mask, x)[1], mask.sum(-1))


def test_values_without_heads_are_guarded_too() -> None:
    mask, x = draw(BATCH, TOKENS, TOKENS)[0], torch.randn(BATCH, TOKENS, WIDTH)
    module, expected = trace(Attend(), mask, x), Attend()(mask, x)
    assert not expected[~mask.any(-1)].any()
    torch.testing.assert_close(guard_empty_rows(module)(mask, x)[0], expected, **CLOSE)


def test_a_mask_that_leaves_no_row_empty_changes_nothing() -> None:
    mask, x = draw(*SHAPES["every head"])
    mask[..., 0] = True
    module = trace(Attend(), mask, x)
    # The same kernel on the same mask.
    assert torch.equal(guard_empty_rows(module)(mask, x)[0], module(mask, x)[0])


def test_a_second_guard_gives_the_same_values() -> None:
    mask, x = draw(*SHAPES["every head"])
    once = guard_empty_rows(trace(Attend(), mask, x))
    assert torch.equal(guard_empty_rows(once)(mask, x)[0], once(mask, x)[0])


@pytest.mark.parametrize(
    "model",
    [
        lambda mask, x: F.scaled_dot_product_attention(x, x, x, mask.to(x.dtype)),
        lambda mask, x: F.scaled_dot_product_attention(x, x, x) * mask.any(),
        lambda mask, x: F.scaled_dot_product_attention(x, x, x, is_causal=True) * mask.any(),
        lambda mask, x: x.masked_fill(~mask.any(-1, keepdim=True), 0.0),
    ],
    ids=["numbers", "no mask", "causal", "no attention"],
)
def test_other_graphs_are_left_alone(model: Any) -> None:
    module = trace(model, *draw(*SHAPES["every head"]))
    assert targets(guard_empty_rows(module)) == targets(module)
