"""A variant's outputs as weighted sums: of the step's own, of the kept ones, and of the latent."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.operations import LINEAR
from calicache.graph_passes.graph.surgery import graph_outputs, shape_of
from calicache.graph_passes.rewriting.insertion import (
    OUTPUT_WEIGHT,
    CacheSource,
    Insertion,
    cached_form,
)

aten = torch.ops.aten


def output_nodes(captured: CapturedGraph) -> list[fx.Node]:
    """The plain graph's outputs, all of which can be mixed.

    Raises:
        PlanError: one is no floating-point tensor.
    """
    outputs = graph_outputs(captured.graph)
    for value in outputs:
        meta = value.meta["val"] if isinstance(value, fx.Node) else None
        if not (isinstance(meta, Tensor) and meta.is_floating_point()):
            raise PlanError(
                f"output {value}",
                expected="a floating-point tensor, which can be forecast",
                got=str(None if meta is None else meta.dtype),
                fix="Use CALIBRATE or REUSE steps, without a correction.",
            )
    return [value for value in outputs if isinstance(value, fx.Node)]


def mix_outputs(
    insert: Insertion, captured: CapturedGraph, latent: str | None, *, keep_own: bool
) -> tuple[fx.node.Argument, ...]:
    """w_0 own + sum_k w_k kept_k for every output, and + w_x x for the first one.

    Args:
        insert: the variant, which is written to before its output node.
        captured: the plain graph.
        latent: the input x, of the first output's shape but for extra channels; None for none.
        keep_own: whether the variant has outputs of its own.
    """
    plain, own = output_nodes(captured), graph_outputs(insert.graph)
    with insert.graph.inserting_before(insert.graph.output_node()):
        mixed = [_mix(insert, *pair, keep_own=keep_own) for pair in zip(plain, own, strict=True)]
        if latent is not None:
            term = _latent_term(insert, _input_node(insert.graph, captured, latent), plain[0])
            mixed[0] = insert.call(aten.add.Tensor, mixed[0], term)
    return tuple(mixed)


def _mix(insert: Insertion, plain: fx.Node, own: object, *, keep_own: bool) -> fx.Node:
    assert isinstance(own, fx.Node)
    kept = insert.slots(CacheSource.of_output(plain), cached_form(plain))
    total = insert.weighted_sum(kept, OUTPUT_WEIGHT, first=1)
    if plain.target is LINEAR:
        total = insert.shaped(total, plain)
    if not keep_own:
        return total
    return insert.call(aten.add.Tensor, insert.weighted_sum([own], OUTPUT_WEIGHT), total)


def _input_node(graph: fx.Graph, captured: CapturedGraph, name: str) -> fx.Node:
    names = [spec.name for spec in captured.signature.tensors]
    if name not in names:
        raise PlanError(
            "latent",
            expected=" | ".join(names),
            got=name,
            fix="Make the plan again from the recording.",
        )
    placeholders: list[fx.Node] = [node for node in graph.nodes if node.op == "placeholder"]
    return placeholders[names.index(name)]


def _latent_term(insert: Insertion, latent: fx.Node, like: fx.Node) -> fx.Node:
    """w_x x in the shape and dtype of the output: 0 in channels that x does not have."""
    scaled = insert.weighted_sum([latent], OUTPUT_WEIGHT, first=insert.history + 1)
    wanted: Tensor = like.meta["val"]
    missing = _missing_channels(shape_of(latent), shape_of(like))
    if scaled.meta["val"].dtype != wanted.dtype:
        scaled = insert.unary(aten._to_copy.default, scaled, dtype=wanted.dtype)
    if missing:
        widths = [0, 0] * (wanted.ndim - 2) + [0, missing]
        scaled = insert.unary(aten.constant_pad_nd.default, scaled, widths)
    return scaled


def _missing_channels(latent: tuple[int, ...], output: tuple[int, ...]) -> int:
    fits = len(latent) == len(output) and latent[:1] == output[:1] and latent[2:] == output[2:]
    if not fits or latent[1:2] > output[1:2]:
        raise PlanError(
            "latent",
            expected=f"an input of the first output's shape {tuple(output)}, or fewer channels",
            got=str(tuple(latent)),
            fix="Make the plan again from the recording.",
        )
    return output[1] - latent[1] if len(output) > 1 else 0
