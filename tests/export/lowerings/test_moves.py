"""Transposes that undo one another and chains of reshapes: gone; all other moves stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.toys import run_onnx, targets, trace, written
from torch import Tensor

from calicache.export.lowerings.moves import cancel_moves
from calicache.export.lowerings.reshapes import views_to_reshapes

aten = torch.ops.aten
TURN, SHAPE, TIMES = aten.transpose.int, aten.reshape.default, aten.mul.Tensor
SIZES = (2, 3, 4)


def reshape(x: Tensor, *sizes: int) -> Tensor:
    return aten.reshape.default(x, sizes)


CASES: dict[str, tuple[Callable[[Tensor], Tensor], list[Any]]] = {
    "there and back": (lambda x: x.transpose(1, 2).transpose(1, 2) * 2, [TIMES]),
    "back by other names": (lambda x: x.transpose(1, 2).transpose(-1, -2) * 2, [TIMES]),
    "two ways": (lambda x: x.transpose(1, 2).transpose(0, 1) * 2, [TURN, TURN, TIMES]),
    "chain": (lambda x: reshape(reshape(reshape(x, 24), 4, 6), 8, 3) * 2, [SHAPE, TIMES]),
    "chain to the start": (lambda x: reshape(reshape(x, 24), 2, 3, 4) * 2, [TIMES]),
    "through both": (
        lambda x: reshape(reshape(x, 6, 4).transpose(0, 1).transpose(0, 1), 2, 3, 4) * 2,
        [TIMES],
    ),
    "between": (
        lambda x: reshape(reshape(x, 6, 4).transpose(0, 1), 2, 12) * 2,
        [SHAPE, TURN, aten.clone.default, SHAPE, TIMES],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_moves_that_lead_back_are_gone(name: str) -> None:
    function, expected = CASES[name]
    x = torch.randn(SIZES)
    module = views_to_reshapes(trace(function, x))
    before = written(module)
    lowered = cancel_moves(module)
    assert written(module) == before
    assert targets(lowered) == expected
    # Places change and no values do.
    assert torch.equal(lowered(x)[0], function(x))
    assert torch.equal(run_onnx(module, x)[0], function(x))


def test_a_value_between_stays_where_others_read_it() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        turned = x.transpose(1, 2)
        return turned + 1, turned.transpose(1, 2) + 2

    x = torch.randn(SIZES)
    lowered = cancel_moves(trace(function, x))
    assert targets(lowered) == [TURN, aten.add.Tensor, aten.add.Tensor]
    assert all(map(torch.equal, lowered(x), function(x)))


def test_a_graph_without_moves_is_left_alone() -> None:
    module = trace(lambda x: x * 2, torch.randn(SIZES))
    assert cancel_moves(module) is module
