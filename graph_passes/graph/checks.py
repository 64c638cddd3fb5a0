"""Invariants of a captured graph: what holds here, every later stage relies on."""

from __future__ import annotations

from torch import fx
from torch._ops import HigherOrderOperator

from calicache.graph_passes.common.errors import VerifyError
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.surgery import shape_of
from calicache.graph_passes.graph.whole import is_whole


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
        raise defect("placeholders", str([spec.shape for spec in specs]), str(shapes))
    return captured


def verify_functional(graph: fx.Graph) -> None:
    """Check that every node is a pure function with a known result.

    Raises:
        VerifyError: see `verify_captured`.
    """
    try:
        graph.lint()
    except RuntimeError as error:
        raise defect("graph", "a well-formed graph", str(error)) from error
    for node in graph.nodes:
        if node.op == "call_function":
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable:
                raise defect(node.name, "an op that changes no input", str(node.target))
        elif node.op not in ("placeholder", "get_attr", "output") and not is_whole(node):
            raise defect(node.name, "a call of a function", f"{node.op} {node.target}")
        if node.op != "output" and "val" not in node.meta and not is_inner_graph(node):
            raise defect(node.name, "a value with a known shape", "no meta['val']")


def is_inner_graph(node: fx.Node) -> bool:
    """Whether a node names a graph that the ops using it run inside, as in flex attention."""
    inside = [isinstance(user.target, HigherOrderOperator) for user in node.users]
    return node.op == "get_attr" and bool(inside) and all(inside)


def defect(where: str, expected: str, got: str) -> VerifyError:
    """The error for an invariant that a stage of calicache itself broke."""
    return VerifyError(
        where,
        expected=expected,
        got=got,
        fix="This is a defect of calicache, not of your model; please report it.",
    )
