"""Plan.search: ranks, modes and schedule under a budget or an error, measured on recorded runs.

Cheap rehearsals propose (`rehearse`, `placement`), replays of the cached sampler on the runs for
searching decide, replays on other runs choose and report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from calicache.graph_passes.common.errors import NoSampler, PlanError
from calicache.graph_passes.common.progress import Meter, OnProgress
from calicache.graph_passes.common.ranks import ALONE, Ranks
from calicache.graph_passes.factors.statistics import Statistics
from calicache.graph_passes.recording.binding import Binding, bind
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.rewriting.workspace import PlanningTask, Workspace
from calicache.graph_passes.sampler.reference import fitted_to
from calicache.graph_passes.sampler.tables import SamplerTables, recover_tables
from calicache.graph_passes.search.allocate import MULTIPLE
from calicache.graph_passes.search.candidates import (
    REPORT,
    Candidate,
    SearchState,
    begin,
    find_candidates,
    sample_errors,
    summarise,
)
from calicache.graph_passes.search.families import Family, find_families
from calicache.graph_passes.search.ground import (
    Ground,
    check_budget,
    check_latency,
    check_least,
    check_runs,
    check_samples,
    prepare_ground,
    share_out,
)
from calicache.graph_passes.search.journal import Journal
from calicache.graph_passes.settings.choices import Weighting
from calicache.graph_passes.settings.front import ErrorSummary, Front, FrontPoint, pareto
from calicache.graph_passes.settings.recipe import Recipe
from calicache.graph_passes.settings.request import SearchRequest
from calicache.graph_passes.settings.schedule import MAX_ORDER, uniform_schedule

FRONT_BUDGETS = (0.2, 0.35, 0.5)
APART = 0.06  # budgets nearer than this to the request are not measured beside it
CHOSEN_FROM, LEAST_TRIES = 2, 2
ALIKE = 1.05  # errors that differ less than by this factor
TRIED_RUNS = 1.5  # what candidates at the requested budget may take, in full runs
MOST_TRIES = 4
RUNS = 8.0  # what a search takes for every run to search with, in full runs, for a progress bar
INSIDE = 0.97  # of max_error, to aim at
DIVERGED = 1e6  # bounds above it count as this


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a plan is made of: see `Plan`."""

    binding: Binding
    recipe: Recipe
    statistics: Mapping[str, Statistics]
    sampler: SamplerTables | None
    no_sampler: str
    front: Front


