"""From a recorded trajectory to a plan: the stages, in one visible list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from calicache.graph_passes.assign import CalibrationTarget
from calicache.graph_passes.batched import batch_calls, batch_size, one_call
from calicache.graph_passes.branches import SiteRejection
from calicache.graph_passes.capture import CapturedGraph
from calicache.graph_passes.decompose import Weighting
from calicache.graph_passes.dependence import Dependence
from calicache.graph_passes.errors import CaptureError, PlanError
from calicache.graph_passes.observe import observe
from calicache.graph_passes.pipeline import analyse, rewrite_captured
from calicache.graph_passes.plan import FITTED, Plan
from calicache.graph_passes.reads import digest
from calicache.graph_passes.record import Trajectory
from calicache.graph_passes.recover import recover_sampler
from calicache.graph_passes.replay import replay
from calicache.graph_passes.schedule import StepMode, Table
from calicache.graph_passes.settings import PlanSettings
from calicache.graph_passes.sites import Sites


def fixed_values(
    captured: CapturedGraph, trajectory: Trajectory, dependence: Mapping[str, Dependence]
) -> dict[str, tuple[str, ...]]:
    """Digests of the recorded values of the inputs that are built into the graph.

    Raises:
        CaptureError: one of them changes inside a run.
    """
    for name in captured.fixed:
        if dependence[name] > Dependence.RUN:
            raise CaptureError(
                name,
                expected="control flow and sizes that stay the same over a run",
                got=f"some that depend on {name}, which changes from step to step",
                fix="A graph cannot follow such a decision; compute both sides, or mask.",
            )
    firsts = [run[0] for run in trajectory.runs]
    return {
        name: tuple(dict.fromkeys(digest(call[name]) for call in firsts)) for name in captured.fixed
    }


def make_plan(
    model: nn.Module,
    trajectory: Trajectory,
    settings: PlanSettings,
    *,
    correct: bool,
    on_step: Callable[[int, int], None] | None = None,
) -> Plan:
    """Collect what the settings need along a recorded trajectory; see `Plan.from_trajectory`."""
    _check_weights_are_there(model, settings, correct=correct)
    captured, sites, targets = analyse(model, settings)
    settings = replace(settings, fixed=fixed_values(captured, trajectory, settings.dependence))
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
    fitted = _fit(model, trajectory, plan, (captured, sites, targets), on_step)
    if isinstance(fitted, SiteRejection):
        correction = f"not fitted: {fitted.reason}"
        return replace(plan, settings=replace(settings, correction=correction))
    weights, latent = fitted
    corrected = replace(settings, output_weights=weights, latent=latent, correction=FITTED)
    return replace(plan, settings=corrected)


def _fit(
    model: nn.Module,
    trajectory: Trajectory,
    plan: Plan,
    analysed: tuple[CapturedGraph, Sites, tuple[CalibrationTarget, ...]],
    on_step: Callable[[int, int], None] | None,
) -> tuple[Table, str] | SiteRejection:
    """Output weights and the latent's name, fitted with the calls of a step in one batch."""
    settings, calls = plan.settings, trajectory.calls_per_step
    if calls > 1:
        batch = batch_size(settings.signature, settings.dependence)
        whole = batch_calls(trajectory, batch)
        if isinstance(whole, SiteRejection):
            return whole
        trajectory = whole
        settings = replace(
            settings, signature=whole.signature, timestep=one_call(settings.timestep)
        )
        analysed = analyse(model, settings)
    captured, sites, targets = analysed
    recorded = recover_sampler(
        captured, trajectory, settings.dependence, len(settings.schedule), on_step
    )
    if isinstance(recorded, SiteRejection):
        return recorded
    _, rewritten = rewrite_captured(captured, sites, targets, replace(plan, settings=settings))
    made = replay(rewritten, recorded, settings.schedule, settings.order, on_step=on_step)
    return made.weights, recorded.steps.latent


def _check_weights_are_there(model: nn.Module, settings: PlanSettings, *, correct: bool) -> None:
    needed = correct or settings.weighting is not Weighting.NONE
    if needed and any(parameter.is_meta for parameter in model.parameters()):
        raise PlanError(
            "model",
            expected="weights, to run the recorded calls with",
            got="a model on the meta device",
            fix="Load the weights, or plan for costs alone: weighting='none', correct=False.",
        )
