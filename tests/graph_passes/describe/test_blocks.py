"""One block beside the plain graph, and the model folded by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from support.small.graphs import (
    CALIBRATE,
    FORECAST,
    REFRESH,
    REUSE,
    Mix,
    Towers,
    compiled,
    named,
    small_graphs,
)

from calicache.graph_passes import (
    ModelGraphs,
    OptimizedModel,
    StepMode,
    fold_blocks,
    view_block,
    view_graphs,
)
from calicache.graph_passes.common.errors import SubjectError
from calicache.graph_passes.describe.blocks import CACHES, BlockView, EdgeView
from calicache.graph_passes.describe.graphs import Mark, NodeView

MODES = (None, *StepMode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("block", ["before", "blocks.0", "blocks.1", "after"])
def test_block_view_holds_every_node_of_both_graphs_once(
    graphs: ModelGraphs, block: str, mode: StepMode | None
) -> None:
    view = view_block(graphs, block, mode)
    plain = {node.name for node in graphs.plain.nodes if node.block == block}
    now = {node.name for node in graphs.graph(mode).nodes if node.block == block}
    names = [node.name for node in view.nodes]
    assert len(names) == len(set(names))
    assert set(names) == plain | now
    gone = {node.name for node in view.nodes if node.mark is Mark.REMOVED}
    assert gone == plain - now
    place = {name: number for number, name in enumerate(names)}
    for edge in view.edges:  # nothing is read before it is made
        if edge.source in place:
            assert place[edge.source] < place[edge.target]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_edges_are_those_of_both_graphs_and_say_which(
    graphs: ModelGraphs, mode: StepMode | None
) -> None:
    def edges(nodes: Sequence[NodeView]) -> set[tuple[str, str]]:
        return {(source, n.name) for n in nodes if n.block == "blocks.0" for source in n.inputs}

    before, now = edges(graphs.plain.nodes), edges(graphs.graph(mode).nodes)
    caches = {node.name for node in graphs.graph(mode).nodes if node.mark is Mark.CACHE}
    view = view_block(graphs, "blocks.0", mode)
    marks = {(edge.source, edge.target): edge.mark for edge in view.edges}
    assert len(marks) == len(view.edges)
    expected = dict.fromkeys(before & now, Mark.PLAIN)
    expected |= dict.fromkeys(now - before, Mark.INSERTED)
    expected |= dict.fromkeys(before - now, Mark.REMOVED)
    expected |= {edge: Mark.CACHE for edge in now if edge[0] in caches}
    assert marks == expected


def test_border_is_what_a_block_reads_and_what_others_read_of_it(graphs: ModelGraphs) -> None:
    view = view_block(graphs, "blocks.0")
    assert [(node.name, node.block) for node in view.enters] == [
        ("add", "before"),
        ("silu_1", "before"),
    ]
    assert [(leave.value, leave.part, leave.mark) for leave in view.leaves] == [
        ("add_7", "blocks.1", Mark.PLAIN)
    ]
    last = view_block(graphs, "after", FORECAST).leaves
    assert [(leave.part, leave.mark) for leave in last] == [
        ("output", Mark.INSERTED),
        ("output", Mark.REMOVED),
    ]


def test_calibrate_removes_the_layers_and_inserts_a_branch_for_each() -> None:
    view = view_block(small_graphs(0), "blocks.0", CALIBRATE)
    nodes = named(view.nodes)
    gone = {node.module for node in view.nodes if node.mark is Mark.REMOVED}
    layers = [
        f"blocks.0.{n}" for n in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert gone == {path for n in layers for path in (n, f"{n}.weight", f"{n}.bias")}
    # y* + B A (x - x*): the same view that read the layer reads the sum, in the layer's shape.
    assert EdgeView("linear_4", "view_1", Mark.REMOVED) in view.edges
    (new,) = [e.source for e in view.edges if (e.target, e.mark) == ("view_1", Mark.INSERTED)]
    assert (nodes[new].op, nodes[new].shape) == ("reshape", nodes["linear_4"].shape)
    (total,) = nodes[new].inputs
    anchor, correction = (nodes[name] for name in nodes[total].inputs)
    assert (nodes[total].op, anchor.name, anchor.mark) == ("add", "cache_linear_4", Mark.CACHE)
    assert correction.op == "linear"
    assert correction.module == "blocks.0.attn.q+k+v"


def test_reuse_removes_all_but_the_joins() -> None:
    view = view_block(small_graphs(0), "blocks.0", REUSE)
    assert [node.name for node in view.nodes if node.mark is Mark.PLAIN] == ["add_4", "add_7"]
    assert [node.name for node in view.nodes if node.mark is Mark.CACHE] == [
        "cache_mul_2",
        "cache_mul_4",
    ]
    assert (view.macs, view.count(Mark.INSERTED)) == (0, 0)


def test_refresh_writes_are_with_the_block_that_makes_them(graphs: ModelGraphs) -> None:
    written = [view_block(graphs, part, REFRESH).writes for part in graphs.parts]
    assert [len(writes) > 0 for writes in written] == [False, True, True, True]
    caches = sorted(write.cache for writes in written for write in writes)
    assert caches == sorted(write.cache for write in graphs.modes[REFRESH].writes)


def test_macs_of_the_parts_are_those_of_the_model(
    optimized: OptimizedModel, graphs: ModelGraphs
) -> None:
    for mode in StepMode:
        views = [view_block(graphs, part, mode) for part in graphs.parts]
        assert sum(view.macs for view in views) == optimized.compiled.cost.modes[mode]
        assert sum(view.plain_macs for view in views) == optimized.compiled.cost.plain_macs


def test_plain_view_marks_nothing(graphs: ModelGraphs) -> None:
    view = view_block(graphs, "1")
    assert view.mode == "plain"
    assert {node.mark for node in view.nodes} == {edge.mark for edge in view.edges} == {Mark.PLAIN}


def test_block_is_found_by_its_number() -> None:
    assert view_block(small_graphs(0), "1", CALIBRATE) == view_block(
        small_graphs(0), "blocks.1", CALIBRATE
    )


def test_unknown_block_is_refused_with_those_there_are() -> None:
    with pytest.raises(SubjectError) as caught:
        view_block(small_graphs(0), "7", CALIBRATE)
    assert str(caught.value) == (
        "subject: block: expected before, blocks.0, blocks.1, after, got '7'. Choose one of these."
    )


def test_long_lists_of_blocks_are_named_by_their_ends() -> None:
    graphs = small_graphs(0)
    many = replace(graphs, blocks=tuple(f"blocks.{number}" for number in range(28)))
    nodes = tuple(
        replace(graphs.plain.nodes[0], name=f"n{k}", block=f"blocks.{k}") for k in range(28)
    )
    many = replace(many, plain=replace(graphs.plain, nodes=nodes), modes={})
    with pytest.raises(SubjectError) as caught:
        view_block(many, "28")
    assert str(caught.value) == (
        "subject: block: expected blocks.0 .. blocks.27, got '28'. Choose one of these."
    )


def test_number_that_two_lists_have_is_refused_with_both() -> None:
    model = compiled(Towers(), 2, 5, 8)
    graphs = view_graphs(model.compiled.captured, model.compiled.variant_set)
    assert graphs.blocks == ("first.0", "first.1", "second.0", "second.1")
    with pytest.raises(SubjectError) as caught:
        view_block(graphs, "1")
    assert str(caught.value) == (
        "subject: block: expected before, first.0, first.1, second.0, second.1, "
        "got '1', which is first.1 or second.1. Choose one of these."
    )
    assert view_block(graphs, "second.1").block == "second.1"


def test_mode_that_the_plan_does_not_use_is_refused_with_those_there_are() -> None:
    model = compiled(Mix(), 2, 5, 8)
    graphs = view_graphs(model.compiled.captured, model.compiled.variant_set)
    for view in (lambda: view_block(graphs, "model", REUSE), lambda: fold_blocks(graphs, REUSE)):
        with pytest.raises(SubjectError) as caught:
            view()
        assert str(caught.value) == (
            "subject: mode: expected plain | refresh | calibrate, got 'reuse'. "
            "Choose one of these: a plan makes the modes that its schedule uses."
        )


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_folded_counts_are_those_of_the_block_views(
    graphs: ModelGraphs, mode: StepMode | None
) -> None:
    folded = fold_blocks(graphs, mode)
    assert [block.name for block in folded.blocks] == list(graphs.parts)
    for block in folded.blocks:
        view: BlockView = view_block(graphs, block.name, mode)
        assert (block.same, block.inserted, block.removed, block.reads, block.weights) == tuple(
            view.count(mark)
            for mark in (Mark.PLAIN, Mark.INSERTED, Mark.REMOVED, Mark.CACHE, Mark.WEIGHT)
        )
        assert (block.writes, block.macs) == (len(view.writes), view.macs)
        assert block.plain_macs == view.plain_macs


def test_folded_edges_follow_the_stream_and_the_caches() -> None:
    plain = {(e.source, e.target): e for e in fold_blocks(small_graphs(0)).edges}
    assert plain["blocks.0", "blocks.1"].values == ("add_7",)
    assert plain["blocks.1", "after"].values == ("add_13",)
    assert not any(CACHES in pair for pair in plain)
    cheap = {(e.source, e.target): e for e in fold_blocks(small_graphs(0), CALIBRATE).edges}
    assert cheap[CACHES, "blocks.0"].mark is Mark.CACHE
    assert "cache_linear_4" in cheap[CACHES, "blocks.0"].values
    assert ("blocks.0", CACHES) not in cheap
    refresh = {(e.source, e.target): e for e in fold_blocks(small_graphs(0), REFRESH).edges}
    assert "cache_linear_4" in refresh["blocks.0", CACHES].values
    forecast = {(e.source, e.target): e for e in fold_blocks(small_graphs(0), FORECAST).edges}
    assert forecast["blocks.0", "blocks.1"].mark is Mark.REMOVED
