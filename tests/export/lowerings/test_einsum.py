"""Einsums that only reorder: fires, exact order, what is left alone, numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from calicache.export.lowerings.einsum import lower_einsum

aten = torch.ops.aten


class Einsum(nn.Module):
    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, *operands: Tensor) -> Tensor:
        return torch.einsum(self.equation, *operands)


def trace(equation: str, *operands: Tensor) -> fx.GraphModule:
    program = torch.export.export(Einsum(equation), operands, strict=False)
    return program.run_decompositions({}).module(check_guards=False)


def targets(module: fx.GraphModule) -> list[object]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("equation", "order"),
    [("nhwpqc->nchpwq", [0, 5, 1, 3, 2, 4]), ("a b -> b a", [1, 0]), ("abc->abc", [0, 1, 2])],
)
def test_reordering_becomes_a_permute(equation: str, order: list[int]) -> None:
    x = torch.randn(*range(2, 2 + len(order)))
    module = trace(equation, x)
    lowered = lower_einsum(module)
    (node,) = (n for n in lowered.graph.nodes if n.target is aten.permute.default)
    assert node.args[1] == order
    assert aten.einsum.default not in targets(lowered)
    assert aten.einsum.default in targets(module)  # the graph that is given stays as it was
    assert node.meta["val"].shape == torch.einsum(equation, x).shape
    # A permute moves values and changes none.
    result = lowered(x)
    assert torch.equal(
        result[0] if isinstance(result, tuple) else result, torch.einsum(equation, x)
    )
    assert str(lower_einsum(lowered).graph) == str(lowered.graph)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ab,bc->ac", [(2, 3), (3, 4)]),
        ("ab->a", [(2, 3)]),
        ("aa->a", [(3, 3)]),
        ("...ab->...ba", [(2, 3, 4)]),
        ("ba", [(2, 3)]),
    ],
)
def test_other_einsums_are_left_alone(equation: str, shapes: list[tuple[int, ...]]) -> None:
    module = trace(equation, *(torch.randn(shape) for shape in shapes))
    assert targets(lower_einsum(module)) == targets(module)
