"""The kinds of cheap steps that a plan search tries: what they may do, and what they cost."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from calicache.graph_passes.factors.statistics import SecondMoments
from calicache.graph_passes.rewriting.compile import Compiled
from calicache.graph_passes.rewriting.fold import fold_groups, fold_macs, reads_per_refresh
from calicache.graph_passes.search.allocate import Allocation, BranchOption, RankCurve, allocate
from calicache.graph_passes.settings.choices import Granularity, StepMode
from calicache.graph_passes.settings.latency import BranchChoice, LatencyTable, group_of
from calicache.graph_passes.sites.analysis import Analysis
from calicache.graph_passes.sites.branches import ResidualBranch
from calicache.graph_passes.sites.sites import Sites
from calicache.graph_passes.sites.targets import CalibrationTarget

UNIT_MACS = 1_000_000_000  # where the straight lines of a latency table are read


@dataclass(frozen=True, slots=True)
class StepShares:
    """Cost of a step by mode, the plain step being 1.

    Attributes:
        steps: of the cheap modes that there are.
        caches: what a REFRESH costs more where the schedule has steps of that mode.
        folds: what a REFRESH costs more from so many `reads_per_refresh` on: pairs of both.
        kept: what a REFRESH costs more where the schedule has steps that run the model with
            values of the run: any cheap mode but FORECAST.
    """

    steps: Mapping[StepMode, float]
    caches: Mapping[StepMode, float]
    folds: tuple[tuple[float, float], ...] = ()
    kept: float = 0.0

    def run_share(self, schedule: Sequence[StepMode], order: int) -> float:
        """Cost of a run against the plain model's."""
        counts = Counter(schedule)
        reads = reads_per_refresh(schedule, order + 1) if self.folds else 0.0
        refreshes = counts.pop(StepMode.REFRESH, 0)
        refresh = 1.0 + sum(self.caches[mode] for mode in counts)
        refresh += self.kept if counts.keys() - {StepMode.FORECAST} else 0.0
        refresh += sum(share for threshold, share in self.folds if threshold < reads)
        cheap = sum(self.steps[mode] * count for mode, count in counts.items())
        return (refresh * refreshes + cheap) / len(schedule)


@dataclass(frozen=True, slots=True)
class TargetSurvey:
    """What is known of every calibration target that a plan may have.

    Attributes:
        targets: linear ones and whole branches, at their largest rank.
        spectra: energy of every direction of a target, largest first; by name.
        moments: what they were made from.
        sensitivities: by target name and branch, from `sensitivities`.
    """

    targets: tuple[CalibrationTarget, ...]
    spectra: Mapping[str, Tensor]
    moments: Mapping[str, SecondMoments]
    sensitivities: Mapping[str, float]

    def curve(self, target: CalibrationTarget) -> RankCurve:
        """What every rank of a target leaves out, as error of the output."""
        spectrum, energy = self.spectra[target.name], self.moments[target.name].energy
        left = 0.0 if energy is None else max(0.0, float(energy) - float(spectrum.sum()))
        gain = self.sensitivities[target.name] * target.tokens
        return RankCurve.of(target, spectrum, gain, left)


def branch_options(
    analysis: Analysis, survey: TargetSurvey, latency: LatencyTable | None
) -> dict[str, list[BranchOption]]:
    """Every way to treat every branch, FULL first, and every site outside of branches.

    Costs are MACs, or seconds from a table; what it did not measure is left out.
    """
    branch_of = {site.name: site.branch for site in analysis.sites.linears}
    members = Counter(group_of(branch.name) for branch in analysis.sites.branches)
    options: dict[str, list[BranchOption]] = {}
    for branch in analysis.sites.branches:
        inside = [t for t in survey.targets if branch_of[t.sites[0]] == branch.name]
        options[branch.name] = [BranchOption(BranchChoice.FULL, 0.0, patterns=(branch.name,))]
        for choice, targets in _choices(inside).items():
            line: tuple[float, float] | None
            if latency is None:
                line = _macs_line(analysis, branch, targets, choice)
            else:
                group = group_of(branch.name)
                line = _latency_line(latency, group, choice, members[group])
            if line is not None:
                curves = tuple(survey.curve(target) for target in targets)
                options[branch.name].append(BranchOption(choice, *line, curves, (branch.name,)))
    for target in survey.targets:
        if branch_of[target.sites[0]] is None:
            options[target.name] = _outside_options(analysis, survey, target, latency)
    return options


def int8_allocation(analysis: Analysis, latency: LatencyTable) -> Allocation | None:
    """CALIBRATE steps in integers: every branch that takes less time so, all else in full.

    By MACs there is no such step: integers multiply as often.

    Returns:
        None where the table knows of no branch that does.
    """
    members = Counter(group_of(branch.name) for branch in analysis.sites.branches)
    outside = [site.name for site in analysis.sites.linears if site.branch is None]
    branches = [branch.name for branch in analysis.sites.branches]
    options = {
        name: [BranchOption(BranchChoice.FULL, 0.0, patterns=(glob.escape(name),))]
        for name in (*outside, *branches)
    }
    for name in branches:
        group = group_of(name)
        line = _latency_line(latency, group, BranchChoice.INT8, members[group])
        if line is not None:
            full = options[name][0]
            options[name].append(replace(full, choice=BranchChoice.INT8, cost=line[0]))
    # Nothing is left out of an increment, so that the cheapest is the best.
    allocation = allocate(options, 0.0, latency.full_step / latency.plain)
    return allocation if BranchChoice.INT8 in allocation.choices.values() else None


