"""Drawings of rewritten graphs: Mermaid text, and SVG that Graphviz lays out."""

from __future__ import annotations

import importlib
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from calicache.graph_passes.describe.blocks import BlockView, FoldedView
from calicache.graph_passes.describe.graphs import Mark
from calicache.tools.graph.drawing import LEGEND, Drawing, DrawnEdge, DrawnNode, Kind, drawing_of
from calicache.tools.terminal.options import import_library

# All have a contrast of 3 and more on white and on the dark greys of dark themes.
COLOURS: Mapping[Mark, str] = {
    Mark.PLAIN: "#7d8590",
    Mark.INSERTED: "#2c974b",
    Mark.REMOVED: "#e5534b",
    Mark.CACHE: "#4184e4",
    Mark.WEIGHT: "#b0801a",
}
_FILL = "26"  # alpha: the page shines through, so that the text has the page's own contrast
_SVG = "http://www.w3.org/2000/svg"
# A file of its own follows the reader's theme; inside a page this matches nothing.
_STYLE = "svg:root{color-scheme:light dark;color:CanvasText}"
STDERR = 2
_FONT = {"fontname": "Helvetica,Arial,sans-serif", "fontsize": "10"}
_SHAPES: Mapping[Kind, dict[str, str]] = {
    Kind.OPERATION: {"shape": "box", "style": "filled,rounded"},
    Kind.BLOCK: {"shape": "box", "style": "filled,rounded"},
    Kind.TENSOR: {"shape": "box", "style": "filled"},
    Kind.CACHE: {"shape": "cylinder", "style": "filled"},
    Kind.SCALAR: {"shape": "ellipse", "style": "filled"},
    Kind.BORDER: {"shape": "cds", "style": "filled,dotted"},
}
_BRACKETS: Mapping[Kind, tuple[str, str]] = {
    Kind.OPERATION: ("(", ")"),
    Kind.BLOCK: ("(", ")"),
    Kind.TENSOR: ("[", "]"),
    Kind.CACHE: ("[(", ")]"),
    Kind.SCALAR: ("([", "])"),
    Kind.BORDER: (">", "]"),
}
_MERMAID_WORDS = re.compile(
    "graph|flowchart|subgraph|end|style|linkStyle|classDef|class|click|href|call|default|direction|"
    "interpolate"
)


def mermaid_text(view: BlockView | FoldedView) -> str:
    """A Mermaid flowchart; node ids are node names, classes are marks."""
    drawing = drawing_of(view)
    names = (node.name for node in (*drawing.nodes, *LEGEND))
    ids = _mermaid_ids(names)
    lines = ["---", f"title: {drawing.title}", "---", "flowchart TD"]
    lines += [f"  {_mermaid_node(node, ids)}" for node in drawing.nodes]
    lines += [f"  {_mermaid_edge(edge, ids)}" for edge in drawing.edges]
    lines += [
        "  subgraph calicache_legend [legend]",
        *(f"    {_mermaid_node(n, ids)}" for n in LEGEND),
        "  end",
    ]
    for mark, colour in COLOURS.items():
        dashes = ",stroke-dasharray:4" if mark is Mark.REMOVED else ""
        width = 3 if mark is Mark.INSERTED else 1
        lines.append(
            f"  classDef {mark} fill:{colour}{_FILL},stroke:{colour},stroke-width:{width}px{dashes}"
        )
    return "\n".join(lines) + "\n"


def svg_text(
    view: BlockView | FoldedView, prefix: str = "", legend: Sequence[DrawnNode] = LEGEND
) -> str:
    """An SVG drawing that is readable on light and dark pages.

    Every node is a `<g>` with the node's name as `id` and `data-node`, and its mark as a class
    and `data-mark`; edges have `data-source` and `data-target`. Text takes the page's colour.

    Args:
        view: what to draw.
        prefix: put in front of every id, for several drawings on one page.
        legend: what explains the marks; empty where the page does.

    Raises:
        LibraryError: pygraphviz is missing.
    """
    drawing = drawing_of(view)
    root = ElementTree.fromstring(_layout(drawing, legend))
    _dress(root, drawing, prefix, legend)
    ElementTree.register_namespace("", _SVG)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _mermaid_ids(names: Iterable[str]) -> dict[str, str]:
    """Names as Mermaid takes them: letters, digits and underscores, and no word of its own."""
    ids: dict[str, str] = {}
    for name in names:
        own = re.sub(r"\W", "_", name)
        while _MERMAID_WORDS.fullmatch(own) or own in ids.values():
            own += "_"
        ids[name] = own
    return ids


def _mermaid_node(node: DrawnNode, ids: Mapping[str, str]) -> str:
    left, right = _BRACKETS[node.kind]
    text = "<br/>".join(line.replace('"', "#quot;") for line in node.lines)
    return f'{ids[node.name]}{left}"{text}"{right}:::{node.mark}'


