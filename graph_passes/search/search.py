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

from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.common.progress import Meter, OnProgress
from calicache.graph_passes.factors.statistics import Statistics
from calicache.graph_passes.recording.binding import Binding, bind
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.rewriting.workspace import Workspace
from calicache.graph_passes.search.allocate import MULTIPLE
from calicache.graph_passes.search.candidates import Explorer, Measured
from calicache.graph_passes.search.costs import Candidates
from calicache.graph_passes.search.families import find_families
from calicache.graph_passes.search.ground import (
    Ground,
    check_runs,
    prepare_ground,
    search_key,
    share_out,
)
from calicache.graph_passes.search.journal import Journal
from calicache.graph_passes.settings.choices import Weighting
from calicache.graph_passes.settings.front import ErrorSummary, Front, FrontPoint, pareto
from calicache.graph_passes.settings.latency import LatencyTable
from calicache.graph_passes.settings.recipe import Recipe
from calicache.graph_passes.settings.schedule import MAX_ORDER, uniform_schedule

FRONT_BUDGETS = (0.2, 0.35, 0.5)
APART = 0.06  # budgets nearer than this to the request are not measured beside it
CHOSEN_FROM, LEAST_TRIES = 2, 2
ALIKE = 1.05  # errors that differ less than by this factor
TRIED_RUNS = 1.5  # what candidates at the requested budget may take, in full runs
MOST_TRIES = 4
RUNS = 8.0  # what a search takes for every run to search with, in full runs, for a progress bar
LEAST_SAMPLES = 5  # fewer keep less than 95 % of new ones below the bound
INSIDE = 0.97  # of max_error, to aim at
DIVERGED = 1e6  # bounds above it count as this


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """What is asked for; see `Plan.search`."""

    budget: float | None
    max_error: float | None
    latency: LatencyTable | None
    effort: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    @property
    def text(self) -> str:
        """In words."""
        if self.budget is not None:
            return f"budget {self.budget:g}"
        return f"max_error {self.max_error:g}"


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a plan is made of: see `Plan`."""

    binding: Binding
    recipe: Recipe
    statistics: Mapping[str, Statistics]
    front: Front


def search_plan(
    model: nn.Module,
    recording: Recording,
    request: SearchRequest,
    workspace: Workspace,
    path: Path | str | None = None,
    on_progress: OnProgress | None = None,
) -> SearchResult:
    """Search; see `Plan.search`.

    Raises:
        CalicacheError: the request cannot be met, or a stage refuses; it names itself.
    """
    _check_request(request)
    binding = bind(model, recording)
    check_runs(recording, binding)
    _check_latency(request.latency, binding)
    journal = Journal.open(path, search_key(recording, binding, request))
    searched, _, _ = share_out(len(recording.runs) // recording.calls_per_step)
    calls = RUNS * len(searched) * recording.steps
    meter = Meter(calls * request.effort, on_progress)
    patterns = (request.include, request.exclude)
    ground = prepare_ground(model, recording, binding, patterns, workspace, journal, meter)
    families, known = find_families(ground, request.latency, request.budget, request.effort)
    least = min(family.least_share(ground.steps) for family in families)
    _check_least(request, least)
    _check_samples(request, ground.choice_samples)
    explorer = Explorer(ground, families)
    if request.budget is not None:
        chosen, others = _under_budget(explorer, request.budget, request.effort)
    else:
        assert request.max_error is not None
        chosen, others = _under_error(explorer, request.max_error, least, request.effort)
    meter.stage("report")
    held_out = ErrorSummary.of(explorer.errors(chosen, ground.report, "report"))
    points = [measured.point(explorer.summary(measured)) for measured in (chosen, *others)]
    return _result(ground, request, points[0], points[1:], held_out, known)


def _under_budget(
    explorer: Explorer, budget: float, effort: int
) -> tuple[Measured, list[Measured]]:
    """The best plan within the budget, and the others that were measured.

    Several candidates at the budget, and one at every other budget: cheap steps that cost less
    can also err less. The least budget comes first and tries every family, which tells cheaply
    how far the rehearsals of each can be trusted.
    """
    others = [other for other in FRONT_BUDGETS if abs(other - budget) > APART]
    found: list[Measured] = []
    for share in sorted([budget, *others]):
        explorer.ground.meter.stage(f"candidates at {share:g}")
        tries = 1 if found else len(explorer.families)
        if share == budget:
            tries = effort * max(LEAST_TRIES, round(TRIED_RUNS / budget))
        found += explorer.candidates(share, tries)[: CHOSEN_FROM if share == budget else 1]
    within = [measured for measured in found if measured.cost <= budget]
    chosen = _simplest(explorer, within)
    return chosen, [measured for measured in found if measured is not chosen]


def _simplest(explorer: Explorer, there: Sequence[Measured]) -> Measured:
    """The one with the fewest modes of those that err alike: every mode keeps caches of its own."""
    least = min(explorer.summary(measured).mean for measured in there)
    alike = [m for m in there if explorer.summary(m).mean <= ALIKE * least]
    return min(alike, key=lambda m: (len(set(m.schedule)), explorer.summary(m).mean, m.cost))


def _under_error(
    explorer: Explorer, max_error: float, least: float, effort: int
) -> tuple[Measured, list[Measured]]:
    """The cheapest plan whose error stays below, found between measured budgets."""
    points: list[Measured] = []
    for budget in [b for b in FRONT_BUDGETS if b > least] or [(least + 1.0) / 2]:
        explorer.ground.meter.stage(f"candidates at {budget:.3g}")
        points += explorer.candidates(budget, 1 if points else len(explorer.families))
        if any(explorer.summary(point).bound <= max_error for point in points):
            break
    for _ in range(MOST_TRIES * effort):
        between = _next_budget(explorer, points, max_error, least)
        if between is None:
            break
        explorer.ground.meter.stage(f"candidates at {between:.3g}")
        done = {p.schedule for p in points}
        fresh = [p for p in explorer.candidates(between, 1) if p.schedule not in done]
        if not fresh:
            break
        points += fresh
    within = [p for p in points if explorer.summary(p).bound <= max_error]
    if not within:
        best = min(explorer.summary(p).bound for p in points)
        raise PlanError(
            "max_error",
            expected=f"{_raised(best):.2g} or more, which the most accurate plan that was found "
            "keeps",
            got=f"{max_error:g}",
            fix="Allow a larger error, search with more effort, or run the model as it is.",
        )
    chosen = min(within, key=lambda p: p.cost)
    return chosen, [p for p in points if p is not chosen]


def _raised(value: float) -> float:
    """A number of two digits, at least the value."""
    if not math.isfinite(value):
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / unit) * unit


def _next_budget(
    explorer: Explorer, points: Sequence[Measured], max_error: float, least: float
) -> float | None:
    """Where the bound should meet the error, from the points on both sides; None if near enough."""
    known = [(p.cost, math.log(min(explorer.summary(p).bound, DIVERGED))) for p in points]
    wanted = math.log(max_error * INSIDE)
    above = [k for k in known if k[1] > math.log(max_error)]
    below = [k for k in known if k[1] <= math.log(max_error)]
    dear = max(above, default=(least, wanted + 1.0))
    cheap = min(below, default=(1.0, dear[1] - 2.0))
    if cheap[0] - dear[0] < 1.0 / explorer.ground.steps:  # less than a step between them
        return None
    share = (dear[1] - wanted) / (dear[1] - cheap[1]) if dear[1] > cheap[1] else 0.5
    return dear[0] + min(max(share, 0.15), 0.85) * (cheap[0] - dear[0])


def _result(
    ground: Ground,
    request: SearchRequest,
    chosen: FrontPoint,
    others: Sequence[FrontPoint],
    held_out: ErrorSummary,
    known: Candidates | None,
) -> SearchResult:
    """The chosen point's recipe, with the front and the statistics that its points need."""
    kept = [p for p in others if p.cost > chosen.cost or p.error.mean > chosen.error.mean]
    points = pareto([chosen, *kept])
    needed = {name for point in points for name, rank in point.ranks.items() if rank}
    moments = known.moments if known else {}
    front = Front(
        unit="MACs" if request.latency is None else request.latency.runtime,
        request=request.text,
        latent=ground.recorded.steps.latent,
        points=points,
        taken=points.index(chosen),
        held_out=held_out,
    )
    base = Recipe(
        schedule=uniform_schedule(ground.steps, 1),
        rank=MULTIPLE,
        order=MAX_ORDER,
        weighting=Weighting.COVARIANCE,
        include=request.include,
        exclude=request.exclude,
    )
    statistics = {name: value for name, value in moments.items() if name in needed}
    return SearchResult(ground.binding, front.recipe(front.taken, base), statistics, front)


