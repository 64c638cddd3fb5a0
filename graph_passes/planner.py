"""From a recorded trajectory to a plan: the stages, in one visible list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from calicache.graph_passes.branches import SiteRejection
from calicache.graph_passes.correct import fit_outputs
from calicache.graph_passes.observe import observe
from calicache.graph_passes.pipeline import analyse, rewrite_captured
from calicache.graph_passes.plan import Plan, PlanSettings
from calicache.graph_passes.record import Trajectory
from calicache.graph_passes.recover import recover_sampler
from calicache.graph_passes.schedule import StepMode


def make_plan(
    model: nn.Module,
    trajectory: Trajectory,
    settings: PlanSettings,
    *,
    correct: bool,
    on_step: Callable[[int, int], None] | None = None,
) -> Plan:
    """Collect what the settings need along a recorded trajectory; see `Plan.from_trajectory`."""
    captured, sites, targets = analyse(model, settings)
    calibrated = targets if StepMode.CALIBRATE in settings.schedule else ()
    statistics = observe(
        captured,
        calibrated,
        trajectory,
        settings.weighting,
        settings.schedule,
        settings.order,
        on_step,
    )
    plan = Plan(settings, statistics)
    if not correct:
        return plan
    recorded = recover_sampler(
        captured, trajectory, settings.dependence, len(settings.schedule), on_step
    )
    if isinstance(recorded, SiteRejection):
        correction = f"not fitted: {recorded.reason}"
        return replace(plan, settings=replace(settings, correction=correction))
    _, rewritten = rewrite_captured(captured, sites, targets, plan)
    fitted = fit_outputs(rewritten, recorded, settings.schedule, settings.order, on_step)
    corrected = replace(settings, output_weights=fitted, correction="fitted to the recorded runs")
    return replace(plan, settings=corrected)
