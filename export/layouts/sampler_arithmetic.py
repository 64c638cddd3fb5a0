"""Graphs of a sampler's loops under construction, and what it computes between two calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir import tensor_adapters

from calicache.export.layouts.onnx_graph import InitializerPool, describe, own_outputs
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.sampler.tables import SamplerTables

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
TERMS = ("of_x", "of_e", "of_x_before", "of_e_before")


@dataclass(slots=True)
class Body:
    """A graph under construction; new values are described at once."""

    prefix: str
    nodes: list[ir.Node] = field(default_factory=list)

    def add(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        dtype: ir.DataType | None,
        shape: Sequence[int] | None,
        **attributes: int | ir.TensorProtocol,
    ) -> ir.Value:
        """Add a node; returns its output."""
        node = ir.node(op, inputs, attributes, name=f"{self.prefix}/{name}")
        describe(node, f"{self.prefix}/{name}", dtype, None if shape is None else ir.Shape(shape))
        self.nodes.append(node)
        return node.outputs[0]

    def like(self, op: str, value: ir.Value, other: ir.Value, name: str) -> ir.Value:
        """An elementwise op with the type and shape of its first input."""
        assert value.shape is not None
        return self.add(op, [value, other], name, value.dtype, value.shape.numpy())

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """An input of the graph."""
        return ir.Value(
            name=f"{self.prefix}/{name}", type=ir.TensorType(dtype), shape=ir.Shape(shape)
        )


@dataclass(frozen=True, slots=True)
class Counter:
    """Inputs that every body of a Loop has beside its own.

    Attributes:
        place: how many rounds were before.
        going: the condition, always true.
    """

    place: ir.Value
    going: ir.Value


def loop_counter(body: Body) -> Counter:
    """The first two inputs of a body."""
    return Counter(body.input("place", INT64, ()), body.input("going", ir.DataType.BOOL, ()))


def close_loop(
    body: Body, counter: Counter, inputs: Sequence[ir.Value], results: Sequence[ir.Value]
) -> ir.Graph:
    """The finished body of a Loop; results are the inputs of the next round."""
    going_on = body.add("Identity", [counter.going], "going_on", ir.DataType.BOOL, ())
    own = own_outputs([going_on, *results], body.nodes, body.prefix)
    arguments = [counter.place, counter.going, *inputs]
    return ir.Graph(arguments, own, nodes=body.nodes, name=body.prefix)


def add_loop(
    pool: InitializerPool, body: Body, count: ir.Value, carried: Sequence[ir.Value], graph: ir.Graph
) -> list[ir.Value]:
    """Run a graph `count` times; returns the carried values after it."""
    always = pool.shared(ir.tensor(np.array(True)), "always")
    node = ir.node(
        "Loop",
        [count, always, *carried],
        {"body": graph},
        num_outputs=len(carried),
        name=f"{body.prefix}/loop",
    )
    for value, like in zip(node.outputs, graph.outputs[1:], strict=True):
        value.name = f"{like.name}_last"
        value.type, value.shape = like.type, like.shape
    body.nodes.append(node)
    return list(node.outputs)


@dataclass(frozen=True, slots=True)
class State:
    """What a step hands to the next: x, and for two-step solvers x and e before."""

    x: ir.Value
    before: tuple[ir.Value, ...] = ()

    def values(self) -> list[ir.Value]:
        """X, then what was before."""
        return [self.x, *self.before]


@dataclass(frozen=True, slots=True)
class SamplerArithmetic:
    """Nodes for the tables of a sampler."""

    sampler: SamplerTables
    pool: InitializerPool
    guidance: ir.Value | None

    def model_latent(self, body: Body, step: ir.Value, x: ir.Value, spec: TensorSpec) -> ir.Value:
        """scale_k x, once for every part of the batch, in the model's dtype."""
        if any(scale != 1.0 for scale in self.sampler.scales):
            x = body.like("Mul", x, self._coefficient(body, step, "scale"), "scaled")
        if self.sampler.parts > 1:
            copies = [x] * self.sampler.parts
            x = body.add("Concat", copies, "parts", FLOAT, spec.shape, axis=0)
        dtype = tensor_adapters.from_torch_dtype(spec.torch_dtype)
        if dtype != FLOAT:
            x = body.add("Cast", [x], "cast", dtype, spec.shape, to=dtype)
        return x

    def advance(self, body: Body, step: ir.Value, state: State, output: ir.Value) -> State:
        """a_k x_k + b_k e_k + c_k x_{k-1} + d_k e_{k-1}, in float32."""
        assert state.x.shape is not None
        e = self._guided(body, step, output, state.x.shape.numpy())
        total: ir.Value | None = None
        for name, term in zip(TERMS, [state.x, e, *state.before], strict=False):
            scaled = body.like("Mul", term, self._coefficient(body, step, name), f"{name}_term")
            total = scaled if total is None else body.like("Add", total, scaled, f"{name}_sum")
        assert total is not None
        return State(total, (state.x, e) if self.sampler.looks_back else ())

    def _guided(
        self, body: Body, step: ir.Value, output: ir.Value, shape: Sequence[int]
    ) -> ir.Value:
        """One output for every sample, with the channels that x has."""
        assert output.shape is not None
        rows, *rest = output.shape.numpy()
        if output.dtype != FLOAT:
            output = body.add("Cast", [output], "output", FLOAT, [rows, *rest], to=FLOAT)
        if rest != [*shape[1:]]:  # a learned variance is cut off
            output = self._own_channels(body, output, [rows, *shape[1:]])
        if self.sampler.parts == 1:
            return output
        parts = self._parts(body, output, shape)
        if self.sampler.conditional is not None and self.guidance is not None:
            c, u = parts[self.sampler.conditional], parts[1 - self.sampler.conditional]
            towards = body.like("Sub", c, u, "towards")
            moved = body.like("Mul", towards, self.guidance, "moved")
            return body.like("Add", u, moved, "guided")
        total: ir.Value | None = None
        for number, part in enumerate(parts):
            share = self._coefficient(body, step, f"share_{number}")
            scaled = body.like("Mul", part, share, f"share_{number}_term")
            total = scaled if total is None else body.like("Add", total, scaled, f"mix_{number}")
        assert total is not None
        return total

    def _own_channels(self, body: Body, output: ir.Value, shape: Sequence[int]) -> ir.Value:
        first, last, axis = [
            self.pool.shared(ir.tensor(np.array([k], np.int64)), f"channels_{k}")
            for k in (0, shape[1], 1)
        ]
        return body.add("Slice", [output, first, last, axis], "own_channels", FLOAT, shape)

    def _parts(self, body: Body, output: ir.Value, shape: Sequence[int]) -> list[ir.Value]:
        node = ir.node(
            "Split",
            [output],
            {"axis": 0, "num_outputs": self.sampler.parts},
            num_outputs=self.sampler.parts,
            name=f"{body.prefix}/split",
        )
        for number, value in enumerate(node.outputs):
            value.name, value.type = f"{body.prefix}/part_{number}", ir.TensorType(FLOAT)
            value.shape = ir.Shape(shape)
        body.nodes.append(node)
        return list(node.outputs)

    def _coefficient(self, body: Body, step: ir.Value, name: str) -> ir.Value:
        """One number of the sampler at a step."""
        columns = dict(zip(TERMS, zip(*self.sampler.updates, strict=True), strict=True))
        columns |= {f"share_{k}": c for k, c in enumerate(zip(*self.sampler.mix, strict=True))}
        columns["scale"] = self.sampler.scales
        table = self.pool.shared(ir.tensor(np.array(columns[name], np.float32)), f"{name}_by_step")
        return body.add("Gather", [table, step], name, FLOAT, ())
