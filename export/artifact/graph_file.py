"""graphs.json of an artifact: the graphs of all modes, to be looked at without the model.

A mode is kept as what differs from the plain graph: the number of a node of that graph, the
number with other inputs, or a node of its own. Shapes, places and operations stand once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from calicache.export.artifact.manifest import GRAPHS_FILE, check_file, read_manifest
from calicache.graph_passes.common.errors import ArtifactError
from calicache.graph_passes.describe.graphs import (
    PLAIN,
    CacheWrite,
    GraphView,
    Mark,
    ModelGraphs,
    NodeView,
)
from calicache.graph_passes.describe.parts import RESTS, WHOLE
from calicache.graph_passes.settings.choices import StepMode

FORMAT = 1
Index = NonNegativeInt
# Name, operation, inputs, form, place, multiply-accumulates, mark.
Row = tuple[str, Index, tuple[str, ...], Index, Index, NonNegativeInt, Mark]
Changed = tuple[Index, tuple[str, ...]]
Form = tuple[str, tuple[NonNegativeInt, ...]] | None
Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True)
class StoredGraph:
    """One graph; in a mode, numbers stand for the rows of the plain graph."""

    nodes: tuple[Index | Changed | Row, ...]
    outputs: tuple[str, ...]
    writes: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class StoredGraphs:
    """The content of graphs.json.

    Attributes:
        format: version of this record.
        blocks: as in `ModelGraphs`.
        ops, forms, places: operations, dtypes with shapes, and blocks with modules, which rows
            name by number.
        plain, modes: the graphs; modes by their name in lower case.
    """

    format: int
    blocks: tuple[str, ...]
    ops: tuple[str, ...]
    forms: tuple[Form, ...]
    places: tuple[tuple[str, str], ...]
    plain: StoredGraph
    modes: dict[str, StoredGraph]


_ADAPTER = TypeAdapter(StoredGraphs)


def write_graphs(graphs: ModelGraphs, folder: Path) -> None:
    """Write graphs.json into an artifact's folder."""
    ops: dict[str, int] = {}
    forms: dict[Form, int] = {}
    places: dict[tuple[str, str], int] = {}

    def row(node: NodeView) -> Row:
        form = None if node.shape is None else (str(node.dtype), node.shape)
        op, place = _number(ops, node.op), _number(places, (node.block, node.module))
        return (node.name, op, node.inputs, _number(forms, form), place, node.macs, node.mark)

    numbers = {node.name: number for number, node in enumerate(graphs.plain.nodes)}
    plain = StoredGraph(tuple(map(row, graphs.plain.nodes)), graphs.plain.outputs, ())
    modes: dict[str, StoredGraph] = {}
    for view in graphs.modes.values():
        nodes: list[Index | Changed | Row] = []
        for node in view.nodes:
            number = numbers.get(node.name)
            if number is None:
                nodes.append(row(node))
            else:
                same = node == graphs.plain.nodes[number]
                nodes.append(number if same else (number, node.inputs))
        writes = tuple((write.cache, write.node) for write in view.writes)
        modes[view.mode] = StoredGraph(tuple(nodes), view.outputs, writes)
    stored = StoredGraphs(
        FORMAT, graphs.blocks, tuple(ops), tuple(forms), tuple(places), plain, modes
    )
    (folder / GRAPHS_FILE).write_bytes(_ADAPTER.dump_json(stored) + b"\n")


def _number(table: dict[Entry, int], entry: Entry) -> int:
    return table.setdefault(entry, len(table))


def read_graphs(directory: Path | str) -> ModelGraphs:
    """The graphs of an artifact.

    Raises:
        ArtifactError: it is no artifact, was written by a version without graphs, or graphs.json
            is damaged.
    """
    manifest, path = read_manifest(directory), Path(directory) / GRAPHS_FILE
    record = next((file for file in manifest.files if file.name == GRAPHS_FILE), None)
    if record is None:
        raise ArtifactError(
            str(path),
            expected="the graphs, which export_onnx writes",
            got="an artifact of an older version, without them",
            fix="Export the model again.",
        )
    check_file(Path(directory), record)
    return parse_graphs(path.read_bytes(), str(path))


