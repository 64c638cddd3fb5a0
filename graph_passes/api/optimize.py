"""optimize(): a model under a plan."""

from __future__ import annotations

from torch import nn

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.common.arguments import of_kind
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.common.hashing import hash_weights
from calicache.graph_passes.common.progress import Meter, OnProgress
from calicache.graph_passes.rewriting.compile import compile_recipe


def optimize(
    model: nn.Module, plan: Plan, *, on_progress: OnProgress | None = None
) -> OptimizedModel:
    """Rewrite a model under a plan.

    Args:
        model: in eval mode, with the weights that the plan was made from. It is not changed.
        plan: from `Plan.from_trajectory`, `Plan.search` or `Plan.load`.
        on_progress: told how many calibration targets have their factors.

    Returns:
        A drop-in module: the same call, the same return type.

    Raises:
        CalicacheError: whatever stage refuses names itself.
    """
    of_kind("model", model, nn.Module, PlanError)
    of_kind("plan", plan, Plan, PlanError)
    _check_weights(model, plan)
    recipe, workspace = plan.recipe, plan.workspace
    meter = Meter(0.0, on_progress)
    meter.stage("capture the model")
    analysis = workspace.analysis(model, plan.binding, recipe.include, recipe.exclude)
    meter.stage("make factors")
    compiled = compile_recipe(analysis, recipe, plan.statistics, workspace.decompositions, meter)
    return OptimizedModel(model, plan, compiled)


def _check_weights(model: nn.Module, plan: Plan) -> None:
    current = hash_weights(model)
    if current != plan.binding.weights_hash:
        raise PlanError(
            "weights",
            expected=f"the checkpoint the plan was made from ({plan.binding.weights_hash[:12]})",
            got=f"another ({current[:12]})",
            fix="Load that checkpoint, or make a plan for this one.",
        )
