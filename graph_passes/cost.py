"""What a step costs in each mode: multiply-accumulates, weight bytes, cache bytes.

Everything is read from shapes, so a model on the meta device will do. Only products count
(linear, matmul, convolution, attention); element-wise work is left out, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from calicache.graph_passes.capture import CapturedGraph
from calicache.graph_passes.sites import LinearSite, Sites

aten = torch.ops.aten
PRODUCTS = frozenset(
    {
        aten.linear,
        aten.bilinear,
        aten.matmul,
        aten.mm,
        aten.bmm,
        aten.addmm,
        aten.baddbmm,
        aten.einsum,
        aten.tensordot,
        aten.inner,
        aten.linalg_multi_dot,
        aten.scaled_dot_product_attention,
        aten.convolution,
        aten.conv1d,
        aten.conv2d,
        aten.conv3d,
        aten.conv_transpose1d,
        aten.conv_transpose2d,
        aten.conv_transpose3d,
    }
)


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
    outputs = {site.node for site in sites.linears}
    first = {group.sites[0] for group in sites.groups}
    costs = {
        site.name: _site_cost(
            captured,
            site,
            ranks[site.name],
            keeps_input=site.name in first - folded and site.input_node not in outputs,
            folds=site.name in folded,
        )
        for site in sites.linears
    }
    cheap = macs | {site.node: costs[site.name].calibrate_macs for site in sites.linears}
    cached = {site.node for site in sites.linears if not ranks[site.name]}
    return ModelCost(
        plain_macs=plain,
        refresh_macs=plain + sum(cost.fold_macs for cost in costs.values()),
        calibrate_macs=_live_macs(captured.graph, cheap, cached),
        reuse_macs=_live_macs(captured.graph, macs, {branch.exit for branch in sites.branches}),
        sites=costs,
    )


def _live_macs(graph: fx.Graph, macs: Mapping[str, int], cached: Set[str]) -> int:
    """MACs of everything that the output needs where the values in `cached` are known."""
    live: set[str] = set()
    pending = [node for node in graph.nodes if node.op == "output"]
    while pending:
        node = pending.pop()
        if node.name not in live and node.name not in cached:
            live.add(node.name)
            pending.extend(node.all_input_nodes)
    return sum(macs[name] for name in live)


def graph_macs(graph: fx.Graph) -> int:
    """Multiply-accumulates of one run of a graph."""
    return sum(node_macs(node) for node in graph.nodes)


def node_macs(node: fx.Node) -> int:
    """Multiply-accumulates of one node; 0 for everything that is not a product.

    torch's own flop counter does the counting, on shapes alone.
    """
    if getattr(node.target, "overloadpacket", None) not in PRODUCTS:
        return 0
    arguments, options = fx.node.map_arg((node.args, dict(node.kwargs)), _on_meta)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        node.target(*arguments, **options)  # type: ignore[operator]
    return int(counter.get_total_flops()) // 2


def _on_meta(node: fx.Node) -> Any:
    value = node.meta["val"]
    return value.detach().to("meta") if isinstance(value, Tensor) else value


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
