"""Products with a weight: linear layers over rows, the weight as it lies; others are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.toys import Toy, op_types, run_onnx, targets, trace, written
from torch import Tensor, nn

from calicache.export.lowerings.products import products_to_linears
from calicache.export.translation.translate import translate

aten = torch.ops.aten
LINEAR, SHAPE, MM, T = (
    aten.linear.default,
    aten.reshape.default,
    aten.mm.default,
    aten.t.default,
)
# float32 sums of five products in two orders.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Weighted(nn.Module):
    """A weight (6, 5) and a bias (6,) for what a path does with them."""

    def __init__(self, path: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(6))
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        return self.path(x, self.weight, self.bias)


CASES: dict[str, tuple[tuple[int, ...], Callable[..., Tensor], list[Any]]] = {
    "rows": ((3, 5), F.linear, [LINEAR]),
    "tokens": ((2, 3, 5), F.linear, [SHAPE, LINEAR, SHAPE]),
    "patches": ((2, 1, 3, 2, 5), F.linear, [SHAPE, LINEAR, SHAPE]),
    "a vector": ((5,), F.linear, [SHAPE, LINEAR, SHAPE]),
    "without bias": ((2, 3, 5), lambda x, w, _: F.linear(x, w), [SHAPE, LINEAR, SHAPE]),
    "mm": ((3, 5), lambda x, w, _: aten.mm(x, aten.t(w)), [LINEAR]),
    "addmm": ((3, 5), lambda x, w, b: aten.addmm(b, x, aten.t(w)), [LINEAR]),
    "transposed": ((3, 5), lambda x, w, _: aten.mm(x, w.transpose(0, 1)), [LINEAR]),
    "not turned": ((3, 6), lambda x, w, _: aten.mm(x, w), [MM]),
    "scaled": (
        (3, 5),
        lambda x, w, b: aten.addmm(b, x, aten.t(w), beta=2),
        [T, aten.addmm.default],
    ),
    "full bias": (
        (3, 5),
        lambda x, w, b: aten.addmm(b.expand(3, 6), x, aten.t(w)),
        [aten.expand.default, T, aten.addmm.default],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_products_with_a_weight_are_linear_layers_over_rows(name: str) -> None:
    shape, path, expected = CASES[name]
    x, model = torch.randn(shape), Weighted(path).eval()
    module = trace(model, x)
    before = written(module)
    lowered = products_to_linears(module)
    assert written(module) == before
    assert targets(lowered) == expected
    torch.testing.assert_close(lowered(x)[0], model(x), **CLOSE)
    torch.testing.assert_close(run_onnx(module, x)[0], model(x), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (2, 1, 3, 2, 5)])
def test_no_weight_is_turned_around(shape: tuple[int, ...]) -> None:
    module = trace(Weighted(F.linear).eval(), torch.randn(shape))
    operators = list(op_types(translate({"linear": module})["linear"]))
    assert "Gemm" in operators
    assert not {"Transpose", "MatMul"} & set(operators)


def test_a_graph_without_products_is_left_alone() -> None:
    module = trace(Toy(lambda x: x * 2), torch.randn(3))
    assert products_to_linears(module) is module