def _mermaid_edge(edge: DrawnEdge, ids: Mapping[str, str]) -> str:
    arrow = {Mark.REMOVED: "-.->", Mark.INSERTED: "==>"}.get(edge.mark, "-->")
    label = f'|"{edge.label}"|' if edge.label else ""
    return f"{ids[edge.source]} {arrow}{label} {ids[edge.target]}"


def _layout(drawing: Drawing, legend: Sequence[DrawnNode]) -> bytes:
    """The drawing as Graphviz's `dot` lays it out, as SVG."""
    pygraphviz = import_library("pygraphviz", "pygraphviz", "lays the graph out")
    _load_fonts()
    graph = pygraphviz.AGraph(name=drawing.title, directed=True, strict=False)
    graph.graph_attr.update(bgcolor="transparent", ranksep="0.35", nodesep="0.2")
    graph.node_attr.update(_FONT, margin="0.1,0.05", height="0.3")
    graph.edge_attr.update(_FONT, arrowsize="0.6")
    if legend:
        _add_legend(graph, legend)
    for node in drawing.nodes:
        _add_node(graph, node)
    scalars = {node.name for node in drawing.nodes if node.mark is Mark.WEIGHT}
    for edge in drawing.edges:
        look = {"label": edge.label, "color": COLOURS[edge.mark]}
        if edge.mark is Mark.REMOVED:
            look["style"] = "dashed"
        if edge.source in scalars:  # read all over the block: they would pull it together
            look |= {"constraint": "false", "color": COLOURS[Mark.WEIGHT], "penwidth": "0.5"}
        graph.add_edge(edge.source, edge.target, **look)
    drawn: bytes = graph.draw(format="svg", prog="dot")
    return drawn


@cache
def _load_fonts() -> None:
    """Let Graphviz find its fonts, once in a process, without a trace.

    Its library for fonts makes folders for a cache wherever HOME is said to be, and warns, on the
    error stream of the process itself, of what a newer configuration of the system has.
    """
    graph = importlib.import_module("pygraphviz").AGraph("graph { a }")
    cache_home, errors = os.environ.get("XDG_CACHE_HOME"), os.dup(STDERR)
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "told").open("w") as told:
        os.environ["XDG_CACHE_HOME"] = scratch
        os.dup2(told.fileno(), STDERR)
        try:
            graph.draw(format="svg", prog="dot")
        finally:
            os.dup2(errors, STDERR)
            os.close(errors)
            del os.environ["XDG_CACHE_HOME"]
            if cache_home is not None:
                os.environ["XDG_CACHE_HOME"] = cache_home


def _add_legend(graph: Any, legend: Sequence[DrawnNode]) -> None:
    colour = COLOURS[Mark.PLAIN]
    box = graph.add_subgraph(name="cluster_legend", label="legend", color=colour, **_FONT)
    for node in legend:
        _add_node(box, node)
    for above, below in pairwise(legend):
        box.add_edge(above.name, below.name, style="invis")


def _add_node(graph: Any, node: DrawnNode) -> None:
    look = dict(_SHAPES[node.kind])
    if node.mark is Mark.REMOVED:
        look["style"] += ",dashed"
    if node.mark is Mark.INSERTED:
        look["penwidth"] = "2"
    colour = COLOURS[node.mark]
    graph.add_node(
        node.name, label="\n".join(node.lines), color=colour, fillcolor=colour + _FILL, **look
    )


def _dress(
    root: ElementTree.Element, drawing: Drawing, prefix: str, legend: Sequence[DrawnNode]
) -> None:
    """Put names, marks and tooltips on what Graphviz drew, and take its own ids away."""
    explained = {node.name for node in legend}
    nodes = {node.name: node for node in (*drawing.nodes, *legend)}
    marks = {(edge.source, edge.target): edge.mark for edge in drawing.edges}
    root.set("class", "calicache-graph")
    root.set("role", "img")
    root.set("aria-label", drawing.title)
    root.set("fill", "currentColor")
    style = ElementTree.Element(f"{{{_SVG}}}style")
    style.text = _STYLE
    root.insert(0, style)
    for group in root.iter(f"{{{_SVG}}}g"):
        title = group.find(f"{{{_SVG}}}title")
        kind = group.attrib.pop("class")
        del group.attrib["id"]
        if title is None or kind not in ("node", "edge"):
            group.set("class", kind)
            continue
        name = str(title.text)
        if kind == "node":
            node = nodes[name]
            kind = "legend" if name in explained else "node"
            group.attrib |= {"id": prefix + name, "class": f"{kind} {node.mark}"}
            group.attrib |= {"data-node": name, "data-mark": str(node.mark)}
            group.set("data-kind", str(node.kind))
            title.text = node.about
        else:
            source, _, target = name.partition("->")
            mark = marks.get((source, target), Mark.PLAIN)
            group.attrib |= {"class": f"edge {mark}", "data-mark": str(mark)}
            group.attrib |= {"data-source": source, "data-target": target}
            title.text = f"{source} -> {target}"
    for text in root.iter(f"{{{_SVG}}}text"):
        text.set("fill", "currentColor")
