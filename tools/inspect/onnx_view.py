"""Facts of a bare ONNX file as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.columns import Columns
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from calicache.tools.inspect.onnx_facts import ExternalFacts, OnnxFacts
from calicache.tools.terminal.text import (
    add_plain_row,
    fact_grid,
    format_count,
    plain_table,
    some_of,
    title,
)


def describe_onnx(facts: OnnxFacts) -> Iterator[RenderableType]:
    """What `calicache inspect` prints of an ONNX file."""
    yield Text("ONNX model", style="bold")
    producer = f"{facts.producer} {facts.producer_version}".strip()
    opsets = ", ".join(f"{domain} {version}" for domain, version in facts.opsets.items())
    weights = f"{facts.initializers}, {format_count(facts.initializer_bytes, 'B')}"
    yield fact_grid(
        [
            ("file", f"{format_count(facts.bytes, 'B')}, sha256 {facts.sha256[:16]}"),
            ("part of", facts.artifact or "no artifact"),
            ("made by", producer or "not said"),
            ("format", f"IR version {facts.ir_version}, opsets {opsets}"),
            ("graph", facts.graph or "without a name"),
            ("inputs", some_of([str(value) for value in facts.inputs])),
            ("outputs", some_of([str(value) for value in facts.outputs])),
            ("weights", weights),
            ("outside", "\n".join(map(_external, facts.external)) or "no file with weights"),
        ]
    )
    yield title("Graphs, each run once")
    yield _graph_table(facts)
    yield title("Operators")
    counts = facts.operators.items()
    yield Columns([Text(f"{name} {count}") for name, count in counts], padding=(0, 3))


def _external(file: ExternalFacts) -> str:
    size = "missing" if file.size is None else format_count(file.size, "B")
    return f"{file.location}, {file.tensors} tensors, {size}"


def _graph_table(facts: OnnxFacts) -> Table:
    table = plain_table(["graph"], ["nodes", "MACs", "not counted"])
    for graph in facts.graphs:
        add_plain_row(
            table,
            f"{'  ' * graph.depth}{graph.place}",
            str(graph.nodes),
            format_count(graph.macs),
            str(graph.unknown) if graph.unknown else "-",
        )
    return table
