"""What a step costs in each mode: multiply-accumulates, weight bytes, cache bytes.

Everything is read from graphs and shapes, so a model on the meta device will do. Only products
count (linear, matmul, convolution, attention); element-wise work is left out, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from calicache.graph_passes.assign import CalibrationTarget, Granularity
from calicache.graph_passes.capture import CapturedGraph
from calicache.graph_passes.fold import fold_macs
from calicache.graph_passes.rewrite import Rewritten
from calicache.graph_passes.schedule import StepMode
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
class TargetCost:
    """Cost of one calibration target in one call.

    Attributes:
        full_macs: of what it stands for: its layers, or the whole residual branch.
        calibrate_macs: of the calibration branch, T r (in + out).
        fold_macs: of A x (or K y) on a REFRESH step, where the target is folded.
        full_bytes: of the layers' W and b; `factor_bytes` of A and B.
        cache_bytes: of y_ref, and of z_ref or x_ref; a shared x_ref counts at its first reader.
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
        modes: multiply-accumulates of a step, for the modes that were made.
        cache_bytes: of all kept refreshes.
        targets: by name.
    """

    plain_macs: int
    modes: Mapping[StepMode, int]
    cache_bytes: int
    targets: Mapping[str, TargetCost]

    def run_share(self, schedule: Sequence[StepMode]) -> float:
        """MACs of a run against the plain model's."""
        return sum(self.modes[mode] for mode in schedule) / (len(schedule) * self.plain_macs)


def model_cost(
    captured: CapturedGraph,
    sites: Sites,
    targets: Sequence[CalibrationTarget],
    rewritten: Rewritten,
) -> ModelCost:
    """Cost of every mode, counted on the rewritten graphs from their shapes.

    Args:
        captured: the plain graph.
        sites: sites and branches.
        targets: what CALIBRATE replaces.
        rewritten: the variants; weights may be on the meta device.
    """
    macs = {node.name: node_macs(node) for node in captured.graph.nodes}
    owner = {target.nodes[0]: target for target in targets}
    bytes_by_target = dict.fromkeys((target.name for target in targets), 0)
    by_node = {node: target.name for target in targets for node in target.nodes}
    readers: dict[str, str] = {}
    for target in targets:
        readers.setdefault(target.input_node, target.name)
    for cache in rewritten.caches:
        name = cache.folded or by_node.get(cache.node) or readers.get(cache.node)
        if name in bytes_by_target:
            bytes_by_target[name] += cache.nbytes * cache.history
    folded = {cache.folded for cache in rewritten.caches}
    return ModelCost(
        plain_macs=sum(macs.values()),
        modes={mode: graph_macs(v.module.graph) for mode, v in rewritten.variants.items()},
        cache_bytes=sum(cache.nbytes * cache.history for cache in rewritten.caches),
        targets={
            target.name: _target_cost(
                captured,
                target,
                [site for site in sites.linears if site.name in target.sites],
                sum(macs[node] for node in _replaced_nodes(sites, target)),
                bytes_by_target[target.name],
                folds=target.name in folded,
            )
            for target in owner.values()
        },
    )


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


def _replaced_nodes(sites: Sites, target: CalibrationTarget) -> tuple[str, ...]:
    if target.granularity is Granularity.LINEAR:
        return target.nodes
    return next(branch.nodes for branch in sites.branches if branch.name == target.name)


def _target_cost(
    captured: CapturedGraph,
    target: CalibrationTarget,
    linears: Sequence[LinearSite],
    full_macs: int,
    cache_bytes: int,
    *,
    folds: bool,
) -> TargetCost:
    tensors = [
        captured.attribute(name) for site in linears for name in (site.weight, site.bias) if name
    ]
    itemsize = tensors[0].element_size()
    return TargetCost(
        full_macs=full_macs,
        calibrate_macs=target.calibrate_macs,
        fold_macs=fold_macs(target) * folds,
        full_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        factor_bytes=target.rank * (target.in_features + sum(target.out_features)) * itemsize,
        cache_bytes=cache_bytes,
    )
