"""The families of plans that a search tries: cheap steps of one kind, with errors and costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pydantic import TypeAdapter
from torch import Tensor

from calicache.graph_passes.factors.factors import make_factors
from calicache.graph_passes.factors.observe import observe
from calicache.graph_passes.factors.statistics import SecondMoments, named_statistics, named_tensors
from calicache.graph_passes.rewriting.compile import (
    Assignment,
    Compiled,
    assign_targets,
    compile_graphs,
)
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.search.allocate import MULTIPLE, Allocation, allocate
from calicache.graph_passes.search.cheap_errors import cheap_errors
from calicache.graph_passes.search.costs import (
    StepShares,
    TargetSurvey,
    branch_options,
    int8_allocation,
    latency_shares,
    macs_shares,
)
from calicache.graph_passes.search.ground import Ground
from calicache.graph_passes.search.journal import EntryKind
from calicache.graph_passes.search.placement import Limits
from calicache.graph_passes.search.rehearse import Scales
from calicache.graph_passes.search.sensitivity import BACK, sensitivities
from calicache.graph_passes.settings.choices import Granularity, StepMode, Weighting
from calicache.graph_passes.settings.latency import LatencyTable
from calicache.graph_passes.settings.recipe import Recipe
from calicache.graph_passes.settings.request import SearchRequest
from calicache.graph_passes.settings.schedule import MAX_ORDER, uniform_schedule
from calicache.graph_passes.sites.analysis import Analysis
from calicache.graph_passes.sites.targets import CalibrationTarget, assign

LEVELS = (0.15, 0.3, 0.45, 0.6)  # shares of a full step that a CALIBRATE step may cost
USUAL_LEVEL = 0.3  # the first of them without a budget
OBSERVED_INTERVAL = 3
PROBES = (0.3, 0.7)  # places of the run where sensitivities are measured
CHEAP_WORK, OBSERVE_WORK = 0.5, 0.9  # of an average step of a probe, in calls of the model

ERRORS = EntryKind("errors", TypeAdapter(dict[StepMode, Scales]))
SENSITIVITIES = EntryKind("sensitivities", TypeAdapter(dict[str, float]))


@dataclass(frozen=True, slots=True)
class FamilySpec:
    """What the cheap steps of a family do.

    Attributes:
        name: for the journal.
        modes: CALIBRATE and REUSE, as far as its plans have them; FORECAST is in every family.
        orders: of the anchors, to try.
        allocation: what a CALIBRATE step does; None for none.
    """

    name: str
    modes: frozenset[StepMode]
    orders: tuple[int, ...]
    allocation: Allocation | None = None

    def recipe(self, steps: int) -> Recipe:
        """Of the graphs that its cheap steps are measured with, at a usual schedule."""
        return Recipe(
            schedule=uniform_schedule(steps, OBSERVED_INTERVAL),
            rank=MULTIPLE,
            order=MAX_ORDER,
            weighting=Weighting.COVARIANCE,
            rules=self.allocation.rules if self.allocation else (),
            ranks=self.allocation.ranks if self.allocation else {},
        )


@dataclass(frozen=True, slots=True)
class Family:
    """Plans whose CALIBRATE steps do the same, if they have any.

    Attributes:
        spec: what its cheap steps do.
        variant_set: its variants, without output weights.
        shares: what steps cost.
        scales: errors of cheap steps, see `Rehearsal`.
    """

    spec: FamilySpec
    variant_set: VariantSet
    shares: StepShares
    scales: Mapping[StepMode, Scales]

    @property
    def modes(self) -> tuple[StepMode, ...]:
        """That a step may have."""
        return (StepMode.REFRESH, *self.shares.steps)

    def limits(self, order: int, budget: float) -> Limits:
        """Which schedules it has within a budget, at an order of the anchors."""
        return Limits(self.modes, partial(self.shares.run_share, order=order), budget)

    def least_share(self, steps: int) -> float:
        """Cost of one REFRESH step and the cheapest steps after it."""
        schedules = ((StepMode.REFRESH, *(steps - 1) * (mode,)) for mode in self.shares.steps)
        order = max(self.spec.orders)
        return min(self.shares.run_share(schedule, order) for schedule in schedules)


def find_families(
    ground: Ground, request: SearchRequest
) -> tuple[list[Family], TargetSurvey | None]:
    """FORECAST and REUSE at every order, CALIBRATE steps in int8 and low-rank ones at some costs.

    Where seconds count, a family whose steps were measured to take as long as plain ones is none.

    Args:
        ground: model and runs.
        request: its modes, what costs are counted in, its budget, which a CALIBRATE step may
            cost the like of, and its effort, which is how many such costs are tried.

    Returns:
        The families, and what is known of the calibration targets, if there are any.
    """
    latency, allowed = request.latency, request.modes
    orders = tuple(range(MAX_ORDER + 1)) if latency is None else (latency.order,)
    highest = (max(orders),)
    families = [build_family(ground, FamilySpec("forecast", frozenset(), highest), latency)]
    reuse = FamilySpec("reuse", frozenset({StepMode.REUSE}), orders)
    reusable = StepMode.REUSE in allowed and bool(ground.analysis.sites.branches)
    if reusable and _saves(ground, reuse, latency):
        ground.meter.stage("measure REUSE steps", CHEAP_WORK)
        families.append(build_family(ground, reuse, latency))
    if StepMode.CALIBRATE not in allowed:
        return families, None
    base = families[-1]
    modes = base.spec.modes | {StepMode.CALIBRATE}
    integers = None if latency is None else int8_allocation(ground.analysis, latency)
    if integers is not None:
        ground.meter.stage("measure CALIBRATE steps in int8", CHEAP_WORK)
        spec = FamilySpec("calibrate-int8", modes, highest, integers)
        if _saves(ground, spec, latency):
            families.append(build_family(ground, spec, latency, scales=base.scales))
    survey = survey_targets(ground)
    if survey is None:
        return families, None
    for level, allocation in _allocations(ground, survey, request):
        ground.meter.stage(f"measure CALIBRATE steps at {level:g}", CHEAP_WORK)
        spec = FamilySpec(f"calibrate-{level:g}", modes, highest, allocation)
        if _saves(ground, spec, latency):
            families.append(build_family(ground, spec, latency, survey.moments, base.scales))
    return families, survey


def _saves(ground: Ground, spec: FamilySpec, latency: LatencyTable | None) -> bool:
    """Whether every mode of a family takes less time than a plain step, which errs by nothing."""
    if latency is None:
        return True
    shares = latency_shares(ground.analysis.sites, latency, spec.modes, spec.allocation)
    return all(shares.steps[mode] < 1.0 for mode in spec.modes)


def build_family(
    ground: Ground,
    spec: FamilySpec,
    latency: LatencyTable | None,
    moments: Mapping[str, SecondMoments] | None = None,
    scales: Mapping[StepMode, Scales] | None = None,
) -> Family:
    """The graphs of a family, with costs and errors of its cheap steps.

    Args:
        ground: model and runs.
        spec: what the cheap steps do.
        latency: measured seconds; MACs without.
        moments: by name of the calibration target, where there is an allocation.
        scales: of modes that were measured before, and are the same here.
    """
    compiled = _compiled(ground, spec, moments or {})
    earlier = scales or {}
    modes = [mode for mode in spec.modes if mode not in earlier]
    measured: dict[StepMode, Scales] = {}
    if modes:
        measured = ground.journal.result(
            ERRORS,
            spec.name,
            lambda: cheap_errors(
                compiled.variant_set,
                ground.recorded,
                probe_schedule(ground.steps),
                modes,
                ground.meter,
                ground.ranks,
            ),
        )
    if latency is None:
        shares = macs_shares(compiled)
    else:
        shares = latency_shares(ground.analysis.sites, latency, spec.modes, spec.allocation)
    return Family(spec, compiled.variant_set, shares, {**earlier, **measured})


def probe_schedule(steps: int) -> tuple[StepMode, ...]:
    """Where cheap steps are measured: every third step REFRESH, and one CALIBRATE step after it.

    The CALIBRATE step is the first after one REFRESH, the second after the next; the others are
    FORECAST, which runs nothing.
    """
    modes = list(uniform_schedule(steps, OBSERVED_INTERVAL))
    for step in range(steps):
        interval, lag = divmod(step, OBSERVED_INTERVAL)
        if lag and (interval + lag) % 2 == 0:
            modes[step] = StepMode.FORECAST
    return tuple(modes)


def survey_targets(ground: Ground) -> TargetSurvey | None:
    """Statistics, spectra and sensitivities of all layers and all whole branches."""
    analysis = ground.analysis
    targets = possible_targets(analysis)
    if not targets:
        return None
    # Two plain runs, and one from every branch on, which is half of one on average.
    ground.meter.stage("measure sensitivities", 2 + len(analysis.sites.branches) / 2)
    layers = [target for target in targets if target.granularity is Granularity.LINEAR]
    gains = ground.journal.result(SENSITIVITIES, "", partial(_sensitivities, ground, layers))
    # After the probes: the moments of a large model take half as much memory as its weights.
    ground.meter.stage("observe increments", OBSERVE_WORK)
    moments = _moments(ground, targets)
    spectra: dict[str, Tensor] = {}
    for target in targets:  # one at a time: decompositions are as large as the weights
        decomposition = ground.decompositions.of(analysis.captured, target, moments[target.name])
        spectra[target.name] = decomposition.spectrum.float().cpu()
    return TargetSurvey(targets, spectra, moments, gains)


def _compiled(ground: Ground, spec: FamilySpec, moments: Mapping[str, SecondMoments]) -> Compiled:
    analysis, recipe = ground.analysis, spec.recipe(ground.steps)
    if spec.allocation is None:
        return compile_graphs(analysis, recipe, Assignment(()), {}, spec.modes)
    assignment = assign_targets(analysis, recipe)
    factors = make_factors(analysis.captured, assignment.targets, moments, ground.decompositions)
    return compile_graphs(analysis, recipe, assignment, factors, spec.modes)


def _allocations(
    ground: Ground, survey: TargetSurvey, request: SearchRequest
) -> Iterator[tuple[float, Allocation]]:
    """What CALIBRATE steps may do at the levels nearest to the budget, each other ranks."""
    latency = request.latency
    options = branch_options(ground.analysis, survey, latency)
    full = 1.0 if latency is None else latency.full_step / latency.plain
    middle = request.budget or USUAL_LEVEL
    earlier: list[Mapping[str, int]] = []
    for level in sorted(LEVELS, key=lambda level: abs(level - middle))[: request.effort]:
        # By the first process: eigenvalues of another machine may differ in rounding.
        allocation = ground.ranks.first(partial(allocate, options, level, full))
        if any(allocation.ranks.values()) and allocation.ranks not in earlier:
            earlier.append(allocation.ranks)
            yield level, allocation


def possible_targets(analysis: Analysis) -> tuple[CalibrationTarget, ...]:
    """All layers and all whole branches, at their largest rank; a name counts once."""
    targets: dict[str, CalibrationTarget] = {}
    for granularity in Granularity:
        assigned, _ = assign(
            analysis.captured, analysis.sites, rank=MULTIPLE, granularity=granularity, joint=True
        )
        for target in assigned:
            most = min(target.in_features, sum(target.out_features))
            targets.setdefault(target.name, replace(target, rank=most))
    return tuple(targets.values())


def _sensitivities(ground: Ground, layers: Sequence[CalibrationTarget]) -> dict[str, float]:
    captured, sites = ground.analysis.captured, ground.analysis.sites
    steps = sorted({max(BACK, round(share * (ground.steps - 1))) for share in PROBES})
    run, meter = ground.recorded.runs[0], ground.meter
    return sensitivities(captured, sites, layers, run, steps, meter, ground.ranks)


def _moments(ground: Ground, targets: Sequence[CalibrationTarget]) -> dict[str, SecondMoments]:
    def collect() -> dict[str, Tensor]:
        statistics = observe(
            ground.analysis.captured,
            targets,
            ground.recording,
            Weighting.COVARIANCE,
            probe_schedule(ground.steps),
            MAX_ORDER,
            ground.meter,
            ground.ranks,
        )
        return named_tensors(statistics)

    statistics = named_statistics(ground.journal.tensors("moments", collect))
    return {name: m for name, m in statistics.items() if isinstance(m, SecondMoments)}
