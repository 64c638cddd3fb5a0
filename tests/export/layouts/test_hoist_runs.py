"""What does not change over a run moves in front of the loops, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calicache.export import read_sampler
from calicache.export.layouts.hoist_runs import HoistInvariants
from calicache.export.layouts.sampler import sampler_model
from calicache.graph_passes import OptimizedModel, Plan, Recording, StepMode, optimize, record

R, C, U, FORECAST = StepMode
STEPS = 6


class TextDiT(nn.Module):
    """One block that attends to a projected text, as PixArt and Wan do."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.keys = nn.Linear(12, 16), nn.Linear(16, 16)
        self.queries, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        keys = self.keys(F.silu(self.project(text)))  # (B, L, 16): the same at every step
        scores = (self.queries(x * (1 + timestep[:, None, None])) @ keys.mT).softmax(-1)
        x = x + self.out(scores @ keys)
        return x + self.down(F.gelu(self.up(x)))


def euler(model: nn.Module, noise: Tensor, text: Tensor) -> Tensor:
    x = noise
    with torch.no_grad():
        for step in range(STEPS):
            now = torch.full((len(x),), 1 - step / STEPS)
            x = x - model(x=x, timestep=now, text=text) / STEPS
    return x


def draw(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 16, generator=generator), torch.randn(2, 7, 12, generator=generator)


@pytest.fixture(scope="module")
def recorded() -> tuple[OptimizedModel, Recording]:
    torch.manual_seed(0)
    model = TextDiT().eval().requires_grad_(False)
    with record(model) as recording:
        recording.finish(euler(model, *draw(1)))
    schedule = (R, C, U, R, FORECAST, C)
    plan = Plan.from_trajectory(model, recording, schedule=schedule, rank=4)
    return optimize(model, plan), recording


@pytest.fixture(scope="module")
def hoisted(recorded: tuple[OptimizedModel, Recording]) -> ir.Model:
    fast, recording = recorded
    return sampler_model(fast.by_step().compiled, read_sampler(fast, recording))


def inside(graph: ir.Graph) -> Iterator[ir.Node]:
    """All nodes of a graph's loops and branches."""
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH:
                yield from attribute.as_graph()
                yield from inside(attribute.as_graph())


def reaches(value: ir.Value | None, name: str) -> bool:
    """Whether a value is computed from an input of the model."""
    if value is None:
        return False
    node = value.producer()
    return value.name == name or (node is not None and any(reaches(v, name) for v in node.inputs))


@pytest.mark.slow
def test_text_projection_runs_once_in_front_of_the_loop(hoisted: ir.Model) -> None:
    ahead = [node for node in hoisted.graph if reaches(node.outputs[0], "text")]
    ahead = [node for node in ahead if node.op_type in ("MatMul", "Gemm")]
    # project and keys, once each: REFRESH and CALIBRATE both held them.
    assert len(ahead) == 2
    readers = {
        node.op_type
        for node in inside(hoisted.graph)
        for v in node.inputs
        if v is not None and v.name == "text"
    }
    assert not readers


@pytest.mark.slow
def test_no_node_stays_that_could_move(hoisted: ir.Model) -> None:
    assert HoistInvariants()(hoisted).modified is False


@pytest.mark.slow
def test_run_is_the_one_of_the_eager_variants(
    recorded: tuple[OptimizedModel, Recording], hoisted: ir.Model
) -> None:
    fast, _ = recorded
    session = ort.InferenceSession(ir.to_proto(hoisted).SerializeToString())
    for seed in (1, 2):
        noise, text = draw(seed)
        got = session.run(["latents"], {"noise": noise.numpy(), "text": text.numpy()})[0]
        # float32 over six steps; a value that should not have moved would be off by per cents.
        np.testing.assert_allclose(got, euler(fast, noise, text).numpy(), rtol=1e-4, atol=1e-5)


def test_model_without_loops_is_left_alone() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    node = ir.node("Relu", [x])
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20})
    assert HoistInvariants()(ir.Model(graph, ir_version=10)).modified is False
    assert list(graph) == [node]


def test_result_of_a_body_stays_in_it() -> None:
    """A branch has to compute its results, even from values of outside alone."""

    def value(name: str, dtype: ir.DataType, shape: list[int]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    x = value("x", ir.DataType.FLOAT, [2])
    place = value("place", ir.DataType.INT64, [])
    going, state = value("going", ir.DataType.BOOL, []), value("state", ir.DataType.FLOAT, [2])
    keep = ir.node("Identity", [going])
    half, result = ir.node("Relu", [x]), ir.node("Neg", [x])
    used = ir.node("Add", [half.outputs[0], state])
    body = ir.Graph(
        [place, going, state],
        [keep.outputs[0], result.outputs[0]],
        nodes=[keep, half, used, result],
    )
    count = ir.Value(name="count", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    loop = ir.node("Loop", [count, None, x], {"body": body})
    graph = ir.Graph([x, count], loop.outputs, nodes=[loop], opset_imports={"": 20})
    assert HoistInvariants()(ir.Model(graph, ir_version=10)).modified is True
    assert [node.op_type for node in graph] == ["Relu", "Loop"]
    assert [node.op_type for node in body] == ["Identity", "Add", "Neg"]
