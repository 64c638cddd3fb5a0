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
    """

    inputs: Mapping[str, Form]
    outputs: Mapping[str, Form]
    external: frozenset[str]


def read_interface(file: Path) -> ModelInterface:
    """What the model of a file takes, gives and refers to.

    Raises:
        ValueError: it is no ONNX model.
    """
    try:
        model = onnx.load(file, load_external_data=False)
        return ModelInterface(
            _forms(model.graph.input), _forms(model.graph.output), frozenset(_locations(model))
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


def _locations(model: onnx.ModelProto) -> Iterator[str]:
    """Places of the weights that lie outside, in graphs, their subgraphs and functions."""
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            nodes.extend(graph.node)
            yield from _outside(graph.initializer)
            for sparse in graph.sparse_initializer:
                yield from _outside((sparse.values, sparse.indices))
            continue
        for attribute in nodes.pop().attribute:
            graphs.extend([*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])])
            sparse_tensors = [attribute.sparse_tensor, *attribute.sparse_tensors]
            parts = [part for sparse in sparse_tensors for part in (sparse.values, sparse.indices)]
            yield from _outside((attribute.t, *attribute.tensors, *parts))


def _outside(tensors: Iterable[onnx.TensorProto]) -> Iterator[str]:
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield from (entry.value for entry in tensor.external_data if entry.key == "location")
