"""Views of graphs as text: golden for one block and the folded model in every mode."""

from __future__ import annotations

import pytest
from support.golden import assert_golden
from support.small.graphs import CALIBRATE, MODES, REFRESH, small_graphs

from calicache.graph_passes import fold_blocks, view_block
from calicache.graph_passes.describe.graphs import Mark
from calicache.tools.graph.text import SIGNS, block_text, folded_text


@pytest.mark.parametrize("mode", MODES)
def test_text_of_a_block_is_the_golden_one(mode: str) -> None:
    view = view_block(small_graphs(0), "blocks.0", MODES[mode])
    assert_golden(f"graph_block/{mode}.txt", block_text(view))


@pytest.mark.parametrize("mode", MODES)
def test_text_of_the_folded_model_is_the_golden_one(mode: str) -> None:
    assert_golden(f"graph_model/{mode}.txt", folded_text(fold_blocks(small_graphs(0), MODES[mode])))


@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("mode", MODES)
def test_every_node_has_one_line_with_its_sign(mode: str, order: int) -> None:
    view = view_block(small_graphs(order), "blocks.1", MODES[mode])
    lines = block_text(view).splitlines()
    for node in view.nodes:
        start = f"{SIGNS[node.mark]} {node.name}: "
        (line,) = [line for line in lines if line.startswith(start)]
        assert f"= {node.op}" in line
        assert all(name in line for name in node.inputs)
        assert node.shape is None or str(list(node.shape)) in line
    assert len([line for line in lines if line.startswith("> ")]) == len(view.enters)
    assert len([line for line in lines if line.startswith("< ")]) == len(view.leaves)


def test_cache_writes_stand_behind_the_node_that_is_kept() -> None:
    view = view_block(small_graphs(0), "blocks.0", REFRESH)
    lines = block_text(view).splitlines()
    for write in view.writes:
        line = lines.index(f"= {write.cache} <- {write.node}")
        before = [text for text in lines[:line] if not text.startswith("= ")][-1]
        assert before[2:].startswith(f"{write.node}: ")
    assert f"{len(view.writes)} written to caches" in lines[0]


def test_layer_and_its_calibration_branch_stand_together() -> None:
    lines = block_text(view_block(small_graphs(0), "blocks.0", CALIBRATE)).splitlines()
    mlp = [line[0] for line in lines if "# mlp.fc1" in line]
    assert mlp[:3] == [SIGNS[Mark.REMOVED]] * 3  # the weight, the bias, the layer
    assert {SIGNS[Mark.INSERTED], SIGNS[Mark.CACHE]} == set(mlp[3:])
