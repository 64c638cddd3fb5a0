"""Values inside a graph, told while it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from calicache.graph_passes.graph.tap import Tap


class Small(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 1).relu() * 2


def test_values_of_the_named_nodes_are_told_in_the_order_of_the_graph() -> None:
    module, x = fx.symbolic_trace(Small()), torch.tensor([-3.0, 1.0])
    told: list[tuple[str, Any]] = []
    result = Tap(module, {"mul", "add"}, lambda *value: told.append(value)).run(x)
    assert [name for name, _ in told] == ["add", "mul"]
    torch.testing.assert_close(told[0][1], x + 1, rtol=0, atol=0)
    torch.testing.assert_close(result, module(x), rtol=0, atol=0)
