"""Step variants to one ONNX model: the `step` layout.

Every variant is translated by torch's own exporter; here they become the branches of an
`If` that a schedule table in the graph picks. Weights are initializers of the outer graph,
found equal by content and stored once.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import convenience, tensor_adapters
from torch import Tensor, fx

from calicache.graph_passes.capture import device_of, shape_of
from calicache.graph_passes.errors import ExportError, reason_of
from calicache.graph_passes.rewrite import CacheSpec, Rewritten, Variant
from calicache.graph_passes.runtime import OptimizedModel
from calicache.graph_passes.schedule import StepMode

STEP_INPUT = "step"
_LOOK_UP_NAMES = ("mode", *(f"is_{mode.name.lower()}" for mode in StepMode))


def output_names(optimized: OptimizedModel) -> tuple[str, ...]:
    """Names of the model's own outputs in the ONNX graph: `output`, or `output_0` ..."""
    count = optimized.rewritten.outputs
    return ("output",) if count == 1 else tuple(f"output_{k}" for k in range(count))


def next_name(cache: str) -> str:
    """Name of the graph output that carries a cache's new value."""
    return f"{cache}_next"


def step_model(optimized: OptimizedModel) -> ir.Model:
    """Pack the variants in the `step` layout.

    The model's inputs, `step` (int64 scalar) and the kept refreshes of every cache go in; the
    model's outputs and the caches' new values come out.
    On a step that is not REFRESH the new values have zero size: the caller keeps the old ones.
    Refreshes that a step's mode does not read may have zero size, see `Manifest.reads`.

    Raises:
        ExportError: torch's exporter refuses a variant; its reason is passed on.
    """
    rewritten, specs = optimized.rewritten, optimized.plan.settings.signature.tensors
    arguments = [_argument(spec.name, spec.shape, spec.torch_dtype) for spec in specs]
    step = _argument(STEP_INPUT, (), torch.int64)
    slots = {
        name: _argument(name, (f"{name}_size", *cache.shape[1:]), cache.dtype)
        for name, (cache, _) in rewritten.slots().items()
    }
    results = [*output_names(optimized), *(next_name(cache.name) for cache in rewritten.caches)]
    added = {STEP_INPUT, *slots, *results}
    for spec in specs:
        if spec.name in added:
            raise ExportError(
                f"input {spec.name}",
                expected="a name that the layout does not use",
                got="the name of " + ("the step" if spec.name == STEP_INPUT else "another value"),
                fix="Rename the argument of the model's forward.",
            )
    taken = {*added, *(spec.name for spec in specs), *_LOOK_UP_NAMES, *rewritten.tables}
    pool = _InitializerPool(taken)
    weights = _weights(rewritten, step, pool)
    values = {**slots, **dict(zip(rewritten.tables, (n.outputs[0] for n in weights), strict=True))}
    branches: dict[StepMode, ir.Graph] = {}
    for mode in sorted(rewritten.variants):
        model = export_variant(rewritten.variants[mode])
        reads = [values[name] for name in rewritten.variants[mode].reads]
        branches[mode] = _branch(model, mode, [*arguments, *reads], pool, rewritten.caches)
    body = _choose(branches, step, optimized.plan.schedule, pool)
    outputs = list(body.outputs)
    for value, name in zip(outputs, results, strict=True):
        value.name = name
    graph = ir.Graph(
        [*arguments, step, *slots.values()],
        outputs,
        nodes=[*weights, *_take_nodes(body)],
        initializers=list(pool.values.values()),
        opset_imports=dict(model.opset_imports),
        name="calicache_step",
    )
    return ir.Model(graph, ir_version=model.ir_version, producer_name="calicache")


def export_variant(variant: Variant) -> ir.Model:
    """One variant, translated by torch.onnx.

    Raises:
        ExportError: with the exporter's reason.
    """
    placeholders = [node for node in variant.module.graph.nodes if node.op == "placeholder"]
    examples = tuple(_example(node, variant.module) for node in placeholders)
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                variant.module.eval(), examples, dynamo=True, optimize=True, verbose=False
            )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter wraps the op's own error
            cause = cause.__cause__
        raise ExportError(
            f"variant {variant.mode.name}",
            expected="a graph that torch.onnx translates",
            got=reason_of(cause),
            fix="See the chained error; an op of the model has no ONNX form.",
        ) from error
    assert program is not None
    return program.model


def _weights(rewritten: Rewritten, step: ir.Value, pool: _InitializerPool) -> list[ir.Node]:
    """Look this step's weights up, each in its own table."""
    look_ups = []
    for name, table in rewritten.tables.items():
        values = pool.shared(ir.tensor(np.array(table, dtype=np.float32)), f"{name}_table")
        look_up = ir.node("Gather", [values, step], name=name)
        _describe(look_up, name, ir.DataType.FLOAT, ir.Shape(()))
        look_ups.append(look_up)
    return look_ups


class _InitializerPool:
    """Outer initializers, one per content, so that variants share their weights."""

    def __init__(self, taken: set[str]) -> None:
        self.values: dict[bytes, ir.Value] = {}
        self._names = taken

    def shared(self, tensor: ir.TensorProtocol, hint: str) -> ir.Value:
        """The initializer that holds these values, made at the first request."""
        digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape};".encode())
        digest.update(tensor.tobytes())
        key = digest.digest()
        if key not in self.values:
            name, number = hint, 0
            while name in self._names:
                name, number = f"{hint}.{number}", number + 1
            self._names.add(name)
            self.values[key] = ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(tensor.shape.numpy()),
                const_value=tensor,
            )
        return self.values[key]


