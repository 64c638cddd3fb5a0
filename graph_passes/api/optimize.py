"""optimize(): a model under a plan."""

from __future__ import annotations

from torch import nn

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.running.forms import compile_plan
from calicache.graph_passes.api.running.weights import OnChange
from calicache.graph_passes.api.runtime import MAX_FORMS, OptimizedModel
from calicache.graph_passes.common.arguments import of_kind
from calicache.graph_passes.common.disk.hashing import hash_weights
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.common.offloading import lacks_weights
from calicache.graph_passes.common.progress import Meter, OnProgress
from calicache.graph_passes.settings.choices import member


def optimize(
    model: nn.Module,
    plan: Plan,
    *,
    strict: bool = False,
    on_change: OnChange | str = OnChange.REFUSE,
    max_forms: int = MAX_FORMS,
    on_progress: OnProgress | None = None,
) -> OptimizedModel:
    """Rewrite a model under a plan.

    Of a plan with several recipes each run has the one that was made for its timesteps; they share
    the weights of the model.

    A plan of REFRESH and FORECAST steps alone needs no graph: the model is run as it is, whatever
    it does inside, and its outputs are mixed. A graph is made when it is exported or inspected.

    Args:
        model: in eval mode, with the weights that the plan was made from. It is not changed.
        plan: from `Plan.from_trajectory`, `Plan.search` or `Plan.load`.
        strict: refuse timesteps that were not recorded.
        on_change: of weights, noticed when a run begins: `refuse` raises; `refactor` makes graphs
            and factors of the new ones, as `plan.rebind` does, in the time that `optimize` takes.
            Methods that load or set adapters, or fuse projections, are refused by the first and
            carried out by the second.
        max_forms: how many other forms of call (sizes, lengths of prompts) keep their graphs.
        on_progress: told how many calibration targets have their factors.

    Returns:
        A drop-in module: the same call, the same return type.

    Raises:
        CalicacheError: whatever stage refuses names itself.
    """
    of_kind("model", model, nn.Module, PlanError)
    of_kind("plan", plan, Plan, PlanError)
    on_change = member(OnChange, on_change)
    _check_weights(model, plan)
    meter = Meter(0.0, on_progress)
    empty = lacks_weights(model)
    graphs = (
        None if one.recipe.touches_nothing and not empty else compile_plan(model, one, meter)
        for one in plan.plans
    )
    return OptimizedModel(
        model, plan, *graphs, strict=strict, on_change=on_change, max_forms=max_forms
    )


def _check_weights(model: nn.Module, plan: Plan) -> None:
    current = hash_weights(model)
    if current != plan.binding.weights_hash:
        raise PlanError(
            "weights",
            expected=f"the checkpoint the plan was made from ({plan.binding.weights_hash[:12]})",
            got=f"another ({current[:12]})",
            fix="Load that checkpoint, make a plan for this one, or carry the plan over with "
            "plan.rebind(model).",
        )
