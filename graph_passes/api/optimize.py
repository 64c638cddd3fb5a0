"""optimize(): the stages of the compiler, in one visible list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.common.hashing import hash_weights
from calicache.graph_passes.factors.decompose import CalibrationFactors
from calicache.graph_passes.factors.factors import make_factors
from calicache.graph_passes.factors.statistics import check_statistics
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.dependence import classify_nodes
from calicache.graph_passes.graph.run_values import find_run_values
from calicache.graph_passes.rewriting.checks import verify_variants
from calicache.graph_passes.rewriting.cost import model_cost
from calicache.graph_passes.rewriting.fold import choose_folds
from calicache.graph_passes.rewriting.variants import VariantSet, rewrite
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.recipe import PlanSettings
from calicache.graph_passes.settings.schedule import anchor_table
from calicache.graph_passes.sites.analysis import analyse
from calicache.graph_passes.sites.sites import Sites
from calicache.graph_passes.sites.targets import CalibrationTarget


def optimize(
    model: nn.Module, plan: Plan, on_target: Callable[[int, int], None] | None = None
) -> OptimizedModel:
    """Rewrite a model under a plan.

    Args:
        model: in eval mode, with the weights that the plan was made from. It is not changed.
        plan: from `Plan.from_trajectory` or `Plan.load`.
        on_target: called as on_target(done, total) while factors are made.

    Returns:
        A drop-in module: the same call, the same return type.

    Raises:
        CalicacheError: whatever stage refuses names itself.
    """
    _check_weights(model, plan)
    return _optimize(model, plan, None, on_target)


def _optimize(
    model: nn.Module,
    plan: Plan,
    factors: dict[str, CalibrationFactors] | None,
    on_target: Callable[[int, int], None] | None = None,
) -> OptimizedModel:
    captured, sites, targets = analyse(model, plan.settings)
    made, variant_set = rewrite_captured(captured, sites, targets, plan, on_target, factors)

    def again(settings: PlanSettings) -> OptimizedModel:
        return _optimize(model, replace(plan, settings=settings), made)

    return OptimizedModel(
        model,
        plan=plan,
        captured=captured,
        sites=sites,
        targets=targets,
        factors=made,
        variant_set=variant_set,
        cost=model_cost(captured, sites, targets, variant_set),
        again=again,
    )


def rewrite_captured(
    captured: CapturedGraph,
    sites: Sites,
    targets: Sequence[CalibrationTarget],
    plan: Plan,
    on_target: Callable[[int, int], None] | None = None,
    factors: dict[str, CalibrationFactors] | None = None,
) -> tuple[dict[str, CalibrationFactors], VariantSet]:
    """Factors and variants of a captured graph under a plan; factors are made where none are given.

    Raises:
        CalicacheError: statistics do not fit, or a stage refuses.
    """
    settings = plan.settings
    calibrated = targets if StepMode.CALIBRATE in settings.schedule else ()
    check_statistics(plan.statistics, settings.weighting, calibrated)
    if factors is None:
        factors = make_factors(captured, calibrated, plan.statistics, on_target)
    itemsize = next(captured.module.parameters()).element_size()
    variant_set = rewrite(
        captured,
        sites,
        targets,
        factors,
        frozenset(settings.schedule),
        folded=choose_folds(targets, settings.schedule, itemsize, settings.order + 1),
        anchors=anchor_table(settings.schedule, settings.order),
        outputs=settings.outputs,
        latent=settings.latent,
        run_values=find_run_values(captured, classify_nodes(captured, settings.dependence)),
    )
    return factors, verify_variants(captured, variant_set)


def _check_weights(model: nn.Module, plan: Plan) -> None:
    found = hash_weights(model)
    if found != plan.settings.weights_hash:
        raise PlanError(
            "weights",
            expected=f"the checkpoint the plan was made from ({plan.settings.weights_hash[:12]})",
            got=f"another ({found[:12]})",
            fix="Load that checkpoint, or make a plan for this one.",
        )
