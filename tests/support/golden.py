"""Texts that are kept in tests/golden, and graphs as such texts."""

from __future__ import annotations

import os
from inspect import isroutine
from pathlib import Path

from torch import Tensor, fx

GOLDEN = Path(__file__).parents[1] / "golden"


def assert_golden(name: str, text: str) -> None:
    """The text is that of a file in tests/golden; with WRITE_GOLDEN=1 it becomes that."""
    path = GOLDEN / name
    if os.environ.get("WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def graph_text(graph: fx.Graph) -> str:
    """A graph with one line for each node: name, kind of value, operation, arguments."""
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {node.args[0]}")
            continue
        value = node.meta["val"]
        kind = f"{str(value.dtype)[6:]} {list(value.shape)}" if isinstance(value, Tensor) else "-"
        options = "".join(f", {key}={option}" for key, option in node.kwargs.items())
        own = node.target if node.op == "call_function" else None
        name = own.__name__ if isroutine(own) else str(node.target)
        operation = {"placeholder": "input", "get_attr": f"weight {node.target}"}.get(
            node.op, f"{name}({', '.join(map(str, node.args))}{options})"
        )
        lines.append(f"{node.name}: {kind} = {operation}")
    return "\n".join(lines) + "\n"
