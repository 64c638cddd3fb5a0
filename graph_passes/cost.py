"""What a step costs in each mode: multiply-accumulates, weight bytes, cache bytes.

Everything is read from shapes, so a model on the meta device will do. Only products count
(linear, matmul, convolution, attention); element-wise work is left out, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import conv_flop_count, sdpa_flop_count

from calicache.graph_passes.capture import CapturedGraph, shape_of
from calicache.graph_passes.sites import LinearSite, Sites

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class SiteCost:
    """Cost of one site in one call.

    Attributes:
        full_macs: of the whole layer, T * in * out for T tokens.
        calibrate_macs: of the calibration branch, T * r * (in + out).
        full_bytes: of W and b; `factor_bytes` of A and B.
        fold_macs: of A x on a REFRESH step, where the site is folded.
        cache_bytes: of y_ref, and of z_ref, or x_ref at the first site of a sibling group.
    """

    full_macs: int
    calibrate_macs: int
    fold_macs: int
    full_bytes: int
    factor_bytes: int
    cache_bytes: int


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Cost of one call in each mode.

    Attributes:
        plain_macs: the model as it was.
        refresh_macs: the model and what it does for folded caches.
        calibrate_macs, reuse_macs: a cheap step.
        sites: by name.
    """

    plain_macs: int
    refresh_macs: int
    calibrate_macs: int
    reuse_macs: int
    sites: Mapping[str, SiteCost]

    def uniform_share(self, interval: int, *, reuse: bool = False) -> float:
        """MACs of a long run against the plain model, with a REFRESH every `interval` steps."""
        cheap = self.reuse_macs if reuse else self.calibrate_macs
        return (self.refresh_macs + (interval - 1) * cheap) / (interval * self.plain_macs)


def model_cost(
    captured: CapturedGraph,
    sites: Sites,
    ranks: Mapping[str, int],
    folded: frozenset[str] = frozenset(),
) -> ModelCost:
    """Cost of every mode from shapes alone.

    Args:
        captured: the plain graph.
        sites: what CALIBRATE replaces, and the branches that REUSE skips.
        ranks: r by site name.
        folded: sites that cache A x instead of x.
    """
    macs = {node.name: node_macs(node) for node in captured.graph.nodes}
    plain = sum(macs.values())
    first = {group.sites[0] for group in sites.groups}
    costs = {
        site.name: _site_cost(
            captured,
            site,
            ranks[site.name],
            keeps_input=site.name in first and site.name not in folded,
            folds=site.name in folded,
        )
        for site in sites.linears
    }
    saved = sum(cost.full_macs - cost.calibrate_macs for cost in costs.values())
    skipped = {name for branch in sites.branches for name in branch.nodes}
    return ModelCost(
        plain_macs=plain,
        refresh_macs=plain + sum(cost.fold_macs for cost in costs.values()),
        calibrate_macs=plain - saved,
        reuse_macs=plain - sum(macs[name] for name in skipped),
        sites=costs,
    )


def graph_macs(graph: fx.Graph) -> int:
    """Multiply-accumulates of one run of a graph."""
    return sum(node_macs(node) for node in graph.nodes)


def node_macs(node: fx.Node) -> int:
    """Multiply-accumulates of one node; 0 for everything that is not a product."""
    shapes = [shape_of(arg) for arg in node.args if isinstance(arg, fx.Node) and _is_tensor(arg)]
    if node.target is aten.linear.default:
        return prod(shapes[0]) * shapes[1][0]
    if node.target is aten.scaled_dot_product_attention.default:
        return int(sdpa_flop_count(*shapes[:3])) // 2  # type: ignore[no-untyped-call]
    if node.target in (aten.matmul.default, aten.mm.default, aten.bmm.default):
        return prod(shape_of(node)) * shapes[0][-1]
    if node.target in (aten.addmm.default, aten.baddbmm.default):
        return prod(shape_of(node)) * shapes[1][-1]
    if node.target in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default):
        return _conv_macs(shapes, node, transposed=False)
    if node.target is aten.convolution.default:
        return _conv_macs(shapes, node, transposed=bool(node.args[6]))
    return 0


def _conv_macs(shapes: list[tuple[int, ...]], node: fx.Node, *, transposed: bool) -> int:
    source, weight, result = list(shapes[0]), list(shapes[1]), list(shape_of(node))
    return conv_flop_count(source, weight, result, transposed=transposed) // 2


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _site_cost(
    captured: CapturedGraph, site: LinearSite, rank: int, *, keeps_input: bool, folds: bool
) -> SiteCost:
    size = captured.attribute(site.weight).element_size()
    width = site.in_features + site.out_features
    channels = site.out_features
    if rank:
        channels += site.in_features * keeps_input + rank * folds
    bias = site.out_features if site.bias else 0
    return SiteCost(
        full_macs=site.tokens * site.in_features * site.out_features,
        calibrate_macs=site.tokens * rank * width,
        fold_macs=site.tokens * rank * site.in_features * folds,
        full_bytes=(site.in_features * site.out_features + bias) * size,
        factor_bytes=rank * width * size,
        cache_bytes=site.tokens * channels * size,
    )
