"""What is counted of memory, against tensors that are really there."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from calicache.graph_passes.api.scale.memory import SUM_DTYPE, decomposing_bytes, live_bytes
from calicache.graph_passes.factors.streams import KeptValues, Moments
from calicache.graph_passes.settings.choices import Granularity, StepMode
from calicache.graph_passes.sites.targets import CalibrationTarget

TARGET = CalibrationTarget(
    "layer", Granularity.LINEAR, ("layer",), "x", ("y",), ("w",), 4, (6,), 3, 2
)


def test_sums_have_the_size_that_is_counted() -> None:
    kept = KeptValues((StepMode.REFRESH, StepMode.CALIBRATE), 0)
    moments = Moments(TARGET, kept)
    for step in range(2):
        moments.add(step, {"x": torch.randn(1, 3, 4), "y": torch.randn(1, 3, 6)})
    assert {value.dtype for value in moments.sums.values()} == {SUM_DTYPE}


def test_values_live_until_they_are_last_used() -> None:
    def chain(x: Tensor) -> Tensor:
        wide = torch.ops.aten.cat.default([x, x])  # 2
        view = torch.ops.aten.view.default(wide, [-1])  # nothing of its own, but wide stays
        small = torch.ops.aten.relu.default(x)  # 1; x goes
        return torch.ops.aten.relu.default(view), small  # 2 more

    graph = fx.symbolic_trace(chain).graph
    sizes = {"x": 4, "cat": 8, "cat_default": 8, "view_default": 8, "relu_default": 4}
    for node in graph.nodes:
        if node.op != "output":
            node.meta["val"] = torch.zeros(sizes.get(node.name, 8))
    unit = 4 * torch.float32.itemsize
    assert live_bytes(graph) == 5 * unit  # wide, small, and the last relu


def test_the_largest_decomposition_counts_once() -> None:
    one, two = decomposing_bytes([TARGET]), decomposing_bytes([TARGET, TARGET])
    held = 8 * (4 * 6 + 4 * 4 + 4 * 4)  # W, the vectors and the triangle in float64
    assert two - one == held
