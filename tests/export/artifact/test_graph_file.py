"""graphs.json: what is written is read back, and what is damaged is refused by place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.small_graphs import (
    small_graphs,
    small_model,
)

from calicache.export.artifact.graph_file import parse_graphs, write_graphs
from calicache.graph_passes import ModelGraphs, OptimizedModel, view_graphs
from calicache.graph_passes.common.errors import ArtifactError


@pytest.fixture(scope="module", params=[0, 2], ids=["order 0", "order 2"])
def optimized(request: pytest.FixtureRequest) -> OptimizedModel:
    return small_model(request.param)


@pytest.fixture(scope="module")
def graphs(optimized: OptimizedModel) -> ModelGraphs:
    return view_graphs(optimized.compiled.captured, optimized.compiled.variant_set)


def written(graphs: ModelGraphs, folder: Path) -> bytes:
    write_graphs(graphs, folder)
    return (folder / "graphs.json").read_bytes()


def test_graphs_are_read_back_as_they_were_written(graphs: ModelGraphs, tmp_path: Path) -> None:
    content = written(graphs, tmp_path)
    assert parse_graphs(content, "graphs.json") == graphs
    assert written(graphs, tmp_path) == content
    assert content.count(b"\n") == 1


def edited(change: Callable[[dict[str, Any]], None], folder: Path) -> bytes:
    content = json.loads(written(small_graphs(0), folder))
    change(content)
    return json.dumps(content).encode()


def row_of(mode: dict[str, Any]) -> int:
    return next(k for k, row in enumerate(mode["nodes"]) if isinstance(row, list) and len(row) == 7)


def set_row(content: dict[str, Any], place: int, value: Any) -> None:
    mode = content["modes"]["reuse"]
    mode["nodes"][row_of(mode)][place] = value


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "format": (lambda c: c.update(format=2), "graphs.json: format: expected 1, got 2."),
    "no blocks": (lambda c: c.pop("blocks"), "graphs.json: blocks: .* got Field required"),
    "shape": (lambda c: c["forms"].append(["float32", [-1]]), r"graphs.json: forms\.\d+.*1\.0:"),
    "modes": (
        lambda c: c["modes"].update(banana=c["modes"]["reuse"]),
        "graphs.json: modes: expected refresh, and others of refresh, calibrate, reuse, forecast, "
        "got refresh, calibrate, reuse, forecast, banana",
    ),
    "no refresh": (lambda c: c["modes"].pop("refresh"), "modes: expected refresh, and others"),
    "number": (
        lambda c: c["modes"]["reuse"]["nodes"].append(9999),
        r"modes\.reuse\.nodes\.\d+: expected one of \d+ nodes of the plain graph, got 9999",
    ),
    "form": (lambda c: set_row(c, 3, 999), r"nodes\.\d+: expected one of \d+ forms, got 999"),
    "place": (lambda c: set_row(c, 4, 999), r"nodes\.\d+: expected one of \d+ places, got 999"),
    "op": (lambda c: set_row(c, 1, 999), r"nodes\.\d+: expected one of \d+ ops, got 999"),
    "name": (lambda c: set_row(c, 0, "linear_4"), "a name of its own, got 'linear_4'"),
    "twice": (
        lambda c: c["modes"]["reuse"]["nodes"].append(0),
        "expected a name of its own, got 'hidden_states'",
    ),
    "input": (
        lambda c: set_row(c, 2, ["linear_4"]),
        r"modes\.reuse\.nodes\.\d+: expected nodes in front of it alone, got 'linear_4'",
    ),
    "output": (
        lambda c: c["plain"].update(outputs=["nothing"]),
        r"plain\.outputs: expected nodes in front of it alone, got 'nothing'",
    ),
    "write": (
        lambda c: c["modes"]["refresh"].update(writes=[["cache_x", "nothing"]]),
        r"modes\.refresh\.writes: expected nodes in front of it alone, got 'nothing'",
    ),
    "mark": (
        lambda c: set_row(c, 6, "removed"),
        r"nodes\.\d+: expected cache \| inserted \| weight, got 'removed'",
    ),
    "block": (
        lambda c: c.update(blocks=["blocks.0"]),
        r"expected one of the blocks, or a rest, got 'blocks\.1'",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_graphs_are_refused_with_the_place(name: str, tmp_path: Path) -> None:
    change, message = DAMAGES[name]
    with pytest.raises(ArtifactError, match=message):
        parse_graphs(edited(change, tmp_path), "graphs.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b"3"])
def test_what_is_no_record_of_graphs_is_refused(content: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"graphs\.json: expected graphs written by"):
        parse_graphs(content, "graphs.json")
