"""optimize(): the stages of the compiler, in one visible list."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from calicache.graph_passes.capture import capture
from calicache.graph_passes.cost import model_cost
from calicache.graph_passes.decompose import decompose_sites
from calicache.graph_passes.dependence import classify_nodes
from calicache.graph_passes.errors import PlanError
from calicache.graph_passes.fold import choose_folds
from calicache.graph_passes.plan import (
    Plan,
    StepMode,
    check_rank,
    check_statistics,
    hash_weights,
)
from calicache.graph_passes.rewrite import rewrite
from calicache.graph_passes.runtime import OptimizedModel
from calicache.graph_passes.sites import find_sites
from calicache.graph_passes.verify import verify_captured, verify_rewritten


def optimize(
    model: nn.Module, plan: Plan, on_site: Callable[[int, int], None] | None = None
) -> OptimizedModel:
    """Rewrite a model under a plan.

    Args:
        model: in eval mode, with the weights that the plan was made from. It is not changed.
        plan: from `Plan.from_trajectory` or `Plan.load`.
        on_site: called as on_site(done, total) while layers are decomposed.

    Returns:
        A drop-in module: the same call, the same return type.

    Raises:
        CalicacheError: whatever stage refuses names itself.
    """
    _check_weights(model, plan)
    settings = plan.settings
    captured = verify_captured(capture(model, settings.signature))
    classes = classify_nodes(captured, settings.dependence)
    sites = find_sites(captured, classes, settings.include, settings.exclude)
    check_rank(settings.rank, sites.linears)
    check_statistics(plan, sites.linears)
    calibrated = sites.linears if StepMode.CALIBRATE in plan.schedule else ()
    factors = decompose_sites(captured, calibrated, settings.rank, plan.statistics, on_site)
    ranks = {site.name: settings.rank for site in sites.linears}
    folded = choose_folds(sites, ranks, plan.schedule, _itemsize(model))
    rewritten = verify_rewritten(
        captured, rewrite(captured, sites, factors, frozenset(plan.schedule), folded)
    )
    cost = model_cost(captured, sites, ranks, folded)
    return OptimizedModel(
        model,
        plan=plan,
        captured=captured,
        sites=sites,
        factors=factors,
        rewritten=rewritten,
        cost=cost,
    )


def _itemsize(model: nn.Module) -> int:
    return next(model.parameters()).element_size()


def _check_weights(model: nn.Module, plan: Plan) -> None:
    found = hash_weights(model)
    if found != plan.settings.weights_hash:
        raise PlanError(
            "weights",
            expected=f"the checkpoint the plan was made from ({plan.settings.weights_hash[:12]})",
            got=f"another ({found[:12]})",
            fix="Load that checkpoint, or make a plan for this one.",
        )
