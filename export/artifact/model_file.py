"""What an ONNX file takes, gives and refers to, read without its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from calicache.graph_passes.common.errors import reason_of

Form = tuple[str, tuple[int | None, ...] | None]
"""A dtype as torch and NumPy name it, and a shape; None where a size, or all of it, is open."""


@dataclass(frozen=True, slots=True)
class ModelInterface:
    """What a model takes, gives and refers to.

    Attributes:
        inputs, outputs: by name.
        external: names of the files with its weights.
        branches: names of the inner graphs.
    """

    inputs: Mapping[str, Form]
    outputs: Mapping[str, Form]
    external: frozenset[str]
    branches: frozenset[str]


def read_interface(file: Path) -> ModelInterface:
    """What the model of a file takes, gives and refers to.

    Raises:
        ValueError: it is no ONNX model.
    """
    try:
        model = onnx.load(file, load_external_data=False)
        inner = [*_subgraphs((*model.graph.node, *(n for f in model.functions for n in f.node)))]
        return ModelInterface(
            _forms(model.graph.input),
            _forms(model.graph.output),
            frozenset(_locations((model.graph, *inner), model.functions)),
            frozenset(graph.name for graph in inner),
        )
    except Exception as error:  # the parser's errors have no common base
        raise ValueError(f"{file.name} is no ONNX model: {reason_of(error)}") from error


def _forms(values: Iterable[onnx.ValueInfoProto]) -> dict[str, Form]:
    return {value.name: _form(value.type.tensor_type) for value in values}


def _form(kind: onnx.TypeProto.Tensor) -> Form:
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    if not kind.HasField("shape"):
        return dtype, None
    sizes = (d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
    return dtype, tuple(sizes)


def _subgraphs(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """The graphs in attributes of nodes, and those inside them."""
    waiting = [*nodes]
    while waiting:
        for attribute in waiting.pop().attribute:
            inside = [attribute.g] if attribute.HasField("g") else []
            for graph in (*inside, *attribute.graphs):
                yield graph
                waiting.extend(graph.node)


def _locations(
    graphs: Iterable[onnx.GraphProto], functions: Iterable[onnx.FunctionProto]
) -> Iterator[str]:
    """Places of the weights that lie outside."""
    nodes = [node for function in functions for node in function.node]
    for graph in graphs:
        nodes.extend(graph.node)
        yield from _outside(graph.initializer)
        yield from _outside(_parts(graph.sparse_initializer))
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from _outside((attribute.t, *attribute.tensors))
        yield from _outside(_parts((attribute.sparse_tensor, *attribute.sparse_tensors)))


def _parts(sparse: Iterable[onnx.SparseTensorProto]) -> Iterator[onnx.TensorProto]:
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def _outside(tensors: Iterable[onnx.TensorProto]) -> Iterator[str]:
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield from (entry.value for entry in tensor.external_data if entry.key == "location")
