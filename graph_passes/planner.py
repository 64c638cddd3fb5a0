"""From a recorded trajectory to a plan: the stages, in one visible list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from calicache.graph_passes.assign import Granularity, SiteRule, assign
from calicache.graph_passes.branches import SiteRejection
from calicache.graph_passes.capture import capture
from calicache.graph_passes.correct import fit_outputs
from calicache.graph_passes.decompose import Weighting
from calicache.graph_passes.dependence import classify_inputs, classify_nodes
from calicache.graph_passes.observe import observe
from calicache.graph_passes.pipeline import rewrite_captured
from calicache.graph_passes.plan import Plan, PlanSettings, hash_weights
from calicache.graph_passes.record import Trajectory
from calicache.graph_passes.schedule import StepMode
from calicache.graph_passes.sites import find_sites


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asks of a plan; see `Plan.from_trajectory`."""

    schedule: tuple[StepMode, ...]
    rank: int
    order: int
    weighting: Weighting
    granularity: Granularity
    rules: tuple[SiteRule, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    correct: bool


def make_plan(
    model: nn.Module,
    trajectory: Trajectory,
    wishes: Wishes,
    on_step: Callable[[int, int], None] | None = None,
) -> Plan:
    """Collect what the wishes need along a recorded trajectory; see `Plan.from_trajectory`."""
    settings = PlanSettings(
        schedule=wishes.schedule,
        rank=wishes.rank,
        order=wishes.order,
        weighting=wishes.weighting,
        granularity=wishes.granularity,
        rules=wishes.rules,
        include=wishes.include,
        exclude=wishes.exclude,
        signature=trajectory.signature,
        dependence=classify_inputs(trajectory),
        timestep=trajectory.timestep,
        weights_hash=hash_weights(model),
    )
    captured = capture(model, settings.signature)
    classes = classify_nodes(captured, settings.dependence)
    sites = find_sites(captured, classes, settings.include, settings.exclude)
    targets, _ = assign(
        captured,
        sites,
        rank=settings.rank,
        granularity=settings.granularity,
        rules=settings.rules,
        joint=settings.weighting is Weighting.COVARIANCE,
    )
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
    if not wishes.correct:
        return plan
    _, rewritten = rewrite_captured(captured, sites, targets, plan)
    fitted = fit_outputs(
        captured,
        rewritten,
        trajectory,
        settings.dependence,
        settings.schedule,
        settings.order,
        on_step,
    )
    if isinstance(fitted, SiteRejection):
        return replace(plan, settings=replace(settings, correction=f"not fitted: {fitted.reason}"))
    corrected = replace(settings, output_weights=fitted, correction="fitted to the recorded runs")
    return replace(plan, settings=corrected)