def parse_graphs(content: bytes, name: str) -> ModelGraphs:
    """Graphs from the content of graphs.json.

    Args:
        content: as it is in the file.
        name: of the file, for messages.

    Raises:
        ArtifactError: the content is damaged; the message says where.
    """
    try:
        found = json.loads(content)["format"]  # first: another format has other fields
        if found != FORMAT:
            raise _damaged(name, "format", str(FORMAT), str(found))
        stored = _ADAPTER.validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _damaged(name, place, "graphs written by export_onnx", first["msg"]) from error
    except (ValueError, TypeError, KeyError) as error:
        got = f"{type(error).__name__}: {error}"
        raise _damaged(name, "", "graphs written by export_onnx", got) from error
    return _Reader(name, stored).graphs()


@dataclass(frozen=True, slots=True)
class _Reader:
    """Makes views of what a file holds, and checks that all of it fits together."""

    name: str
    stored: StoredGraphs

    def graphs(self) -> ModelGraphs:
        stored, names = self.stored, {mode.name.lower(): mode for mode in StepMode}
        if not {"refresh"} <= set(stored.modes) <= set(names):
            expected = f"refresh, and others of {', '.join(names)}"
            raise _damaged(self.name, "modes", expected, ", ".join(stored.modes) or "none")
        plain = self.graph(PLAIN, "plain", stored.plain, ())
        modes = {
            mode: self.graph(name, f"modes.{name}", stored.modes[name], plain.nodes)
            for name, mode in names.items()
            if name in stored.modes
        }
        return ModelGraphs(plain, modes, stored.blocks)

    def graph(
        self, mode: str, place: str, stored: StoredGraph, plain: Sequence[NodeView]
    ) -> GraphView:
        own = {node.name for node in plain}  # names that no row of the mode may take
        seen: dict[str, NodeView] = {}
        for number, item in enumerate(stored.nodes):
            where = f"{place}.nodes.{number}"
            node = self.node(where, item, plain)
            if node.name in seen or (node.mark is not Mark.PLAIN and node.name in own):
                raise _damaged(self.name, where, "a name of its own", repr(node.name))
            self.known(where, node.inputs, seen)
            seen[node.name] = node
        self.known(f"{place}.outputs", stored.outputs, seen)
        self.known(f"{place}.writes", [node for _, node in stored.writes], seen)
        writes = tuple(CacheWrite(*write) for write in stored.writes)
        return GraphView(mode, tuple(seen.values()), stored.outputs, writes)

    def node(self, where: str, item: Index | Changed | Row, plain: Sequence[NodeView]) -> NodeView:
        if isinstance(item, int):
            return self.at(where, "nodes of the plain graph", plain, item)
        if len(item) == 2:
            old = self.at(where, "nodes of the plain graph", plain, item[0])
            return replace(old, inputs=item[1])
        name, op, inputs, form, place, macs, mark = item
        kinds = {Mark.INSERTED, Mark.CACHE, Mark.WEIGHT} if plain else {Mark.PLAIN}
        if mark not in kinds:
            raise _damaged(self.name, where, " | ".join(sorted(kinds)), repr(str(mark)))
        block, module = self.at(where, "places", self.stored.places, place)
        if block not in (self.stored.blocks or (WHOLE,)) and block not in RESTS:
            raise _damaged(self.name, where, "one of the blocks, or a rest", repr(block))
        dtype, shape = self.at(where, "forms", self.stored.forms, form) or (None, None)
        short = self.at(where, "ops", self.stored.ops, op)
        return NodeView(name, short, inputs, shape, dtype, block, module, mark, macs)

    def at(self, where: str, what: str, table: Sequence[Entry], number: int) -> Entry:
        if number >= len(table):
            raise _damaged(self.name, where, f"one of {len(table)} {what}", str(number))
        return table[number]

    def known(self, where: str, names: Iterable[str], seen: Mapping[str, NodeView]) -> None:
        for name in names:
            if name not in seen:
                raise _damaged(self.name, where, "nodes in front of it alone", repr(name))


def _damaged(name: str, place: str, expected: str, got: str) -> ArtifactError:
    where = f"{name}: {place}" if place else name
    return ArtifactError(where, expected=expected, got=got, fix="Export the model again.")
