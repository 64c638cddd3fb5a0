"""From a recording to a recipe with its statistics: the stages, in one visible list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from calicache.graph_passes.common.errors import NoSampler, PlanError
from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.factors.observe import observe
from calicache.graph_passes.factors.statistics import Statistics
from calicache.graph_passes.recording.binding import Binding
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.rewriting.compile import assign_targets, compile_recipe
from calicache.graph_passes.rewriting.workspace import Workspace
from calicache.graph_passes.sampler.recover import recover_sampler
from calicache.graph_passes.sampler.replay import replay
from calicache.graph_passes.settings.choices import Weighting
from calicache.graph_passes.settings.recipe import FITTED, Recipe


def planned_calls(recording: Recording, *, correct: bool) -> float:
    """Calls of the model that planning takes, for a progress bar."""
    passes = 3 if correct else 1  # observed; run plainly; replayed
    return float(passes * len(recording.calls))


def collect_statistics(
    model: nn.Module,
    recording: Recording,
    binding: Binding,
    recipe: Recipe,
    workspace: Workspace,
    meter: Meter,
) -> Mapping[str, Statistics]:
    """What the factors of a recipe are made from, seen along the recorded runs.

    Raises:
        CalicacheError: whatever stage refuses names itself.
    """
    check_weights_are_loaded(model, needed=recipe.weighting is not Weighting.NONE)
    meter.stage("capture the model")
    analysis = workspace.analysis(model, binding, recipe.include, recipe.exclude)
    assignment = assign_targets(analysis, recipe)
    meter.stage("observe increments")
    return observe(
        analysis.captured,
        assignment.targets if recipe.calibrates else (),
        recording,
        recipe.weighting,
        recipe.schedule,
        recipe.order,
        lambda *_: meter.add(),
    )


def fit_output_weights(
    model: nn.Module,
    recording: Recording,
    binding: Binding,
    recipe: Recipe,
    statistics: Mapping[str, Statistics],
    workspace: Workspace,
    meter: Meter,
) -> Recipe:
    """The recipe with output weights, fitted with the calls of a step in one batch.

    Where the sampler's update cannot be told from the recording, the recipe says why.

    Raises:
        CalicacheError: whatever stage refuses names itself.
    """
    check_weights_are_loaded(model, needed=True)
    try:
        whole = recording.by_step()
        analysis = workspace.analysis(model, binding.by_step(), recipe.include, recipe.exclude)
        meter.stage("run the recorded calls")
        recorded = recover_sampler(
            analysis.captured,
            whole,
            binding.dependence,
            len(recipe.schedule),
            lambda *_: meter.add(binding.calls),
        )
    except NoSampler as unknown:
        return replace(recipe, correction=f"not fitted: {unknown.reason}")
    compiled = compile_recipe(analysis, recipe, statistics, workspace.decompositions)
    meter.stage("fit output weights")
    fit = replay(
        compiled.variant_set,
        recorded,
        recipe.schedule,
        recipe.order,
        on_step=lambda *_: meter.add(binding.calls * len(recorded.runs)),
    )
    return replace(
        recipe, output_weights=fit.weights, latent=recorded.steps.latent, correction=FITTED
    )


def check_weights_are_loaded(model: nn.Module, *, needed: bool) -> None:
    """Refuse a model on the meta device where the recorded calls have to be run.

    Raises:
        PlanError: there are no weights.
    """
    if needed and any(parameter.is_meta for parameter in model.parameters()):
        raise PlanError(
            "model",
            expected="weights, to run the recorded calls with",
            got="a model on the meta device",
            fix="Load the weights, or plan for costs alone: weighting='none', correct=False.",
        )