def macs_shares(compiled: Compiled) -> StepShares:
    """Costs in MACs, counted on the variants; caches cost the products that fold them."""
    plain = compiled.cost.plain_macs
    steps: dict[StepMode, float] = {
        mode: macs / plain
        for mode, macs in compiled.cost.modes.items()
        if mode is not StepMode.REFRESH
    }
    itemsize = next(compiled.captured.module.parameters()).element_size()
    folds = tuple(
        (group.threshold, sum(fold_macs(target) for target in group.targets) / plain)
        for group in fold_groups(compiled.targets, itemsize)
    )
    return StepShares({**steps, StepMode.FORECAST: 0.0}, dict.fromkeys(StepMode, 0.0), folds)


def latency_shares(
    sites: Sites,
    latency: LatencyTable,
    modes: Collection[StepMode],
    allocation: Allocation | None,
) -> StepShares:
    """Costs of FORECAST and of some modes in seconds, from a table."""
    members = Counter(group_of(branch.name) for branch in sites.branches)
    reuse = latency.full_step / latency.plain
    reuse_writes = 0.0
    for group in members:
        change = latency.step_change(group, BranchChoice.REUSE, 0)
        writes = latency.refresh_change(group, BranchChoice.REUSE, 0)
        reuse += float("inf") if change is None else change / latency.plain
        reuse_writes += (writes or 0.0) / latency.plain
    steps: dict[StepMode, float] = {
        StepMode.FORECAST: latency.forecast / latency.plain,
        StepMode.REUSE: max(0.0, reuse),
    }
    caches = {StepMode.FORECAST: 0.0, StepMode.REUSE: max(0.0, reuse_writes)}
    if allocation is not None:
        calibrate_writes = 0.0
        for branch, choice in allocation.choices.items():
            group = group_of(branch)
            change = latency.refresh_change(group, choice, 0) if group in members else 0.0
            calibrate_writes += (change or 0.0) / members.get(group, 1) / latency.plain
        steps[StepMode.CALIBRATE] = max(0.0, allocation.cost)
        caches[StepMode.CALIBRATE] = max(0.0, calibrate_writes)
    counted = {StepMode.FORECAST, *modes}
    return StepShares(
        {mode: share for mode, share in steps.items() if mode in counted},
        caches,
        kept=max(0.0, latency.full_refresh / latency.plain - 1.0),
    )


def _choices(
    inside: Sequence[CalibrationTarget],
) -> dict[BranchChoice, tuple[CalibrationTarget, ...]]:
    layers = tuple(t for t in inside if t.granularity is Granularity.LINEAR)
    whole = tuple(t for t in inside if t.granularity is Granularity.BRANCH)
    by_choice = {
        BranchChoice.LINEAR: layers,
        BranchChoice.BRANCH: whole,
        BranchChoice.REUSE: whole,
    }
    return {choice: targets for choice, targets in by_choice.items() if targets}


def _outside_options(
    analysis: Analysis,
    survey: TargetSurvey,
    target: CalibrationTarget,
    latency: LatencyTable | None,
) -> list[BranchOption]:
    """Of a site outside of branches: left alone where seconds count, which are not measured."""
    full = BranchOption(BranchChoice.FULL, 0.0, patterns=target.sites)
    if latency is not None:
        return [full]
    plain = analysis.plain_macs
    change = -sum(analysis.macs.get(node, 0) for node in target.nodes) / plain
    return [full, BranchOption(BranchChoice.LINEAR, change, 1 / plain, (survey.curve(target),))]


def _macs_line(
    analysis: Analysis,
    branch: ResidualBranch,
    targets: Sequence[CalibrationTarget],
    choice: BranchChoice,
) -> tuple[float, float]:
    """Change of one branch at rank 0, and per MAC of its calibration branches, in plain steps."""
    nodes: Sequence[str] = branch.nodes
    if choice is BranchChoice.LINEAR:
        nodes = [node for target in targets for node in target.nodes]
    saved = sum(analysis.macs.get(node, 0) for node in nodes)
    return -saved / analysis.plain_macs, 1 / analysis.plain_macs


def _latency_line(
    latency: LatencyTable, group: str, choice: BranchChoice, members: int
) -> tuple[float, float] | None:
    """The same from a table; None where it did not measure the choice."""
    at_none = latency.step_change(group, choice, 0)
    at_unit = latency.step_change(group, choice, UNIT_MACS)
    if at_none is None or at_unit is None:
        return None
    # Noise can make a larger rank look faster, which nothing may be built on.
    per_mac = max(0.0, at_unit - at_none) / UNIT_MACS / latency.plain
    return at_none / members / latency.plain, per_mac
