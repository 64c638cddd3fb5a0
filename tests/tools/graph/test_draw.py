"""Views of graphs as Mermaid text and as SVG."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from support.golden import assert_golden
from support.small.graphs import CALIBRATE, MODES, REUSE, small_graphs

from calicache.graph_passes import fold_blocks, view_block
from calicache.graph_passes.common.errors import LibraryError
from calicache.graph_passes.describe.blocks import BlockView, FoldedView
from calicache.graph_passes.describe.graphs import Mark
from calicache.tools.graph.draw import COLOURS, _mermaid_ids, mermaid_text, svg_text
from calicache.tools.graph.drawing import LEGEND, drawing_of

SVG = "{http://www.w3.org/2000/svg}"
VIEWS = [
    pytest.param(block, mode, order, id=f"{block or 'model'}, {mode}, order {order}")
    for block in (None, "blocks.0", "after")
    for mode, order in (*((name, 0) for name in MODES), ("calibrate", 2))
]


def view_of(block: str | None, mode: str, order: int = 0) -> BlockView | FoldedView:
    graphs = small_graphs(order)
    return view_block(graphs, block, MODES[mode]) if block else fold_blocks(graphs, MODES[mode])


def by_class(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [g for g in root.iter(f"{SVG}g") if g.get("class", "").split()[:1] == [name]]


# --- Mermaid -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "block", "mode"),
    [
        ("graph_block/calibrate.mmd", "blocks.0", "calibrate"),
        ("graph_block/forecast.mmd", "after", "forecast"),
        ("graph_model/calibrate.mmd", None, "calibrate"),
        ("graph_model/refresh.mmd", None, "refresh"),
    ],
)
def test_mermaid_is_the_golden_one(name: str, block: str | None, mode: str) -> None:
    assert_golden(name, mermaid_text(view_of(block, mode)))


@pytest.mark.parametrize(("block", "mode", "order"), VIEWS)
def test_mermaid_has_every_node_once_with_its_mark_and_every_edge(
    block: str | None, mode: str, order: int
) -> None:
    view = view_of(block, mode, order)
    drawing, text = drawing_of(view), mermaid_text(view)
    nodes = re.findall(r"^ +(\w+)(?:\(|\[|>).*:::(\w+)$", text, re.M)
    assert len(nodes) == len(drawing.nodes) + len(LEGEND)
    assert len({name for name, _ in nodes}) == len(nodes)
    expected = [(re.sub(r"\W", "_", n.name), str(n.mark)) for n in (*drawing.nodes, *LEGEND)]
    assert nodes == expected
    edges = re.findall(r'^  (\w+) (?:-->|==>|-\.->)(?:\|".*"\|)? (\w+)$', text, re.M)
    assert len(edges) == len(drawing.edges)
    assert {end for edge in edges for end in edge} <= {name for name, _ in nodes}


def test_mermaid_ids_avoid_words_of_mermaid_and_each_other() -> None:
    names = ["end", "end_", "class", "class_labels", "blocks.0", "blocks_0", "style"]
    ids = _mermaid_ids(names)
    assert list(ids) == names
    assert list(ids.values()) == [
        *("end_", "end__", "class_", "class_labels", "blocks_0", "blocks_0_", "style_")
    ]


# --- SVG -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("block", "mode", "order"), VIEWS)
def test_svg_has_every_node_once_with_its_mark_and_every_edge(
    block: str | None, mode: str, order: int
) -> None:
    view = view_of(block, mode, order)
    drawing, root = drawing_of(view), ElementTree.fromstring(svg_text(view))
    nodes = by_class(root, "node")
    entries = [(g.get("id"), g.get("data-node"), g.get("class"), g.get("data-mark")) for g in nodes]
    assert sorted(entries) == sorted(
        (node.name, node.name, f"node {node.mark}", str(node.mark)) for node in drawing.nodes
    )
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(set(ids)) == len(ids) == len(drawing.nodes) + len(LEGEND)
    edges = Counter(
        (g.get("data-source"), g.get("data-target"), g.get("data-mark"))
        for g in by_class(root, "edge")
    )
    assert edges == Counter((e.source, e.target, str(e.mark)) for e in drawing.edges)


def test_every_node_of_the_view_is_drawn() -> None:
    for mode in MODES.values():
        view = view_block(small_graphs(0), "blocks.0", mode)
        names = [node.name for node in drawing_of(view).nodes]
        expected = [node.name for node in (*view.enters, *view.nodes)]
        expected += [f"{write.cache}-written" for write in view.writes]
        expected += [f"{leave.value}-to-{leave.part}" for leave in view.leaves]
        assert names == expected


def test_tooltips_say_shape_dtype_operation_and_module() -> None:
    root = ElementTree.fromstring(svg_text(view_block(small_graphs(0), "blocks.0", CALIBRATE)))
    titles = {g.get("data-node"): g.findtext(f"{SVG}title") for g in by_class(root, "node")}
    assert titles["linear_4"] == (
        "linear_4: float32 [2, 49, 8]\nlinear, removed\nblocks.0.attn.q\nMACs 6.27 k"
    )
    assert titles["cache_linear_4"] == (
        "cache_linear_4: float32 [98, 8]\nplaceholder, cache\nblocks.0.attn.q"
    )


@pytest.mark.slow
def test_svg_is_the_same_twice_and_in_another_process() -> None:
    view = view_block(small_graphs(0), "blocks.0", CALIBRATE)
    first = svg_text(view)
    assert svg_text(view) == first
    program = (
        "import pickle, sys\n"
        "from calicache.tools.graph.draw import svg_text\n"
        "sys.stdout.write(svg_text(pickle.load(sys.stdin.buffer)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(view), capture_output=True, check=True
    )
    assert done.stdout.decode() == first


def test_prefix_keeps_the_ids_of_two_drawings_apart() -> None:
    view = view_block(small_graphs(0), "blocks.0", REUSE)
    root = ElementTree.fromstring(svg_text(view, prefix="reuse-"))
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert all(str(name).startswith("reuse-") for name in ids)
    assert "add_4" in [g.get("data-node") for g in by_class(root, "node")]


def test_drawing_has_a_name_a_legend_and_no_page_of_its_own() -> None:
    root = ElementTree.fromstring(svg_text(view_block(small_graphs(0), "0", CALIBRATE)))
    assert root.get("role") == "img"
    assert root.get("aria-label") == "blocks.0, calibrate"
    marks = [g.get("data-mark") for g in by_class(root, "legend")]
    assert marks == [str(mark) for mark in Mark]
    colours = {element.get("fill") for element in root.iter()} - {None}
    assert colours <= {"none", "currentColor", *COLOURS.values()}
    assert {text.get("fill") for text in root.iter(f"{SVG}text")} == {"currentColor"}


def luminance(colour: str) -> float:
    """Relative luminance as the Web Content Accessibility Guidelines define it."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("page", ["#ffffff", "#f6f8fa", "#0d1117", "#1e1e1e"])
def test_marks_have_contrast_enough_on_light_and_on_dark(page: str) -> None:
    for colour in COLOURS.values():
        low, high = sorted((luminance(colour), luminance(page)))
        assert (high + 0.05) / (low + 0.05) >= 3  # what the guidelines ask of graphics
    assert len(set(COLOURS.values())) == len(Mark)


def test_layout_runs_from_top_to_bottom() -> None:
    root = ElementTree.fromstring(svg_text(fold_blocks(small_graphs(0), CALIBRATE)))
    places = {
        g.get("data-node"): float(next(g.iter(f"{SVG}text")).get("y", "nan"))
        for g in by_class(root, "node")
    }
    order = [places[name] for name in ("before", "blocks.0", "blocks.1", "after")]
    assert all(above < below for above, below in pairwise(order))


def test_svg_without_pygraphviz_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pygraphviz", None)  # as Python has a missing module
    with pytest.raises(LibraryError) as caught:
        svg_text(fold_blocks(small_graphs(0)))
    assert str(caught.value) == (
        "library: pygraphviz: expected the package that lays the graph out, got "
        "ModuleNotFoundError: import of pygraphviz halted; None in sys.modules. "
        "Install it: pip install 'calicache[report]'"
    )
