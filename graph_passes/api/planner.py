"""From a recording to a recipe with its statistics: the stages, in one visible list."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

from torch import nn

from calicache.graph_passes.api.plan_file import PlanContent
from calicache.graph_passes.common.errors import (
    CalicacheWarning,
    CaptureError,
    NoSampler,
    PlanError,
)
from calicache.graph_passes.common.progress import Meter, OnProgress
from calicache.graph_passes.common.ranks import ALONE, Ranks
from calicache.graph_passes.common.shards import check_split
from calicache.graph_passes.factors.observe import observe
from calicache.graph_passes.factors.spread import over_all_tokens, with_whole_values
from calicache.graph_passes.factors.statistics import Statistics
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.recording.binding import bind
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.reads import DIFFERENT
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.rewriting.compile import assign_targets, compile_recipe
from calicache.graph_passes.rewriting.workspace import PlanningTask, Workspace
from calicache.graph_passes.sampler.recover import RecordedSampler, recover_sampler
from calicache.graph_passes.sampler.reference import aim_at, fitted_to
from calicache.graph_passes.sampler.replay import plain_weights, replay
from calicache.graph_passes.sampler.tables import SamplerTables, recover_tables
from calicache.graph_passes.search.search import search_plan
from calicache.graph_passes.settings.choices import Weighting
from calicache.graph_passes.settings.front import ErrorSummary
from calicache.graph_passes.settings.recipe import NOT_FITTED, Recipe
from calicache.graph_passes.settings.request import SearchRequest
from calicache.graph_passes.sites.analysis import analyse_whole

OTHER_READS = (
    "The model reads other values in the other calls of a step, such as lengths of masks: the plan "
    "is made from the first call of every step. The optimised model captures the others when they "
    "come, with the same factors; the sampler's update cannot be told from the first ones alone."
)
LOAD = "Load the weights, or plan for costs alone: weighting='none', correct=False."


def planned(
    model: nn.Module,
    recording: Recording,
    recipe: Recipe,
    workspace: Workspace,
    on_progress: OnProgress | None,
    *,
    correct: bool,
    measured: bool = False,
    ranks: Ranks = ALONE,
    reference: Recording | None = None,
) -> PlanContent:
    """Statistics for a recipe, and its output weights.

    Where no one graph is for all calls of a step, as of two texts with masks of their own, the plan
    is made from the first of them, with a warning.

    Args:
        model: in eval mode; the one that was recorded.
        recording: at least one whole run.
        recipe: what is chosen, without what is fitted.
        workspace: for what is made of the model on the way.
        on_progress: told how many calls of the model were run.
        correct: fit output weights along the corrected trajectory, which measures the error too.
        measured: measure it without a fit as well.
        ranks: the processes that share the recorded runs.
        reference: the same runs in more steps, which the weights aim at.

    Raises:
        CalicacheError: whatever stage refuses names itself.
    """
    check_split(model, ranks, searches=False)
    if reference is not None and not (correct or measured):
        raise PlanError(
            "reference",
            expected="none where no weights are fitted",
            got="one, with correct=False",
            fix="Leave one of the two out.",
        )
    run = correct or measured
    meter = Meter(planned_calls(recording, correct=run) / ranks.size, on_progress)
    binding = bind(model, recording)
    task = PlanningTask(model, recording, binding, workspace, meter, ranks, reference)
    task.check_alike(recipe)
    try:
        statistics = collect_statistics(task, recipe)
    except CaptureError:
        first = _first_calls(task)
        if first is None:
            raise
        warnings.warn(OTHER_READS, CalicacheWarning, stacklevel=3)
        task = first
        statistics = collect_statistics(task, recipe)
    content = PlanContent(task.binding, recipe, statistics)
    return fit_to_sampler(task, content, fits=correct) if run else content


def _first_calls(task: PlanningTask) -> PlanningTask | None:
    """The same with the first call of every step alone, where the others read other values.

    Two texts that are padded to one length have masks of their own: a graph is made for one.

    Returns:
        None where that is not what tells the calls apart.
    """
    first = task.recording.first_calls()
    if first is task.recording or task.binding.reads != DIFFERENT:
        return None
    binding = bind(task.model, first)
    if binding.reads == DIFFERENT:
        return None
    reference = None if task.reference is None else task.reference.first_calls()
    return replace(task, recording=first, binding=binding, reference=reference)


def rebound(
    model: nn.Module,
    recording: Recording,
    recipe: Recipe,
    workspace: Workspace,
    on_progress: OnProgress | None,
    ranks: Ranks = ALONE,
    reference: Recording | None = None,
) -> PlanContent:
    """A recipe for other weights: its statistics and output weights anew, and its error.

    Output weights are fitted where the recipe has some.

    Args:
        model: in eval mode; the one that was recorded.
        recording: at least one whole run.
        recipe: of a plan for other weights.
        workspace: for what is made of the model on the way.
        on_progress: told how many calls of the model were run.
        ranks: the processes that share the recorded runs.
        reference: the same runs in more steps, which the weights aim at.

    Raises:
        CalicacheError: whatever stage refuses names itself.
    """
    fits = recipe.output_weights is not None
    plain = replace(recipe, output_weights=None, latent=None, correction=NOT_FITTED)
    return planned(
        model,
        recording,
        plain,
        workspace,
        on_progress,
        correct=fits,
        measured=True,
        ranks=ranks,
        reference=reference,
    )


def searched(
    model: nn.Module,
    recording: Recording,
    request: SearchRequest,
    workspace: Workspace,
    path: Path | str | None,
    on_progress: OnProgress | None,
    ranks: Ranks = ALONE,
    reference: Recording | None = None,
) -> PlanContent:
    """What a search comes to; see `Plan.search`.

    Raises:
        CalicacheError: the request cannot be met, or a stage refuses; it names itself.
    """
    check_split(model, ranks, searches=not request.touches_nothing)
    result = search_plan(model, recording, request, workspace, path, on_progress, ranks, reference)
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
    captured, targets = with_whole_values(
        analysis.captured, assignment.targets if recipe.calibrates else ()
    )
    own = observe(
        captured,
        targets,
        task.recording,
        recipe.weighting,
        recipe.schedule,
        recipe.order,
        task.meter,
        task.ranks,
    )
    return over_all_tokens(captured, targets, own)


def fit_to_sampler(task: PlanningTask, content: PlanContent, *, fits: bool) -> PlanContent:
    """A plan replayed along the recorded runs, with the calls of a step in one batch.

    Args:
        task: the model and its recording.
        content: of the plan, whose recipe has no output weights yet.
        fits: fit output weights on the way.

    Returns:
        The plan with its error on these runs, the sampler's tables, and the weights if they are
        asked for; where the sampler's update is not known it says why there are none.

    Raises:
        CalicacheError: whatever stage refuses names itself.
    """
    task.check_weights(LOAD)
    recipe, calls = content.recipe, task.binding.calls
    try:
        whole, form = task.recording.by_step(), task.binding.by_step()
        if recipe.touches_nothing:
            analysis = analyse_whole(task.model, form, whole.calls[0])
        else:
            analysis = task.workspace.analysis(task.model, form, recipe.include, recipe.exclude)
        length = len(recipe.schedule)
        recorded = _recorded_sampler(task, analysis.captured, whole, form.dependence, length)
        aimed = recorded
        if task.reference is not None:
            aimed = aim_at(recorded, whole, task.reference.by_step())
    except NoSampler as unknown:
        if fits:
            recipe = replace(recipe, correction=f"not fitted: {unknown.reason}")
        return replace(content, recipe=recipe, no_sampler=unknown.reason)
    compiled = compile_recipe(analysis, recipe, content.statistics, task.workspace.decompositions)
    task.meter.stage("fit output weights" if fits else "measure the error", calls)
    weights = None if fits else plain_weights(recipe.schedule, recipe.order)
    steps = recipe.schedule, recipe.order
    fit = replay(compiled.variant_set, aimed, *steps, weights, task.meter, task.ranks)
    if fits:
        latent = recorded.steps.latent
        fitted = fitted_to(aimed.reference)
        recipe = replace(recipe, output_weights=fit.weights, latent=latent, correction=fitted)
    sampler, reason = _tables(recorded, form.dependence)
    return replace(
        content,
        recipe=recipe,
        sampler=sampler,
        no_sampler=reason,
        in_sample=ErrorSummary.of(fit.errors),
    )


def _tables(
    recorded: RecordedSampler, dependence: Mapping[str, Dependence]
) -> tuple[SamplerTables | None, str]:
    """The sampler's tables, or why there are none."""
    try:
        return recover_tables(recorded, dependence), ""
    except NoSampler as unknown:
        return None, unknown.reason


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
        lambda: recover_sampler(captured, whole, dependence, length, meter, task.ranks),
    )
    if meter.done == before:  # an earlier plan has run them
        meter.add(sum(map(len, task.ranks.share(recorded.runs))))
    return recorded
