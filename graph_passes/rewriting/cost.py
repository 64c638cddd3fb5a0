"""What a step costs in each mode: multiply-accumulates, weight bytes, cache bytes.

Everything is read from graphs and shapes, so a model on the meta device will do. Only products
count (linear, matmul, convolution, attention); element-wise work is left out, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.macs import graph_macs
from calicache.graph_passes.rewriting.fold import fold_macs
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.settings.choices import BranchKind, Granularity, StepMode
from calicache.graph_passes.sites.analysis import Analysis
from calicache.graph_passes.sites.sites import LinearSite, Sites
from calicache.graph_passes.sites.targets import CalibrationTarget

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class TargetCost:
    """Cost of one calibration target in one call.

    Attributes:
        full_macs: of what it stands for: its layers, or the whole residual branch.
        calibrate_macs: of the calibration branch, T r (in + out), or T in out in integers.
        fold_macs: of A x (or K y) on a REFRESH step, where the target is folded.
        full_bytes: of the layers' W and b; `factor_bytes` of A and B, or of Q(W).
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
    analysis: Analysis, targets: Sequence[CalibrationTarget], variant_set: VariantSet
) -> ModelCost:
    """Cost of every mode, counted on the rewritten graphs from their shapes.

    Args:
        analysis: the model as it is.
        targets: what CALIBRATE replaces.
        variant_set: the variants; weights may be on the meta device.
    """
    sites, macs = analysis.sites, analysis.macs
    owner = {target.nodes[0]: target for target in targets}
    bytes_by_target = dict.fromkeys((target.name for target in targets), 0)
    by_node = {node: target.name for target in targets for node in target.nodes}
    readers: dict[str, str] = {}
    for target in targets:
        readers.setdefault(target.input_node, target.name)
    for cache in variant_set.caches:
        name = cache.folded or by_node.get(cache.node) or readers.get(cache.node)
        if name in bytes_by_target and not cache.is_output:
            bytes_by_target[name] += cache.nbytes * cache.history
    folded = {cache.folded for cache in variant_set.caches}
    return ModelCost(
        plain_macs=analysis.plain_macs,
        modes={mode: graph_macs(v.module.graph) for mode, v in variant_set.variants.items()},
        cache_bytes=sum(cache.nbytes * cache.history for cache in variant_set.caches),
        targets={
            target.name: _target_cost(
                analysis.captured,
                target,
                [site for site in sites.linears if site.name in target.sites],
                sum(macs.get(node, 0) for node in _replaced_nodes(sites, target)),
                bytes_by_target[target.name],
                folds=target.name in folded,
            )
            for target in owner.values()
        },
    )


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
        factor_bytes=_factor_bytes(target, itemsize),
        cache_bytes=cache_bytes,
    )


def _factor_bytes(target: CalibrationTarget, itemsize: int) -> int:
    inputs, outputs = target.own_features
    if target.branch is BranchKind.INT8:
        return inputs * outputs + outputs * torch.float32.itemsize
    return target.rank * (inputs + outputs) * itemsize