def search_plan(
    model: nn.Module,
    recording: Recording,
    request: SearchRequest,
    workspace: Workspace,
    path: Path | str | None = None,
    on_progress: OnProgress | None = None,
    ranks: Ranks = ALONE,
    reference: Recording | None = None,
) -> SearchResult:
    """Search; see `Plan.search`.

    Raises:
        CalicacheError: the request cannot be met, or a stage refuses; it names itself.
    """
    check_budget(request, recording.steps)
    binding = bind(model, recording)
    check_runs(recording, binding)
    check_latency(request.latency, binding)
    searched, _, _ = share_out(len(recording.runs) // recording.calls_per_step)
    calls = RUNS * len(searched) * recording.steps / ranks.size
    meter = Meter(calls * request.effort, on_progress)
    task = PlanningTask(model, recording, binding, workspace, meter, ranks, reference)
    task.check_alike(request)
    journal = Journal.open(path, task.key(request), ranks)
    ground = prepare_ground(task, request, journal)
    families, survey = find_families(ground, request)
    least = min(family.least_share(ground.steps) for family in families)
    check_least(request, least)
    check_samples(request, ground.choice_samples)
    choice, others, state = _explore(ground, families, request, least)
    meter.stage("report")
    held_out = ErrorSummary.of(sample_errors(ground, choice, ground.report, REPORT))
    points = [candidate.point(state.summary(candidate)) for candidate in (choice, *others)]
    front = _front(ground, request, points, held_out)
    return _result(ground, request, front, survey.moments if survey else {})


def _explore(
    ground: Ground, families: Sequence[Family], request: SearchRequest, least: float
) -> tuple[Candidate, list[Candidate], SearchState]:
    """The candidate that is chosen, the others, and all that is known at the end.

    Args:
        ground: model and runs.
        families: from `find_families`.
        request: what is asked for.
        least: share of the full run that the cheapest plan costs.
    """
    state = begin(ground, families)
    if request.budget is not None:
        candidates, state = _explore_budget(ground, families, state, request.budget, request.effort)
        # MACs do not count caches: there a dearer plan with fewer modes may be the better one.
        within = candidates if request.latency is None else undominated(state, candidates)
        choice = _best_within(state, within, request.budget)
    else:
        assert request.max_error is not None
        goal = (request.max_error, least, request.effort)
        candidates, state = _explore_error(ground, families, state, *goal)
        choice = _cheapest_within(state, candidates, request.max_error)
    return choice, [candidate for candidate in candidates if candidate is not choice], state


def _explore_budget(
    ground: Ground, families: Sequence[Family], state: SearchState, budget: float, effort: int
) -> tuple[list[Candidate], SearchState]:
    """Several candidates at the budget, and one at every other budget.

    Cheap steps that cost less can also err less. The least budget comes first and tries every
    family, which tells cheaply how far the rehearsals of each can be trusted.
    """
    others = [other for other in FRONT_BUDGETS if abs(other - budget) > APART]
    candidates: list[Candidate] = []
    for share in sorted([budget, *others]):
        ground.meter.stage(f"candidates at {share:g}")
        tries = 1 if candidates else len(families)
        if share == budget:
            tries = effort * max(LEAST_TRIES, round(TRIED_RUNS / budget))
        ranked, state = find_candidates(ground, families, state, share, tries)
        candidates += ranked[: CHOSEN_FROM if share == budget else 1]
    return candidates, summarise(ground, state, candidates)


def undominated(state: SearchState, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that none beside them is as good as in cost and error, and better in one."""
    places = [(c.cost, state.summary(c).mean) for c in candidates]
    return [
        candidate
        for candidate, own in zip(candidates, places, strict=True)
        if not any(o != own and o[0] <= own[0] and o[1] <= own[1] for o in places)
    ]


def _best_within(state: SearchState, candidates: Sequence[Candidate], budget: float) -> Candidate:
    """The one with the fewest modes of those that err alike: every mode keeps caches of its own."""
    within = [candidate for candidate in candidates if candidate.cost <= budget]
    means = {candidate.key: state.summary(candidate).mean for candidate in within}
    most = ALIKE * min(means.values())
    alike = [candidate for candidate in within if means[candidate.key] <= most]
    return min(alike, key=lambda c: (len(set(c.schedule)), means[c.key], c.cost))


def _explore_error(
    ground: Ground,
    families: Sequence[Family],
    state: SearchState,
    max_error: float,
    least: float,
    effort: int,
) -> tuple[list[Candidate], SearchState]:
    """Candidates at usual budgets until one keeps the error, then at budgets between them."""
    candidates: list[Candidate] = []
    for budget in [b for b in FRONT_BUDGETS if b > least] or [(least + 1.0) / 2]:
        ground.meter.stage(f"candidates at {budget:.3g}")
        tries = 1 if candidates else len(families)
        ranked, state = find_candidates(ground, families, state, budget, tries)
        candidates += ranked
        state = summarise(ground, state, ranked)
        if any(state.summary(candidate).bound <= max_error for candidate in candidates):
            break
    for _ in range(MOST_TRIES * effort):
        bounds = [(c.cost, state.summary(c).bound) for c in candidates]
        between = next_budget(bounds, max_error, least, 1.0 / ground.steps)
        if between is None:
            break
        ground.meter.stage(f"candidates at {between:.3g}")
        ranked, state = find_candidates(ground, families, state, between, 1)
        schedules = {candidate.schedule for candidate in candidates}
        additions = [candidate for candidate in ranked if candidate.schedule not in schedules]
        if not additions:
            break
        candidates += additions
        state = summarise(ground, state, additions)
    return candidates, state


def _cheapest_within(
    state: SearchState, candidates: Sequence[Candidate], max_error: float
) -> Candidate:
    within = [c for c in candidates if state.summary(c).bound <= max_error]
    if not within:
        best = min(state.summary(c).bound for c in candidates)
        raise PlanError(
            "max_error",
            expected=f"{_raised(best):.2g} or more, which the most accurate plan that was found "
            "keeps",
            got=f"{max_error:g}",
            fix="Allow a larger error, search with more effort, or run the model as it is.",
        )
    return min(within, key=lambda c: (c.cost, state.summary(c).mean))


def _raised(value: float) -> float:
    """A number of two digits, at least the value."""
    if not math.isfinite(value):
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / unit) * unit


def next_budget(
    bounds: Sequence[tuple[float, float]], max_error: float, least: float, step: float
) -> float | None:
    """Where the bound of the error should meet the wish, from the candidates on both sides.

    Args:
        bounds: cost and bound of every candidate.
        max_error: the wish.
        least: share of the full run that the cheapest plan costs.
        step: share of one step; nearer sides have no budget between them.

    Returns:
        A budget, or None where the two sides are near enough.
    """
    limit, aim = math.log(max_error), math.log(max_error * INSIDE)
    places = [(cost, math.log(min(bound, DIVERGED))) for cost, bound in bounds]
    low_cost, high_bound = max((p for p in places if p[1] > limit), default=(least, aim + 1.0))
    default = (1.0, high_bound - 2.0)
    high_cost, low_bound = min((p for p in places if p[1] <= limit), default=default)
    if high_cost - low_cost < step:
        return None
    fall = high_bound - low_bound
    share = (high_bound - aim) / fall if fall > 0 else 0.5
    return low_cost + min(max(share, 0.15), 0.85) * (high_cost - low_cost)


def _front(
    ground: Ground,
    request: SearchRequest,
    points: Sequence[FrontPoint],
    held_out: ErrorSummary,
) -> Front:
    """The chosen point, which comes first, and the others that it does not beat."""
    choice, *others = points
    beside = [p for p in others if p.cost > choice.cost or p.error.mean > choice.error.mean]
    front = pareto([choice, *beside])
    return Front(
        unit="MACs" if request.latency is None else request.latency.runtime,
        request=request.text,
        latent=ground.recorded.steps.latent,
        points=front,
        choice=front.index(choice),
        held_out=held_out,
    )


def _result(
    ground: Ground, request: SearchRequest, front: Front, moments: Mapping[str, Statistics]
) -> SearchResult:
    """The chosen point's recipe, and the statistics that all points of the front need."""
    calibrated = {name for point in front.points for name, rank in point.ranks.items() if rank}
    base = Recipe(
        schedule=uniform_schedule(ground.steps, 1),
        rank=MULTIPLE,
        order=MAX_ORDER,
        weighting=Weighting.COVARIANCE,
        include=request.include,
        exclude=request.exclude,
        correction=fitted_to(ground.recorded.reference),
    )
    statistics = {name: value for name, value in moments.items() if name in calibrated}
    sampler, reason = _sampler_tables(ground)
    recipe = front.recipe(front.choice, base)
    return SearchResult(ground.binding, recipe, statistics, sampler, reason, front)


def _sampler_tables(ground: Ground) -> tuple[SamplerTables | None, str]:
    """The sampler of the runs that were searched with, and why there is none."""
    try:
        return recover_tables(ground.sampled, ground.binding.dependence), ""
    except NoSampler as unknown:
        return None, unknown.reason
