"""Invariants of the graph, run between stages: what holds here, every later stage relies on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator

from calicache.graph_passes.capture import CapturedGraph, graph_outputs, shape_of
from calicache.graph_passes.errors import VerifyError
from calicache.graph_passes.rewrite import Rewritten, Variant
from calicache.graph_passes.schedule import StepMode


def verify_captured(captured: CapturedGraph) -> CapturedGraph:
    """Check a captured graph and hand it on.

    Raises:
        VerifyError: an op changes its input, a node is not a pure function, a value has no
            shape, or the placeholders are not the signature's tensors.
    """
    verify_functional(captured.graph)
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
    specs = captured.signature.tensors
    shapes = [shape_of(node) for node in placeholders]
    if shapes != [spec.shape for spec in specs]:
        raise _broken("placeholders", str([spec.shape for spec in specs]), str(shapes))
    return captured


def verify_functional(graph: fx.Graph) -> None:
    """Check that every node is a pure function with a known result.

    Raises:
        VerifyError: see `verify_captured`.
    """
    try:
        graph.lint()
    except RuntimeError as error:
        raise _broken("graph", "a well-formed graph", str(error)) from error
    for node in graph.nodes:
        if node.op == "call_function":
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable:
                raise _broken(node.name, "an op that changes no input", str(node.target))
        elif node.op not in ("placeholder", "get_attr", "output"):
            raise _broken(node.name, "a call of a function", f"{node.op} {node.target}")
        if node.op != "output" and "val" not in node.meta and not _is_inner_graph(node):
            raise _broken(node.name, "a value with a known shape", "no meta['val']")


def verify_rewritten(captured: CapturedGraph, rewritten: Rewritten) -> Rewritten:
    """Check the variants against the plain graph and each other, and hand them on.

    Raises:
        VerifyError: a variant takes or returns something else than it must.
    """
    values = {name: (c.shape, c.dtype) for name, (c, _) in rewritten.slots().items()}
    values |= dict.fromkeys(rewritten.tables, ((), torch.float32))
    plain = _output_forms(captured.graph)
    for mode, variant in rewritten.variants.items():
        verify_functional(variant.module.graph)
        allowed = values
        if mode is StepMode.REFRESH:  # of all caches, only kept outputs are there to be mixed
            own = {str(value) for value in graph_outputs(captured.graph)}
            held = {n for n, (c, _) in rewritten.slots().items() if c.folded or c.node not in own}
            allowed = {name: form for name, form in values.items() if name not in held}
        _verify_placeholders(captured, variant, allowed)
        expected = list(plain)
        if mode is StepMode.REFRESH:
            expected += [(cache.shape, cache.dtype) for cache in rewritten.caches]
        forms = _output_forms(variant.module.graph)
        if forms != expected:
            raise _broken(f"outputs of {mode.name}", str(expected), str(forms))
        _verify_attributes(variant)
    return rewritten


def _verify_placeholders(
    captured: CapturedGraph,
    variant: Variant,
    values: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> None:
    arguments = len(captured.signature.tensors)
    placeholders = [node for node in variant.module.graph.nodes if node.op == "placeholder"]
    names = tuple(str(node.target) for node in placeholders[arguments:])
    if names != variant.reads:
        raise _broken(f"placeholders of {variant.mode.name}", str(variant.reads), str(names))
    for node in placeholders[arguments:]:
        form = (shape_of(node), node.meta["val"].dtype)
        if values.get(str(node.target)) != form:
            raise _broken(
                node.name, "a cache that REFRESH writes, or a weight from a table", str(form)
            )


def _verify_attributes(variant: Variant) -> None:
    for node in variant.module.graph.nodes:
        if node.op == "get_attr":
            value: object = variant.module
            for part in str(node.target).split("."):
                value = getattr(value, part, None)
            if isinstance(value, fx.GraphModule) and _is_inner_graph(node):
                continue
            if not isinstance(value, Tensor) or tuple(value.shape) != shape_of(node):
                raise _broken(node.name, f"a tensor {shape_of(node)}", repr(type(value).__name__))


def _is_inner_graph(node: fx.Node) -> bool:
    """Whether a node names a graph that the ops using it run inside, as in flex attention."""
    inside = [isinstance(user.target, HigherOrderOperator) for user in node.users]
    return node.op == "get_attr" and bool(inside) and all(inside)


def _output_forms(graph: fx.Graph) -> list[tuple[tuple[int, ...], torch.dtype] | None]:
    return [
        (shape_of(value), value.meta["val"].dtype)
        if isinstance(value, fx.Node) and _is_tensor(value)
        else None
        for value in graph_outputs(graph)
    ]


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _broken(where: str, expected: str, got: str) -> VerifyError:
    return VerifyError(
        where,
        expected=expected,
        got=got,
        fix="This is a defect of calicache, not of your model; please report it.",
    )
