"""Which nodes of a model a provider runs and which the host, and what is copied between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from calicache.tools.inspect.providers.tables import KernelTable, kernel_table, operator_name

CPU = "CPUExecutionProvider"
# These take whole graphs, whose sizes and conditions stay with them. An operator with bodies, such
# as If, is theirs where all of its bodies is.
WHOLE_GRAPHS = {
    "CoreMLExecutionProvider",
    "OpenVINOExecutionProvider",
    "QNNExecutionProvider",
    "TensorrtExecutionProvider",
}
# Of those, what `GetCapability` gives nothing for where the graph is a body: in
# coreml_execution_provider.cc without EnableOnSubgraphs, and in qnn_execution_provider.cc. What
# QNN makes of an If, both of its bodies and a choice, is no way to leave one out.
BODIES_ON_HOST = {"CoreMLExecutionProvider", "QNNExecutionProvider"}
# Inputs that kernels read from the host's memory, for they decide sizes and control flow:
# `InputMemoryType` in onnxruntime/core/providers/cuda, `requiredConstantCpuInputs` in those of dml.
_HOST_INPUTS: Mapping[str, tuple[int, ...]] = {
    "CumSum": (1,),
    "Expand": (1,),
    "If": (0,),
    "Loop": (0, 1),
    "OneHot": (1, 2),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Scan": (0,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
}
# As ONNX Runtime's tables call what onnx calls FLOAT and so on.
_TYPE_NAMES = {"FLOAT": "float", "DOUBLE": "double"}


@dataclass(frozen=True, slots=True)
class PlacedNode:
    """A node and the side that it runs on.

    Attributes:
        node: of the model, or of a body in it.
        place: the control flow that it lies in, outermost first.
        on_host: and not on the provider.
    """

    node: ir.Node
    place: tuple[str, ...]
    on_host: bool

    @property
    def operator(self) -> str:
        """Its name, with the domain where that is not ONNX's own."""
        return operator_name(self.node.domain, self.node.op_type)

    @property
    def types(self) -> tuple[str, ...]:
        """Of the inputs as the tables name them, '' for one that is left out."""
        return _input_types(self.node)


@dataclass(frozen=True, slots=True)
class Copy:
    """A value that goes from one side to the other.

    Attributes:
        model: the file.
        value: its name; `elements` how many numbers it has, None where that is not known.
        to: `host` or the provider.
        place: the control flow that it lies in, outermost first; empty where it is copied once.
    """

    model: str
    value: str
    elements: int | None
    to: str
    place: tuple[str, ...]


def place_nodes(graph: ir.Graph, provider: str) -> list[PlacedNode]:
    """All nodes, those in bodies too, each with its side."""
    return [*_placed(graph, provider, kernel_table(provider), ())]


def _placed(
    graph: ir.Graph, provider: str, table: KernelTable, place: tuple[str, ...]
) -> Iterator[PlacedNode]:
    for node in graph:
        bodies = body_graphs(node)
        inside = [
            entry
            for body in bodies
            for entry in _placed(body, provider, table, (*place, node.op_type))
        ]
        name = operator_name(node.domain, node.op_type)
        on_host = not table.takes(name, _input_types(node))
        if provider in BODIES_ON_HOST:
            on_host = on_host or bool(place or bodies)
        elif provider in WHOLE_GRAPHS:
            on_host = on_host or any(entry.on_host for entry in inside)
        yield PlacedNode(node, place, on_host and node.op_type != "Constant")
        yield from inside


def body_graphs(node: ir.Node) -> list[ir.Graph]:
    """Of an If, a Loop or a Scan."""
    attributes = node.attributes.values()
    return [of.as_graph() for of in attributes if of.type is ir.AttributeType.GRAPH]


def find_copies(model: str, placed: list[PlacedNode], provider: str) -> Iterator[Copy]:
    """Values that a node of the one side makes and the other side reads, once for a side."""
    if provider == CPU:
        return
    makers = {output: entry for entry in placed for output in entry.node.outputs}
    seen = set()
    for value, on_host, place in _reads(placed, provider):
        maker = makers.get(value)
        to = "host" if on_host else provider
        if maker is not None and maker.on_host != on_host and (value, to) not in seen:
            seen.add((value, to))
            yield Copy(model, str(value.name), _elements(value), to, place)


def _reads(
    placed: list[PlacedNode], provider: str
) -> Iterator[tuple[ir.Value, bool, tuple[str, ...]]]:
    """Values that are read, whether on the host, and in which control flow."""
    for entry in placed:
        node = entry.node
        read_on_host = () if provider in WHOLE_GRAPHS else _HOST_INPUTS.get(entry.operator, ())
        for index, value in enumerate(node.inputs):
            if value is not None:
                yield value, entry.on_host or index in read_on_host, entry.place
        # An operator on the host hands on what its bodies make.
        for body in body_graphs(node) if entry.on_host else ():
            yield from ((value, True, (*entry.place, node.op_type)) for value in body.outputs)


def _input_types(node: ir.Node) -> tuple[str, ...]:
    dtypes = (None if value is None else value.dtype for value in node.inputs)
    return tuple("" if of is None else _TYPE_NAMES.get(of.name, of.name.lower()) for of in dtypes)


def _elements(value: ir.Value) -> int | None:
    if value.shape is None or not value.shape.is_static():
        return None
    product = 1
    for length in value.shape.numpy():
        product *= length
    return product
