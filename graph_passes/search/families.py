"""The families of plans that a search tries: cheap steps of one kind, with errors and costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pydantic import TypeAdapter
from torch import Tensor

from calicache.graph_passes.factors.decompose import CalibrationFactors
from calicache.graph_passes.factors.factors import make_factors
from calicache.graph_passes.factors.observe import observe
from calicache.graph_passes.factors.statistics import SecondMoments, named_statistics, named_tensors
from calicache.graph_passes.rewriting.compile import Assignment, assign_targets, compile_graphs
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.search.allocate import MULTIPLE, Allocation, allocate
from calicache.graph_passes.search.cheap_errors import cheap_errors
from calicache.graph_passes.search.costs import (
    Candidates,
    StepShares,
    branch_options,
    latency_shares,
    macs_shares,
)
from calicache.graph_passes.search.ground import Ground
from calicache.graph_passes.search.rehearse import Scales
from calicache.graph_passes.search.sensitivity import BACK, sensitivities
from calicache.graph_passes.settings.choices import Granularity, StepMode, Weighting
from calicache.graph_passes.settings.latency import LatencyTable
from calicache.graph_passes.settings.recipe import Recipe
from calicache.graph_passes.settings.schedule import MAX_ORDER, uniform_schedule
from calicache.graph_passes.sites.targets import CalibrationTarget, assign

LEVELS = (0.15, 0.3, 0.45, 0.6)  # shares of a full step that a CALIBRATE step may cost
OBSERVED_INTERVAL = 3
PROBES = (0.3, 0.7)  # places of the run where sensitivities are measured

_SCALES = TypeAdapter(dict[StepMode, Scales])


@dataclass(frozen=True, slots=True)
class Family:
    """Plans whose CALIBRATE steps do the same, if they have any.

    Attributes:
        name: for the journal.
        allocation: what a CALIBRATE step does; None for none.
        variant_set: its variants, without output weights.
        shares: what steps cost.
        scales: errors of cheap steps, see `Rehearsal`.
        orders: of the anchors, to try.
    """

    name: str
    allocation: Allocation | None
    variant_set: VariantSet
    shares: StepShares
    scales: Mapping[StepMode, Scales]
    orders: tuple[int, ...]

    @property
    def modes(self) -> tuple[StepMode, ...]:
        """That a step may have."""
        return (StepMode.REFRESH, *self.shares.steps)

    def cost(self, order: int) -> Callable[[Sequence[StepMode]], float]:
        """Cost of a schedule at an order of the anchors."""
        return partial(self.shares.run_share, order=order)

    def least_share(self, steps: int) -> float:
        """Cost of one REFRESH step and the cheapest steps after it."""
        schedules = ((StepMode.REFRESH, *(steps - 1) * (mode,)) for mode in self.shares.steps)
        return min(self.shares.run_share(schedule, max(self.orders)) for schedule in schedules)


def find_families(
    ground: Ground, latency: LatencyTable | None, budget: float | None, effort: int
) -> tuple[list[Family], Candidates | None]:
    """FORECAST and REUSE at every order, and CALIBRATE steps at some costs.

    Args:
        ground: model and runs.
        latency: measured seconds; MACs without.
        budget: of a run, if there is one; a CALIBRATE step may cost the like of it.
        effort: how many costs of a CALIBRATE step are tried.

    Returns:
        The families, and what is known of the calibration targets, if there are any.
    """
    orders = tuple(range(MAX_ORDER + 1)) if latency is None else (latency.order,)
    highest = (max(orders),)
    families = [_family(ground, latency, "forecast", frozenset(), highest)]
    if ground.analysis.sites.branches:
        ground.meter.stage("measure REUSE steps")
        families.append(_family(ground, latency, "reuse", frozenset({StepMode.REUSE}), orders))
    known = _candidates(ground)
    if known is None:
        return families, None
    options = branch_options(ground.analysis, known, latency)
    full = 1.0 if latency is None else latency.full_step / latency.plain
    seen: list[Mapping[str, int]] = []
    for level in sorted(LEVELS, key=lambda level: abs(level - (budget or 0.3)))[:effort]:
        allocation = allocate(options, level, full)
        if not any(allocation.ranks.values()) or allocation.ranks in seen:
            continue
        seen.append(allocation.ranks)
        ground.meter.stage(f"measure CALIBRATE steps at {level:g}")
        made = _family(
            ground,
            latency,
            f"calibrate-{level:g}",
            frozenset({StepMode.CALIBRATE, *families[-1].variant_set.variants}),
            highest,
            allocation,
            known,
        )
        families.append(replace(made, scales={**families[-1].scales, **made.scales}))
    return families, known


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


def planned_targets(ground: Ground, allocation: Allocation) -> tuple[CalibrationTarget, ...]:
    """The targets that a plan with this allocation will have."""
    targets, _ = assign(
        ground.analysis.captured,
        ground.analysis.sites,
        rank=MULTIPLE,
        rules=allocation.rules,
        joint=True,
        ranks=allocation.ranks,
    )
    return targets


def _family(
    ground: Ground,
    latency: LatencyTable | None,
    name: str,
    modes: frozenset[StepMode],
    orders: tuple[int, ...],
    allocation: Allocation | None = None,
    known: Candidates | None = None,
) -> Family:
    analysis = ground.analysis
    recipe = Recipe(
        schedule=uniform_schedule(ground.steps, OBSERVED_INTERVAL),
        rank=MULTIPLE,
        order=MAX_ORDER,
        weighting=Weighting.COVARIANCE,
        rules=allocation.rules if allocation else (),
        ranks=allocation.ranks if allocation else {},
    )
    assignment = Assignment(())
    factors: dict[str, CalibrationFactors] = {}
    if allocation and known:
        assignment = assign_targets(analysis, recipe)
        factors = make_factors(
            analysis.captured, assignment.targets, known.moments, ground.decompositions
        )
    compiled = compile_graphs(analysis, recipe, assignment, factors, modes)
    variant_set = compiled.variant_set
    tried = [StepMode.CALIBRATE] if allocation else [*modes]  # REUSE was measured before
    found = (
        {}
        if not tried
        else ground.journal.numbers(
            f"errors-{name}",
            lambda: _SCALES.dump_python(
                cheap_errors(
                    variant_set,
                    ground.recorded,
                    probe_schedule(ground.steps),
                    tried,
                    lambda: ground.meter.add(0.5),
                ),
                mode="json",
            ),
        )
    )
    scales = _SCALES.validate_python(found)
    if latency is None:
        shares = macs_shares(compiled)
    else:
        shares = latency_shares(analysis.sites, latency, modes, allocation)
    return Family(name, allocation, variant_set, shares, scales, orders)


def _candidates(ground: Ground) -> Candidates | None:
    """Statistics, spectra and sensitivities of all layers and all whole branches."""
    analysis, seen = ground.analysis, set[str]()
    captured, sites = analysis.captured, analysis.sites
    targets: list[CalibrationTarget] = []
    for granularity in Granularity:
        found, _ = assign(captured, sites, rank=MULTIPLE, granularity=granularity, joint=True)
        for target in found:
            if target.name not in seen:
                most = min(target.in_features, sum(target.out_features))
                targets.append(replace(target, rank=most))
                seen.add(target.name)
    if not targets:
        return None
    ground.meter.stage("measure sensitivities")
    layers = [t for t in targets if t.granularity is Granularity.LINEAR]
    steps = sorted({max(BACK, round(share * (ground.steps - 1))) for share in PROBES})
    gains = ground.journal.numbers(
        "sensitivities",
        lambda: sensitivities(
            captured,
            sites,
            layers,
            ground.recorded.runs[0],
            steps,
            lambda: ground.meter.add(2 + len(sites.branches) / 2),
        ),
    )
    # After the probes: the moments of a large model take half as much memory as its weights.
    ground.meter.stage("observe increments")
    moments = _moments(ground, targets)
    spectra: dict[str, Tensor] = {}
    for target in targets:  # one at a time: decompositions are as large as the weights
        decomposition = ground.decompositions.of(captured, target, moments[target.name])
        spectra[target.name] = decomposition.spectrum.float().cpu()
    return Candidates(tuple(targets), spectra, moments, gains)


def _moments(ground: Ground, targets: Sequence[CalibrationTarget]) -> dict[str, SecondMoments]:
    def collect() -> dict[str, Tensor]:
        found = observe(
            ground.analysis.captured,
            targets,
            ground.recording,
            Weighting.COVARIANCE,
            probe_schedule(ground.steps),
            MAX_ORDER,
            lambda *_: ground.meter.add(0.9),
        )
        return named_tensors(found)

    found = named_statistics(ground.journal.tensors("moments", collect))
    return {name: m for name, m in found.items() if isinstance(m, SecondMoments)}
