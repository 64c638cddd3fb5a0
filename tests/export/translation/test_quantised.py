"""Calibration branches in integers: ONNX Runtime gives what torch gives, and never saturates."""

from __future__ import annotations

import pytest
import torch
from support.toys import op_types, run_onnx
from torch import Tensor, fx

from calicache.export.translation.translate import translate
from calicache.graph_passes.graph.operations import quantise, quantised_product, token_scales


def graph_of(rows: Tensor, weight: Tensor, weight_scales: Tensor) -> fx.GraphModule:
    """Scales, levels and the product of rows (T, in) with a weight."""
    graph, root = fx.Graph(), {"weight": weight, "scales": weight_scales}
    x = graph.placeholder("x")
    scales = graph.call_function(token_scales, (x,))
    levels = graph.call_function(quantise, (x, scales))
    names = [graph.get_attr(name) for name in root]
    product = graph.call_function(quantised_product, (levels, scales, *names))
    graph.output((product, levels, scales))
    values = {x: rows, names[0]: weight, names[1]: weight_scales}
    values[scales] = token_scales(rows)
    values[levels] = quantise(rows, values[scales])
    values[product] = quantised_product(values[levels], values[scales], weight, weight_scales)
    for node, value in values.items():
        node.meta["val"] = value
    return fx.GraphModule(root, graph)


@pytest.mark.parametrize("tokens", [1, 6])
def test_onnx_runtime_agrees_with_torch(tokens: int) -> None:
    rows = torch.randn(tokens, 40) * torch.logspace(-4, 4, tokens)[:, None]
    rows[0, :2] = torch.tensor([2.5, -2.5])
    weight = torch.randint(-63, 64, (40, 7), dtype=torch.int8)
    module = graph_of(rows, weight, torch.rand(7))
    product, levels, scales = run_onnx(module, rows)
    own_product, own_levels, own_scales = module(rows)
    assert torch.equal(scales, own_scales)
    assert torch.equal(levels, own_levels)
    # Sums of integers are exact; two float32 products of one number are rounded.
    torch.testing.assert_close(product, own_product, rtol=1e-6, atol=0)


def test_zeros_stay_zeros() -> None:
    rows = torch.zeros(3, 8)
    module = graph_of(rows, torch.full((8, 4), 63, dtype=torch.int8), torch.ones(4))
    assert not run_onnx(module, rows)[0].any()


def test_the_largest_sums_do_not_saturate() -> None:
    """Two products of 8 bits added in 16 would: 2 * 255 * 127 is above 32,767."""
    rows = torch.ones(4, 64)
    rows[1] = -1.0
    weight = torch.full((64, 8), 63, dtype=torch.int8)
    weight[:, 1] = -63
    product = run_onnx(graph_of(rows, weight, torch.ones(8)), rows)[0]
    expected = rows @ weight.float()  # 64 * 63: all numbers are whole levels
    torch.testing.assert_close(product, expected, rtol=1e-6, atol=0)


def test_product_is_one_operator_of_integers() -> None:
    rows = torch.randn(3, 8)
    module = graph_of(rows, torch.zeros(8, 4, dtype=torch.int8), torch.ones(4))
    operators = list(op_types(translate({"toy": module})["toy"]))
    assert operators.count("MatMulIntegerToFloat") == 1
    assert operators.count("QuantizeLinear") == 1
    assert "MatMul" not in operators
