"""Graphs as plain data: nodes, marks, and the part of the model each belongs to."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
from support.small.graphs import (
    CALIBRATE,
    FORECAST,
    REFRESH,
    REUSE,
    Mix,
    Skips,
    Stack,
    compiled,
    named,
    small_graphs,
    small_model,
)
from torch import Tensor

from calicache.graph_passes import (
    ModelGraphs,
    OptimizedModel,
    StepMode,
    fold_blocks,
    view_block,
    view_graphs,
)
from calicache.graph_passes.common.errors import VerifyError
from calicache.graph_passes.describe.graphs import Mark
from calicache.graph_passes.describe.parts import find_block_lists, find_blocks
from calicache.graph_passes.rewriting.insertion import slot_name


def test_every_mode_has_the_nodes_of_its_graph_in_order(
    optimized: OptimizedModel, graphs: ModelGraphs
) -> None:
    assert list(graphs.modes) == list(StepMode)
    sources = {None: optimized.compiled.captured.graph}
    sources |= {mode: v.module.graph for mode, v in optimized.compiled.variant_set.variants.items()}
    for mode, source in sources.items():
        nodes = [node for node in source.nodes if node.op != "output"]
        assert [node.name for node in graphs.graph(mode).nodes] == [node.name for node in nodes]
        for node, view in zip(nodes, graphs.graph(mode).nodes, strict=True):
            assert view.inputs == tuple(source.name for source in node.all_input_nodes)
            if isinstance(node.meta["val"], Tensor):
                assert view.shape == tuple(node.meta["val"].shape)
                assert f"torch.{view.dtype}" == str(node.meta["val"].dtype)
            else:
                assert (view.op, view.shape, view.dtype) == ("split", None, None)


def test_names_of_copied_nodes_are_those_of_the_plain_graph(
    optimized: OptimizedModel, graphs: ModelGraphs
) -> None:
    plain = named(graphs.plain.nodes)
    for mode, variant in optimized.compiled.variant_set.variants.items():
        views = named(graphs.modes[mode].nodes)
        kept = [view for view in views.values() if view.mark is Mark.PLAIN]
        assert all(
            replace(view, inputs=()) == replace(plain[view.name], inputs=()) for view in kept
        )
        inserted = [view.name for view in views.values() if view.mark is Mark.INSERTED]
        assert sorted(inserted) == sorted(variant.inserted)
        assert not set(inserted) & set(plain)


def test_reads_are_caches_or_weights_of_the_step(
    optimized: OptimizedModel, graphs: ModelGraphs
) -> None:
    slots = optimized.compiled.variant_set.slots()
    for mode, variant in optimized.compiled.variant_set.variants.items():
        read = [v for v in graphs.modes[mode].nodes if v.mark in (Mark.CACHE, Mark.WEIGHT)]
        assert tuple(view.name for view in read) == variant.reads
        assert {view.name for view in read if view.mark is Mark.CACHE} == set(slots) & set(
            variant.reads
        )
        assert all((view.op, view.inputs) == ("placeholder", ()) for view in read)


def test_refresh_writes_every_cache_by_the_node_that_makes_it(
    optimized: OptimizedModel, graphs: ModelGraphs
) -> None:
    writes = graphs.modes[REFRESH].writes
    assert [write.cache for write in writes] == [
        c.name for c in optimized.compiled.variant_set.caches
    ]
    nodes = named(graphs.modes[REFRESH].nodes)
    for write, cache in zip(writes, optimized.compiled.variant_set.caches, strict=True):
        assert nodes[write.node].shape == cache.shape
    (output,) = (c.name for c in optimized.compiled.variant_set.caches if c.is_output)
    assert [write.cache for write in graphs.modes[CALIBRATE].writes] == [output]
    assert not any(graphs.modes[mode].writes for mode in (REUSE, FORECAST))
    assert graphs.plain.outputs == ("_unsafe_view_1",)


def test_macs_are_those_of_the_cost_model(optimized: OptimizedModel, graphs: ModelGraphs) -> None:
    cost = optimized.compiled.cost
    assert sum(node.macs for node in graphs.plain.nodes) == cost.plain_macs
    for mode, graph in graphs.modes.items():
        assert sum(node.macs for node in graph.nodes) == cost.modes[mode]


def test_calibration_branch_says_which_layer_it_stands_for(
    optimized: OptimizedModel, graphs: ModelGraphs
) -> None:
    views = graphs.modes[CALIBRATE].nodes
    for target in optimized.compiled.targets:
        factors = [v for v in views if v.op == "linear" and v.module == target.name]
        assert len(factors) == 1 + len(target.nodes)  # A, and B for every layer
        assert {(v.mark, v.block) for v in factors} == {(Mark.INSERTED, target.name[:8])}
    anchors = {v.module for v in views if v.mark is Mark.CACHE and "_down" not in v.name}
    assert {site.name for site in optimized.compiled.analysis.sites.linears} <= anchors


def test_nodes_are_frozen() -> None:
    node = small_graphs(0).plain.nodes[0]
    with pytest.raises(FrozenInstanceError):
        node.name = "other"  # type: ignore[misc]


def test_variant_that_uses_a_name_for_something_else_is_refused() -> None:
    small = small_model(0).compiled
    variants = small.variant_set.variants
    variant = variants[CALIBRATE]
    changed = replace(variant, inserted=variant.inserted[1:])
    variant_set = replace(small.variant_set, variants={**variants, CALIBRATE: changed})
    name = variant.inserted[0]
    with pytest.raises(
        VerifyError, match=rf"{name} of CALIBRATE: expected an inserted node.*got plain reshape"
    ):
        view_graphs(small.captured, variant_set)


def test_parts_of_a_dit_are_its_blocks_and_what_is_before_and_after(graphs: ModelGraphs) -> None:
    assert graphs.blocks == ("blocks.0", "blocks.1")
    assert graphs.parts == ("before", "blocks.0", "blocks.1", "after")
    parts = {node.name: node.block for node in graphs.plain.nodes}
    assert parts["hidden_states"] == parts["patch_embed_weight"] == parts["silu_1"] == "before"
    assert parts["final_proj_weight"] == parts["_unsafe_view_1"] == "after"
    assert parts["blocks_1_mlp_fc2_weight"] == parts["layer_norm_3"] == "blocks.1"
    for node in graphs.plain.nodes:
        if node.module.startswith("blocks."):
            assert node.block == node.module[:8]


def test_inserted_nodes_and_caches_are_in_the_block_of_what_they_stand_for(
    optimized: OptimizedModel, graphs: ModelGraphs
) -> None:
    parts = {node.name: node.block for node in graphs.plain.nodes}
    views = named(graphs.modes[CALIBRATE].nodes)
    read = 0
    for cache in optimized.compiled.variant_set.caches:
        for back in range(cache.history):
            view = views.get(slot_name(cache.name, back))
            if view is not None:
                read += 1
                assert view.block == parts[cache.node]
    assert read == len(optimized.compiled.variant_set.variants[CALIBRATE].reads) - len(
        [view for view in views.values() if view.mark is Mark.WEIGHT]
    )
    for mode in StepMode:  # what is inserted outside the blocks mixes the output
        outside = [v for v in graphs.modes[mode].nodes if v.mark is Mark.INSERTED]
        assert {v.block for v in outside if v.block not in graphs.blocks} <= {"after"}


@pytest.mark.parametrize(
    ("paths", "lists"),
    [
        (["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"], ("blocks",)),
        # No list inside a block, however long.
        ([f"blocks.{k}.experts.{e}.fc" for k in range(2) for e in range(4)], ("blocks",)),
        # Sequential(Linear, SiLU, Linear) is no list of blocks.
        (["embed.0", "embed.2", "blocks.0.fc", "blocks.1.fc"], ("blocks",)),
        # The longer list first.
        (["a.0.fc", "a.1.fc", "b.0.fc", "b.1.fc", "b.2.fc"], ("b", "a")),
        # A Sequential of different things around the blocks.
        (["0.fc", "1.blocks.0.fc", "1.blocks.1.fc", "2.norm"], ("1.blocks",)),
        # A last block that lacks something.
        (["blocks.0.a", "blocks.0.b", "blocks.1.a"], ("blocks",)),
        # Blocks that are one layer each, and a model of one block.
        (["layers.0", "layers.1"], ("layers",)),
        (["blocks.0.attn.q", "blocks.0.ff.net.0.proj", "blocks.0.ff.net.2"], ("blocks",)),
        (["fc1", "fc2", ""], ()),
    ],
)
def test_block_lists_are_found_by_structure(paths: list[str], lists: tuple[str, ...]) -> None:
    assert find_block_lists(paths) == lists


@pytest.mark.parametrize(
    ("around", "alone"),
    [
        (["mid.attn.q", "mid.mlp.fc"], ("mid",)),
        (["mid.attn.q", "mid.mlp.fc", "mid.skip"], ("mid",)),  # and what joins the skips
        (["mid.conv", "embed.attn.q", "head"], ()),
        (["refine.0.attn.q", "refine.0.mlp.fc"], ()),  # a list of its own
    ],
)
def test_a_module_like_the_blocks_is_a_block(around: list[str], alone: tuple[str, ...]) -> None:
    layers = [f"{k}.{name}" for k in (0, 1) for name in ("attn.q", "mlp.fc")]
    inside = [f"{side}.{layer}" for side in ("down", "up") for layer in layers]
    blocks = find_blocks([*inside[:4], *around, *inside[4:]])
    assert (blocks.lists[:2], blocks.alone) == (("down", "up"), alone)
    assert blocks.block("mid.attn.q") == ("mid" if alone else None)
    assert blocks.block("middle.attn.q") is None


def test_middle_of_a_model_with_skips_has_its_place() -> None:
    model = compiled(Skips(), 2, 5, 8)
    graphs = view_graphs(model.compiled.captured, model.compiled.variant_set)
    # What is between them are the additions of the skip connections.
    blocks = ("down.0", "down.1", "mid", "up.0", "up.1")
    assert graphs.parts == ("before", *blocks, "between")
    assert view_block(graphs, "mid", CALIBRATE).count(Mark.INSERTED) > 0


def test_branch_that_reads_the_block_before_is_in_its_own_block() -> None:
    model = compiled(Stack(), 2, 5, 8)
    graphs = view_graphs(model.compiled.captured, model.compiled.variant_set)
    for node in graphs.modes[CALIBRATE].nodes:
        if node.module.startswith("layers."):
            assert node.block == node.module[:8], node


def test_second_call_of_a_block_is_a_block() -> None:
    model = compiled(Stack(times=2), 2, 5, 8)
    graphs = view_graphs(model.compiled.captured, model.compiled.variant_set)
    assert graphs.blocks == ("layers.0", "layers.1", "layers.0@1", "layers.1@1")
    edges = {(e.source, e.target) for e in fold_blocks(graphs).edges}
    assert {("layers.1", "layers.0@1"), ("layers.0@1", "layers.1@1")} <= edges
    counts = {b.name: b.inserted for b in fold_blocks(graphs, CALIBRATE).blocks}
    assert counts["layers.0@1"] > 0


def test_what_is_between_blocks_is_a_part_of_its_own() -> None:
    model = compiled(Stack(between=True), 2, 5, 8)
    graphs = view_graphs(model.compiled.captured, model.compiled.variant_set)
    assert graphs.parts == ("before", "layers.0", "layers.1", "between", "after")
    parts = {node.name: node.block for node in graphs.plain.nodes}
    assert (parts["tanh"], parts["tanh_1"]) == ("between", "after")


@pytest.mark.slow
def test_model_without_blocks_is_one_part() -> None:
    model = compiled(Mix(), 2, 5, 8)
    graphs = view_graphs(model.compiled.captured, model.compiled.variant_set)
    assert (graphs.blocks, graphs.parts) == ((), ("model",))
    view = view_block(graphs, "model", CALIBRATE)
    assert (view.enters, len(view.leaves)) == ((), 1)
    assert [block.name for block in fold_blocks(graphs, CALIBRATE).blocks] == ["model"]
