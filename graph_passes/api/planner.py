"""From a recorded recording to a plan: the stages, in one visible list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from calicache.graph_passes.api.optimize import rewrite_captured
from calicache.graph_passes.api.plan import FITTED, Plan
from calicache.graph_passes.common.errors import NoSampler, PlanError
from calicache.graph_passes.factors.observe import observe
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.step_calls import batch_calls, batch_size, one_call
from calicache.graph_passes.sampler.recover import recover_sampler
from calicache.graph_passes.sampler.replay import replay
from calicache.graph_passes.settings.choices import StepMode, Weighting
from calicache.graph_passes.settings.recipe import PlanSettings
from calicache.graph_passes.settings.schedule import Table
from calicache.graph_passes.sites.analysis import analyse, fixed_values
from calicache.graph_passes.sites.sites import Sites
from calicache.graph_passes.sites.targets import CalibrationTarget


def make_plan(
    model: nn.Module,
    recording: Recording,
    settings: PlanSettings,
    *,
    correct: bool,
    on_step: Callable[[int, int], None] | None = None,
) -> Plan:
    """Collect what the settings need along a recorded recording; see `Plan.from_trajectory`."""
    _check_weights_are_there(model, settings, correct=correct)
    captured, sites, targets = analyse(model, settings)
    settings = replace(settings, fixed=fixed_values(captured, recording, settings.dependence))
    calibrated = targets if StepMode.CALIBRATE in settings.schedule else ()
    statistics = observe(
        captured,
        calibrated,
        recording,
        settings.weighting,
        settings.schedule,
        settings.order,
        on_step,
    )
    plan = Plan(settings, statistics)
    if not correct:
        return plan
    try:
        weights, latent = _fit(model, recording, plan, (captured, sites, targets), on_step)
    except NoSampler as refusal:
        correction = f"not fitted: {refusal.got}"
        return replace(plan, settings=replace(settings, correction=correction))
    corrected = replace(settings, output_weights=weights, latent=latent, correction=FITTED)
    return replace(plan, settings=corrected)


def _fit(
    model: nn.Module,
    recording: Recording,
    plan: Plan,
    analysed: tuple[CapturedGraph, Sites, tuple[CalibrationTarget, ...]],
    on_step: Callable[[int, int], None] | None,
) -> tuple[Table, str]:
    """Output weights and the latent's name, fitted with the calls of a step in one batch."""
    settings, calls = plan.settings, recording.calls_per_step
    if calls > 1:
        batch = batch_size(settings.signature, settings.dependence)
        whole = batch_calls(recording, batch)
        recording = whole
        settings = replace(
            settings, signature=whole.signature, timestep=one_call(settings.timestep)
        )
        analysed = analyse(model, settings)
    captured, sites, targets = analysed
    recorded = recover_sampler(
        captured, recording, settings.dependence, len(settings.schedule), on_step
    )
    _, variant_set = rewrite_captured(captured, sites, targets, replace(plan, settings=settings))
    made = replay(variant_set, recorded, settings.schedule, settings.order, on_step=on_step)
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