def _branch(
    model: ir.Model,
    mode: StepMode,
    inputs: Sequence[ir.Value],
    pool: _InitializerPool,
    caches: Sequence[CacheSpec],
) -> ir.Graph:
    """A variant as the body of an `If`: inputs and weights come from the outer graph."""
    graph, prefix = model.graph, mode.name.lower()
    for inner, outer in zip(graph.inputs, inputs, strict=True):
        convenience.replace_all_uses_with(inner, outer, replace_graph_outputs=True)
    for name, value in list(graph.initializers.items()):
        assert value.const_value is not None
        outer = pool.shared(value.const_value, name)
        convenience.replace_all_uses_with(value, outer, replace_graph_outputs=True)
    results = list(graph.outputs)
    nodes = _take_nodes(graph)
    for place, node in enumerate(nodes):
        node.name = f"{prefix}/{node.op_type}_{place}"
        for value in node.outputs:
            value.name = f"{prefix}/{value.name}"
    if mode is not StepMode.REFRESH:
        empties = [_empty_cache(cache, prefix) for cache in caches]
        nodes += empties
        results += [node.outputs[0] for node in empties]
    return ir.Graph([], _own_outputs(results, nodes, prefix), nodes=nodes, name=prefix)


def _take_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Take all nodes out of a graph, so that another can own them."""
    nodes = list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    return nodes


def _own_outputs(results: Sequence[ir.Value], nodes: list[ir.Node], prefix: str) -> list[ir.Value]:
    """Outputs that the branch itself computes, each once; copies where it only passes on."""
    made = {id(value) for node in nodes for value in node.outputs}
    own: list[ir.Value] = []
    for place, value in enumerate(results):
        if id(value) in made:
            made.discard(id(value))
            own.append(value)
            continue
        copy = ir.node("Identity", [value], name=f"{prefix}/Identity_out_{place}")
        _describe(copy, f"{prefix}/out_{place}", value.dtype, value.shape)
        nodes.append(copy)
        own.append(copy.outputs[0])
    return own


def _empty_cache(cache: CacheSpec, prefix: str) -> ir.Node:
    shape = (0, *cache.shape[1:])
    dtype = tensor_adapters.from_torch_dtype(cache.dtype)
    tensor = ir.tensor(np.zeros(shape, dtype.numpy()), dtype=dtype)
    name = f"{prefix}/{cache.name}_empty"
    node = ir.node("Constant", [], {"value": tensor}, name=name)
    _describe(node, name, dtype, ir.Shape(shape))
    return node


def _choose(
    branches: dict[StepMode, ir.Graph],
    step: ir.Value,
    schedule: Sequence[StepMode],
    pool: _InitializerPool,
) -> ir.Graph:
    """A graph that looks the mode of a step up and runs its branch."""
    *others, last = branches
    body = branches[last]
    if not others:
        return body
    table = pool.shared(ir.tensor(np.array(schedule, dtype=np.int64)), "schedule")
    look_up = ir.node("Gather", [table, step], name="mode")
    _describe(look_up, "mode", ir.DataType.INT64, ir.Shape(()))
    for mode in reversed(others):
        body = _if_graph(mode, look_up.outputs[0], branches[mode], body, pool)
    body.insert_before(body[0], look_up)
    return body


def _if_graph(
    mode: StepMode, current: ir.Value, then: ir.Graph, other: ir.Graph, pool: _InitializerPool
) -> ir.Graph:
    """`then` where the current mode is `mode`, else `other`."""
    name = mode.name.lower()
    number = pool.shared(ir.tensor(np.array(mode, dtype=np.int64)), f"mode_{name}")
    is_mode = ir.node("Equal", [current, number], name=f"is_{name}")
    _describe(is_mode, f"is_{name}", ir.DataType.BOOL, ir.Shape(()))
    choose = ir.node(
        "If",
        [is_mode.outputs[0]],
        {"then_branch": then, "else_branch": other},
        num_outputs=len(then.outputs),
        name=f"choose_{name}",
    )
    for place, (value, one, two) in enumerate(
        zip(choose.outputs, then.outputs, other.outputs, strict=True)
    ):
        value.name, value.type = f"choose_{name}/out_{place}", one.type
        value.shape = one.shape if one.shape == two.shape else _open_first(one.shape)
    return ir.Graph([], choose.outputs, nodes=[is_mode, choose], name=f"choose_{name}")


def _open_first(shape: ir.Shape | None) -> ir.Shape | None:
    """The shape with its first size unknown: full on REFRESH, zero otherwise."""
    return None if shape is None else ir.Shape([None, *shape.dims[1:]])


def _describe(node: ir.Node, name: str, dtype: ir.DataType | None, shape: ir.Shape | None) -> None:
    value = node.outputs[0]
    value.name, value.shape = name, shape
    value.type = None if dtype is None else ir.TensorType(dtype)


def _argument(name: str, shape: Sequence[int | str], dtype: torch.dtype) -> ir.Value:
    onnx_type = ir.TensorType(tensor_adapters.from_torch_dtype(dtype))
    return ir.Value(name=name, type=onnx_type, shape=ir.Shape(shape))


def _example(node: fx.Node, module: fx.GraphModule) -> Tensor:
    return torch.zeros(shape_of(node), dtype=node.meta["val"].dtype, device=device_of(module))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