def _check_request(request: SearchRequest) -> None:
    if (request.budget is None) == (request.max_error is None):
        raise PlanError(
            "search",
            expected="either a budget or a max_error",
            got="both" if request.budget is not None else "neither",
            fix="Give one of them.",
        )
    for name, value, below in (
        ("budget", request.budget, 1.0),
        ("max_error", request.max_error, math.inf),
    ):
        if value is not None and not 0 < value < below:
            expected = "a share above 0 and below 1" if below == 1.0 else "an error above 0"
            raise PlanError(name, expected=expected, got=f"{value:g}", fix="Choose such a number.")
    if request.effort < 1:
        raise PlanError(
            "effort", expected="1 or more", got=str(request.effort), fix="Raise the effort."
        )


def _check_latency(latency: LatencyTable | None, binding: Binding) -> None:
    if latency is not None and latency.weights_hash != binding.weights_hash:
        raise PlanError(
            "latency",
            expected=f"a table of this checkpoint ({binding.weights_hash[:12]})",
            got=f"of another ({latency.weights_hash[:12]})",
            fix="Measure this model.",
        )


def _check_samples(request: SearchRequest, samples: int) -> None:
    """Refuse an error that is to be kept by samples, where too few tell how they spread."""
    if request.max_error is not None and samples < LEAST_SAMPLES:
        raise PlanError(
            "recording",
            expected=f"{LEAST_SAMPLES} samples or more to choose with, for a max_error",
            got=str(samples),
            fix="Record more runs: a third of them is for choosing.",
        )


def _check_least(request: SearchRequest, least: float) -> None:
    """Refuse what even the cheapest plan, with a share of `least`, does not keep."""
    if request.budget is not None and request.budget < least:
        lowest = math.ceil(least * 1e4) / 1e4  # upwards: what is told can be asked for
        raise PlanError(
            "budget",
            expected=f"{lowest:.4f} or more: one REFRESH step, and the cheapest mode after it",
            got=f"{request.budget:g}",
            fix="Raise the budget, or sample with fewer steps.",
        )
    if least >= 1.0:
        raise PlanError(
            "latency",
            expected="steps of some mode that take less time than the plain model's",
            got=f"{least:.3f} of the full run's time for the fastest plan",
            fix="Run the model as it is, or measure again.",
        )
