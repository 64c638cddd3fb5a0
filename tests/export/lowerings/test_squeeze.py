"""Squeezes of other sizes than 1: dropped, what is left alone, numbers, ONNX Runtime."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.toys import run_onnx, targets, trace, written
from torch import Tensor

from calicache.export.lowerings.squeeze import drop_empty_squeezes

aten = torch.ops.aten
SHAPE = (1, 3, 1, 2)
ONE, SEVERAL = aten.squeeze.dim, aten.squeeze.dims


def squeezed(x: Tensor, dim: Any) -> Tensor:
    return (x + 1).squeeze(dim) * 2


def check(module: Any, x: Tensor, expected: Tensor) -> None:
    """Sizes change and no values do: all results are torch's own."""
    before = written(module)
    lowered = drop_empty_squeezes(module)
    assert written(module) == before
    assert written(drop_empty_squeezes(lowered)) == written(lowered)
    for result in (lowered(x)[0], run_onnx(module, x)[0]):
        assert torch.equal(result, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "target", "left"),
    [
        (1, None, None),
        (-1, None, None),
        ((1, 3), None, None),
        ((0, 1), SEVERAL, [0]),
        ((-1, -2), SEVERAL, [-2]),
        ((0, 1, 2, 3), SEVERAL, [0, 2]),
    ],
)
def test_only_sizes_of_1_are_taken_away(dim: Any, target: Any, left: Any) -> None:
    x = torch.randn(SHAPE)
    module = trace(lambda x: squeezed(x, dim), x)
    lowered = drop_empty_squeezes(module)
    middle = [] if target is None else [target]
    assert targets(lowered) == [aten.add.Tensor, *middle, aten.mul.Tensor]
    for node in lowered.graph.nodes:
        if node.target is target:
            assert node.args[1] == left
            assert node.meta["val"].shape == x.squeeze(dim).shape
    check(module, x, squeezed(x, dim))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [0, -2, (0, 2), (-2,)])
def test_squeezes_of_size_1_are_left_alone(dim: Any) -> None:
    x = torch.randn(SHAPE)
    module = trace(lambda x: squeezed(x, dim), x)
    assert str(drop_empty_squeezes(module).graph) == str(module.graph)
    check(module, x, squeezed(x, dim))


def test_a_dropped_squeeze_that_is_the_result() -> None:
    x = torch.randn(SHAPE)
    module = trace(lambda x: (x + 1).squeeze(1), x)
    assert targets(drop_empty_squeezes(module)) == [aten.add.Tensor]
    check(module, x, x + 1)


def test_dropped_squeezes_one_after_the_other() -> None:
    x = torch.randn(SHAPE)
    module = trace(lambda x: (x + 1).squeeze(1).squeeze(0).squeeze(-1) * 2, x)
    assert targets(drop_empty_squeezes(module)) == [aten.add.Tensor, ONE, aten.mul.Tensor]
    check(module, x, ((x + 1) * 2)[0])


@pytest.mark.slow
@pytest.mark.parametrize("dim", [0, -1])
def test_a_value_without_dimensions_has_none_to_take_away(dim: int) -> None:
    x = torch.randn(3)
    module = trace(lambda x: x[0].squeeze(dim) * 2, x)
    check(module, x, x[0] * 2)
