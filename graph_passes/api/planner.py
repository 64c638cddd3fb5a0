"""From a recording to a recipe with its statistics: the stages, in one visible list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

from torch import nn

from calicache.graph_passes.api.plan_file import PlanContent
from calicache.graph_passes.common.errors import NoSampler
from calicache.graph_passes.common.progress import Meter, OnProgress
from calicache.graph_passes.factors.observe import observe
from calicache.graph_passes.factors.statistics import Statistics
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.recording.binding import bind
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.rewriting.compile import assign_targets, compile_recipe
from calicache.graph_passes.rewriting.workspace import PlanningTask, Workspace
from calicache.graph_passes.sampler.recover import RecordedSampler, recover_sampler
from calicache.graph_passes.sampler.replay import replay
from calicache.graph_passes.sampler.tables import SamplerTables, recover_tables
from calicache.graph_passes.search.search import search_plan
from calicache.graph_passes.settings.choices import Weighting
from calicache.graph_passes.settings.recipe import FITTED, Recipe
from calicache.graph_passes.settings.request import SearchRequest
from calicache.graph_passes.sites.analysis import analyse_whole

LOAD = "Load the weights, or plan for costs alone: weighting='none', correct=False."


def planned(
    model: nn.Module,
    recording: Recording,
    recipe: Recipe,
    workspace: Workspace,
    on_progress: OnProgress | None,
    *,
    correct: bool,
) -> PlanContent:
    """Statistics for a recipe, and its output weights.

    Args:
        model: in eval mode; the one that was recorded.
        recording: at least one whole run.
        recipe: what is chosen, without what is fitted.
        workspace: for what is made of the model on the way.
        on_progress: told how many calls of the model were run.
        correct: fit output weights along the corrected trajectory.

    Raises:
        CalicacheError: whatever stage refuses names itself.
    """
    binding = bind(model, recording)
    meter = Meter(planned_calls(recording, correct=correct), on_progress)
    task = PlanningTask(model, recording, binding, workspace, meter)
    statistics = collect_statistics(task, recipe)
    if not correct:
        return PlanContent(binding, recipe, statistics)
    recipe, sampler, reason = fit_to_sampler(task, recipe, statistics)
    return PlanContent(binding, recipe, statistics, sampler, reason)


def searched(
    model: nn.Module,
    recording: Recording,
    request: SearchRequest,
    workspace: Workspace,
    path: Path | str | None,
    on_progress: OnProgress | None,
) -> PlanContent:
    """What a search comes to; see `Plan.search`.

    Raises:
        CalicacheError: the request cannot be met, or a stage refuses; it names itself.
    """
    result = search_plan(model, recording, request, workspace, path, on_progress)
    return PlanContent(**{field.name: getattr(result, field.name) for field in fields(result)})


def planned_calls(recording: Recording, *, correct: bool) -> float:
    """Calls of the model that planning takes, for a progress bar."""
    passes = 3 if correct else 1  # observed; run plainly; replayed
    return float(passes * len(recording.calls))


def collect_statistics(task: PlanningTask, recipe: Recipe) -> Mapping[str, Statistics]:
    """What the factors of a recipe are made from, seen along the recorded runs.

    Raises:
        CalicacheError: whatever stage refuses names itself.
    """
    if recipe.weighting is not Weighting.NONE:
        task.check_weights(LOAD)
    if recipe.touches_nothing:
        return {}
    task.meter.stage("capture the model")
    analysis = task.workspace.analysis(task.model, task.binding, recipe.include, recipe.exclude)
    assignment = assign_targets(analysis, recipe)
    task.meter.stage("observe increments")
    return observe(
        analysis.captured,
        assignment.targets if recipe.calibrates else (),
        task.recording,
        recipe.weighting,
        recipe.schedule,
        recipe.order,
        task.meter,
    )


def fit_to_sampler(
    task: PlanningTask, recipe: Recipe, statistics: Mapping[str, Statistics]
) -> tuple[Recipe, SamplerTables | None, str]:
    """The recipe with output weights, fitted with the calls of a step in one batch.

    Returns:
        The recipe, which says why where its weights are not fitted; the sampler's tables, and
        why there are none.

    Raises:
        CalicacheError: whatever stage refuses names itself.
    """
    task.check_weights(LOAD)
    calls = task.binding.calls
    try:
        whole, form = task.recording.by_step(), task.binding.by_step()
        if recipe.touches_nothing:
            analysis = analyse_whole(task.model, form, whole.calls[0])
        else:
            analysis = task.workspace.analysis(task.model, form, recipe.include, recipe.exclude)
        length = len(recipe.schedule)
        recorded = _recorded_sampler(task, analysis.captured, whole, form.dependence, length)
    except NoSampler as unknown:
        return replace(recipe, correction=f"not fitted: {unknown.reason}"), None, unknown.reason
    compiled = compile_recipe(analysis, recipe, statistics, task.workspace.decompositions)
    task.meter.stage("fit output weights", calls)
    fit = replay(compiled.variant_set, recorded, recipe.schedule, recipe.order, meter=task.meter)
    fitted = replace(
        recipe, output_weights=fit.weights, latent=recorded.steps.latent, correction=FITTED
    )
    try:
        return fitted, recover_tables(recorded, form.dependence), ""
    except NoSampler as unknown:
        return fitted, None, unknown.reason


def _recorded_sampler(
    task: PlanningTask,
    captured: CapturedGraph,
    whole: Recording,
    dependence: Mapping[str, Dependence],
    length: int,
) -> RecordedSampler:
    """The plain model along the recorded runs; run once for all plans of one workspace.

    Raises:
        NoSampler: the sampler's update cannot be told from the recording.
    """
    meter = task.meter
    meter.stage("run the recorded calls", task.binding.calls)
    before = meter.done
    recorded = task.workspace.seen(
        task.model,
        task.recording,
        ("sampler", length, task.binding.weights_hash),
        lambda: recover_sampler(captured, whole, dependence, length, meter),
    )
    if meter.done == before:  # an earlier plan has run them
        meter.add(sum(map(len, recorded.runs)))
    return recorded
