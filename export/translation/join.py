"""Templates joined as the operations of a graph are: one ONNX model."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from onnx_ir import convenience, tensor_adapters
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass
from torch import Tensor, fx

from calicache.export.translation.forms import Form
from calicache.graph_passes.graph.surgery import graph_outputs, read_attribute

IR_VERSION, OPSET = 10, 20  # of a graph without operations


def join_templates(
    module: fx.GraphModule, forms: Mapping[fx.Node, Form], templates: Mapping[str, ir.Model]
) -> ir.Model:
    """A graph in ONNX: its placeholders are inputs, its tensors initializers.

    Args:
        module: in forms that have templates; a complex input is taken as pairs of real values.
        forms: of its operations.
        templates: by text of the form.
    """
    joined = _Joined()
    values: dict[fx.Node, ir.Value] = {}
    inputs: list[ir.Value] = []
    items: dict[fx.Node, dict[int, ir.Value]] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            values[node] = argument(node.name, value.shape, value.dtype)
            inputs.append(values[node])
        elif node.op == "get_attr":
            tensor = read_attribute(module, str(node.target))
            if isinstance(tensor, Tensor):
                values[node] = joined.constant(str(node.target), tensor)
        elif node in forms:
            form = forms[node]
            sources = [values[source] for source in form.tensors]
            results = joined.operation(node.name, templates[form.text], sources)
            if form.items:
                items[node] = dict(zip(form.items, results, strict=True))
            else:
                (values[node],) = results
        elif node.target is operator.getitem:
            source, item = node.args
            values[node] = items[source][item]
    outputs = [values[node] for node in graph_outputs(module.graph) if isinstance(node, fx.Node)]
    return joined.model(inputs, outputs)


def argument(name: str, shape: Sequence[int | str], dtype: torch.dtype) -> ir.Value:
    """An input of a graph; a complex one is taken as pairs of real values."""
    if dtype.is_complex:
        shape, dtype = (*shape, 2), dtype.to_real()
    onnx_type = ir.TensorType(tensor_adapters.from_torch_dtype(dtype))
    return ir.Value(name=name, type=onnx_type, shape=ir.Shape(shape))


def initializer(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A value that a graph has from the start."""
    return ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )


@dataclass(slots=True)
class _Joined:
    """A model on its way.

    Attributes:
        nodes: in order.
        initializers: by id of the tensor that they hold: a weight, or a number of templates.
        opsets: versions by domain.
        ir_version: of the file format.
    """

    nodes: list[ir.Node] = field(default_factory=list)
    initializers: dict[int, ir.Value] = field(default_factory=dict)
    opsets: dict[str, int] = field(default_factory=lambda: {"": OPSET})
    ir_version: int = IR_VERSION

    def constant(self, name: str, tensor: Tensor | ir.TensorProtocol) -> ir.Value:
        """The initializer of a weight, or of a number that the copies of a template share."""
        if id(tensor) not in self.initializers:
            own = _in_onnx(name, tensor) if isinstance(tensor, Tensor) else tensor
            self.initializers[id(tensor)] = initializer(name, own)
        return self.initializers[id(tensor)]

    def operation(
        self, name: str, template: ir.Model, sources: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """The results of a template that is given these sources."""
        graph = template.graph.clone()
        for value, source in zip(graph.inputs, sources, strict=True):
            convenience.replace_all_uses_with(value, source, replace_graph_outputs=True)
        for place, value in enumerate(list(graph.initializers.values())):
            assert value.const_value is not None
            own = self.constant(f"{name}/number_{place}", value.const_value)
            convenience.replace_all_uses_with(value, own, replace_graph_outputs=True)
        _name_inside(graph, name)
        results = list(graph.outputs)
        graph.outputs.clear()
        nodes = list(graph)
        graph.remove(nodes)
        for place, value in enumerate(results):
            if value.producer() is not None and value not in sources:
                value.name = name if len(results) == 1 else f"{name}/result_{place}"
        self.nodes += nodes
        self.opsets |= template.graph.opset_imports
        self.ir_version = max(self.ir_version, template.ir_version)
        return results

    def model(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
        """The finished model."""
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=self.opsets,
            name="graph",
        )
        model = ir.Model(graph, ir_version=self.ir_version)
        IdentityEliminationPass()(model)
        RemoveUnusedNodesPass()(model)
        return model


def _in_onnx(name: str, tensor: Tensor) -> ir.TensorProtocol:
    """A tensor of torch's; a complex one as pairs of real values."""
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor_adapters.TorchTensor(real.detach().contiguous(), name)


def _name_inside(graph: ir.Graph, name: str) -> None:
    """Names that no other copy of a template has, in graphs inside it too."""
    for place, node in enumerate(ir.traversal.RecursiveGraphIterator(graph)):
        node.name = f"{name}/{node.op_type}_{place}"
        for number, value in enumerate(node.outputs):
            value.name = f"{node.name}/{number}"
    for place, inner in enumerate(graph.subgraphs()):
        for value in inner.inputs:
            value.name = f"{name}/graph_{place}/{value.name}"
