"""The stages of planning and of a search, each with its time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calicache.graph_passes.api.scale.memory import (
    FLOAT32,
    decomposing_bytes,
    factor_bytes,
    fits_held,
    held_bytes,
    live_bytes,
    moment_numbers,
    node_bytes,
    observing_bytes,
)
from calicache.graph_passes.api.scale.work import (
    HASHED,
    decompose_macs,
    increment_macs,
    moment_macs,
)
from calicache.graph_passes.rewriting.compile import Compiled
from calicache.graph_passes.search.families import (
    CHEAP_WORK,
    PROBES,
    USUAL_LEVEL,
    probe_schedule,
)
from calicache.graph_passes.search.ground import share_out
from calicache.graph_passes.search.search import (
    APART,
    CHOSEN_FROM,
    FRONT_BUDGETS,
    LEAST_TRIES,
    TRIED_RUNS,
)
from calicache.graph_passes.settings.choices import StepMode, Weighting
from calicache.graph_passes.settings.schedule import MAX_ORDER
from calicache.graph_passes.sites.analysis import Analysis
from calicache.graph_passes.sites.targets import CalibrationTarget

FAMILIES = 3  # FORECAST, REUSE, CALIBRATE at one level
SURVEYED = 3  # plain runs of a probe: the earlier step, the step, and the walk along it


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is recorded and searched.

    Attributes:
        runs: recorded ones that a plan is made from.
        search_runs: recorded ones that a search shares out.
        budget: of the search; `effort` of it.
    """

    runs: int = 1
    search_runs: int = 3
    budget: float = 0.4
    effort: int = 1


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage.

    Attributes:
        name: what is done.
        calls: of the model, in plain calls.
        macs: beside them, in float32 multiply-accumulates that take as long.
        nbytes: that it holds on the model's device, beside the weights.
    """

    name: str
    calls: float
    macs: float
    nbytes: int


def bind_stage(analysis: Analysis, weight_bytes: int) -> Stage:
    """What all planning begins with: the weights are hashed, and one call tells what it reads."""
    live = live_bytes(analysis.captured.graph)
    return Stage("bind to the weights", 1.0, HASHED * weight_bytes, live)


def planning_stages(compiled: Compiled, runs: int) -> tuple[Stage, ...]:
    """Of `Plan.from_trajectory` with output weights, after `bind_stage`.

    Args:
        compiled: with factors that hold nothing.
        runs: that were recorded, with what the model returned.
    """
    analysis, recipe = compiled.analysis, compiled.recipe
    captured, schedule = analysis.captured, recipe.schedule
    beside = runs * analysis.binding.calls
    targets = [t for t in compiled.targets if t.rank] if recipe.calibrates else []
    how = recipe.weighting, schedule, recipe.order
    seen, added = (schedule.count(m) for m in (StepMode.REFRESH, StepMode.CALIBRATE))
    sums = moment_macs(targets, recipe.weighting) + increment_macs(captured, targets, *how)
    moments = FLOAT32 * moment_numbers(targets, recipe.weighting)
    itemsize = _itemsize(compiled.analysis)
    live = live_bytes(captured.graph) * analysis.binding.calls
    kept = analysis.binding.calls * compiled.cost.cache_bytes
    kept += kept // (recipe.order + 1)  # the newest refresh is made before the oldest goes
    factors = factor_bytes(targets, itemsize)
    share = compiled.cost.run_share(schedule)
    return (
        Stage(
            "observe increments",
            beside * (seen + added) * bool(targets),
            beside * added * sums,
            observing_bytes(captured, targets, *how) if targets else live,
        ),
        Stage("run the recorded calls", float(beside), 0.0, moments + live),
        Stage(
            "make factors",
            0.0,
            decompose_macs(targets, recipe.weighting),
            moments + factors + decomposing_bytes(targets),
        ),
        Stage(
            "fit output weights",
            beside * len(schedule) * share,
            0.0,
            moments + factors + held_bytes(targets) + kept + live,
        ),
    )


def search_stages(
    analysis: Analysis,
    targets: Sequence[CalibrationTarget],
    steps: int,
    extent: Extent,
) -> tuple[Stage, ...]:
    """Of `Plan.search` with all modes and costs in MACs, after `bind_stage`.

    Args:
        analysis: of the model.
        targets: all that there may be, at their largest rank.
        steps: of a run.
        extent: of the search.
    """
    captured, calls = analysis.captured, analysis.binding.calls
    searched, choice, report = (len(part) for part in share_out(extent.search_runs))
    plain, how = searched * steps * calls, (Weighting.COVARIANCE, probe_schedule(steps), MAX_ORDER)
    added = searched * calls * how[1].count(StepMode.CALIBRATE)
    live = live_bytes(captured.graph) * calls
    moments = FLOAT32 * moment_numbers(targets, Weighting.COVARIANCE)
    watched = node_bytes(captured, [node for target in targets for node in target.nodes]) * calls
    kept = (MAX_ORDER + 1) * watched
    again = [target for target in targets if not fits_held(target)]
    tried = _tried_runs(extent, choice / searched, report / searched)
    probes = len(PROBES) * calls * (SURVEYED + len(analysis.sites.branches) / 2)
    observed, sums = plain * (steps - how[1].count(StepMode.FORECAST)) / steps, 0.0
    sums += moment_macs(targets, Weighting.COVARIANCE) + increment_macs(captured, targets, *how)
    return (
        Stage("run the recorded calls", float(searched + 2 * (choice + report)), 0.0, live),
        Stage("measure cheap steps", 2 * CHEAP_WORK * plain, 0.0, kept + live),
        Stage("measure sensitivities", probes, 0.0, 2 * watched + 2 * live),
        Stage(
            "observe increments",
            observed,
            added * sums,
            calls * observing_bytes(captured, targets, *how),
        ),
        Stage(
            "make factors",
            0.0,
            sum(decompose_macs(some, Weighting.COVARIANCE) for some in (targets, again)),
            moments + decomposing_bytes(targets) + _level_bytes(analysis, targets),
        ),
        Stage(
            "try candidates",
            plain * tried,
            0.0,
            moments + held_bytes(targets) + _level_bytes(analysis, targets) + kept + live,
        ),
    )


def _tried_runs(extent: Extent, choice: float, report: float) -> float:
    """Full runs that candidates take for every run to search with.

    Args:
        extent: of the search.
        choice: runs to choose with, for every run to search with.
        report: runs to report with, likewise.
    """
    budget = extent.budget
    others = sorted(other for other in FRONT_BUDGETS if abs(other - budget) > APART)
    tries = dict.fromkeys(others, 1)
    tries[budget] = extent.effort * max(LEAST_TRIES, round(TRIED_RUNS / budget))
    tries[min(tries)] = max(tries[min(tries)], FAMILIES)
    fitted = sum(share * count for share, count in tries.items())
    chosen = sum(others) + CHOSEN_FROM * budget
    return fitted + chosen * choice + budget * report


def _level_bytes(analysis: Analysis, targets: Sequence[CalibrationTarget]) -> int:
    """Of the factors of CALIBRATE steps at the level that is tried first."""
    layers = [target for target in targets if target.weights]
    numbers = sum(target.in_features * sum(target.out_features) for target in layers)
    return round(USUAL_LEVEL * numbers) * _itemsize(analysis)


def _itemsize(analysis: Analysis) -> int:
    """Bytes of a number of the model."""
    return next(analysis.captured.module.parameters()).element_size()
