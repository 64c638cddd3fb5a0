"""What all layouts are built from: variants translated by torch, joined with onnx-ir.

Weights become initializers of the outermost graph; those of equal content are stored once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from torch import fx

from calicache.export.artifact.weights import SMALL, fingerprint, same_content
from calicache.export.translation.join import initializer
from calicache.graph_passes.common.errors import ExportError
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.surgery import graph_outputs
from calicache.graph_passes.recording.signature import CallSignature
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.settings.choices import StepMode

CONTRIB_VERSION = 1  # of com.microsoft, which not every variant uses
LOOK_UP_NAMES = ("mode", *(f"is_{mode.name.lower()}" for mode in StepMode))


def output_names(captured: CapturedGraph) -> tuple[str, ...]:
    """Names of the model's own outputs in the ONNX graph: `output`, or `output_0` ...

    An output that is None has no name.
    """
    count = sum(isinstance(v, fx.Node) for v in graph_outputs(captured.graph))
    return ("output",) if count == 1 else tuple(f"output_{k}" for k in range(count))


def check_names(signature: CallSignature, added: Mapping[str, str]) -> None:
    """No argument of the model has a name that the layout adds.

    Args:
        signature: of the model's calls.
        added: new names, and what each is.

    Raises:
        ExportError: one has.
    """
    for spec in signature.tensors:
        if spec.name in added:
            raise ExportError(
                f"input {spec.name}",
                expected="a name that the layout does not use",
                got=f"the name of {added[spec.name]}",
                fix="Rename the argument of the model's forward.",
            )


def weight_nodes(
    variant_set: VariantSet,
    step: ir.Value,
    pool: InitializerPool,
    names: Collection[str] | None = None,
) -> list[ir.Node]:
    """Look this step's weights up, each in its own table; all of them, or those named."""
    look_ups = []
    for name in variant_set.tables if names is None else names:
        table = np.array(variant_set.tables[name], dtype=np.float32)
        values = pool.shared(ir.tensor(table), f"{name}_table")
        look_up = ir.node("Gather", [values, step], name=name)
        describe(look_up, name, ir.DataType.FLOAT, ir.Shape(()))
        look_ups.append(look_up)
    return look_ups


class ContentNames:
    """Names of tensors by their content; pools of several models may share them."""

    def __init__(self) -> None:
        self._known: dict[bytes, list[tuple[ir.TensorProtocol, str]]] = {}
        self._used: set[str] = set()

    def name(self, tensor: ir.TensorProtocol, hint: str, reserved: Collection[str]) -> str:
        """The name of an equal tensor; else a new one, the hint where that is free."""
        alike = self._known.setdefault(fingerprint(tensor), [])
        for other, name in alike:
            if tensor is other or same_content(tensor, other):
                return name
        name, number = hint, 0
        while name in reserved or name in self._used:
            name, number = f"{hint}.{number}", number + 1
        self._used.add(name)
        alike.append((tensor, name))
        return name


class InitializerPool:
    """Outer initializers, one per content, so that variants share their weights.

    Args:
        reserved: names that no initializer may get.
        names: shared by the pools of several models.
    """

    def __init__(self, reserved: set[str], names: ContentNames | None = None) -> None:
        self.values: dict[str, ir.Value] = {}
        self._reserved = reserved
        self._names = names or ContentNames()

    def shared(self, tensor: ir.TensorProtocol, hint: str) -> ir.Value:
        """The initializer that holds these values, made at the first request."""
        name = self._names.name(tensor, hint, self._reserved)
        if name not in self.values:
            self.values[name] = initializer(name, tensor)
        return self.values[name]


def pack(
    name: str,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    nodes: Sequence[ir.Node],
    pool: InitializerPool,
    like: ir.Model,
) -> ir.Model:
    """The finished model of a layout, with the opsets of torch's exports."""
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=nodes,
        initializers=list(pool.values.values()),
        opset_imports=dict(like.opset_imports),
        name=f"calicache_{name}",
    )
    for node in ir.traversal.RecursiveGraphIterator(graph):
        graph.opset_imports.setdefault(node.domain, CONTRIB_VERSION)
    return ir.Model(graph, ir_version=like.ir_version, producer_name="calicache")


def settle_constants(model: ir.Model) -> None:
    """Give every inner graph its own copies of the small constants that it uses, in place.

    Shape inference does not see the numbers of a graph further out.
    """
    RemoveUnusedNodesPass()(model)
    outer = model.graph.initializers
    own: dict[tuple[ir.Graph, str], ir.Value] = {}
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        graph = node.graph
        if graph is model.graph:
            continue
        assert isinstance(graph, ir.Graph)
        for place, value in enumerate(node.inputs):
            if value is None or outer.get(str(value.name)) is not value:
                continue
            tensor = value.const_value
            if tensor is None or tensor.nbytes > SMALL:
                continue
            key = graph, str(value.name)
            if key not in own:
                own[key] = initializer(f"{graph.name}/own/{value.name}", tensor)
                graph.register_initializer(own[key])
            node.replace_input_with(place, own[key])
    RemoveUnusedNodesPass()(model)


def inline(
    model: ir.Model, prefix: str, inputs: Sequence[ir.Value], pool: InitializerPool
) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes and results of a variant inside another graph.

    Args:
        model: the variant; it is taken apart.
        prefix: of the new names.
        inputs: values of the surrounding graph that take the place of its inputs.
        pool: the outer graph's initializers.
    """
    graph = model.graph
    for inner, outer in zip(graph.inputs, inputs, strict=True):
        convenience.replace_all_uses_with(inner, outer, replace_graph_outputs=True)
    for name, value in list(graph.initializers.items()):
        assert value.const_value is not None
        outer = pool.shared(value.const_value, name)
        convenience.replace_all_uses_with(value, outer, replace_graph_outputs=True)
    # Some checkpoints hold the same embedder once a block (DiT in diffusers).
    CommonSubexpressionEliminationPass()(model)
    results = list(graph.outputs)
    nodes = take_nodes(graph)
    for place, node in enumerate(nodes):
        node.name = f"{prefix}/{node.op_type}_{place}"
        for value in node.outputs:
            value.name = f"{prefix}/{value.name}"
    return nodes, results


def take_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Take all nodes out of a graph, so that another can own them."""
    nodes = list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    return nodes


def own_outputs(results: Sequence[ir.Value], nodes: list[ir.Node], prefix: str) -> list[ir.Value]:
    """Outputs that the branch itself computes, each once; copies where it only passes on."""
    unused = {id(value) for node in nodes for value in node.outputs}
    own: list[ir.Value] = []
    for place, value in enumerate(results):
        if id(value) in unused:
            unused.discard(id(value))
            own.append(value)
            continue
        copy = ir.node("Identity", [value], name=f"{prefix}/Identity_out_{place}")
        describe(copy, f"{prefix}/out_{place}", value.dtype, value.shape)
        nodes.append(copy)
        own.append(copy.outputs[0])
    return own


def choose_by_mode(
    branches: Mapping[StepMode, ir.Graph],
    step: ir.Value,
    schedule: Sequence[StepMode],
    pool: InitializerPool,
) -> ir.Graph:
    """A graph that looks the mode of a step up and runs its branch."""
    *others, last = branches
    body = branches[last]
    if not others:
        return body
    table = pool.shared(ir.tensor(np.array(schedule, dtype=np.int64)), "schedule")
    look_up = ir.node("Gather", [table, step], name="mode")
    describe(look_up, "mode", ir.DataType.INT64, ir.Shape(()))
    for mode in reversed(others):
        body = _if_graph(mode, look_up.outputs[0], branches[mode], body, pool)
    body.insert_before(body[0], look_up)
    return body


def _if_graph(
    mode: StepMode, current: ir.Value, then: ir.Graph, other: ir.Graph, pool: InitializerPool
) -> ir.Graph:
    """`then` where the current mode is `mode`, else `other`."""
    name = mode.name.lower()
    number = pool.shared(ir.tensor(np.array(mode, dtype=np.int64)), f"mode_{name}")
    is_mode = ir.node("Equal", [current, number], name=f"is_{name}")
    describe(is_mode, f"is_{name}", ir.DataType.BOOL, ir.Shape(()))
    choose = ir.node(
        "If",
        [is_mode.outputs[0]],
        {"then_branch": then, "else_branch": other},
        num_outputs=len(then.outputs),
        name=f"choose_{name}",
    )
    for place, (value, one) in enumerate(zip(choose.outputs, then.outputs, strict=True)):
        value.name, value.type = f"choose_{name}/out_{place}", one.type
        value.shape = one.shape
    return ir.Graph([], choose.outputs, nodes=[is_mode, choose], name=f"choose_{name}")


def describe(node: ir.Node, name: str, dtype: ir.DataType | None, shape: ir.Shape | None) -> None:
    """Name, type and shape of a node's first output."""
    value = node.outputs[0]
    value.name, value.shape = name, shape
    value.type = None if dtype is None else ir.TensorType(dtype)
