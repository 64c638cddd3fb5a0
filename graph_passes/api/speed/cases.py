"""What latencies are measured of: every way to treat a group of residual branches, as a plan."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.common.errors import BenchError
from calicache.graph_passes.factors.statistics import SecondMoments
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.settings.choices import (
    BranchKind,
    Granularity,
    SiteMode,
    SiteRule,
    StepMode,
)
from calicache.graph_passes.settings.latency import EVERY, BranchChoice, group_of
from calicache.graph_passes.settings.schedule import anchor_table, uniform_schedule
from calicache.graph_passes.sites.sites import LinearSite, Sites
from calicache.graph_passes.sites.targets import CalibrationTarget, assign

LOW_SHARE, HIGH_SHARE = 16, 5  # of the width, in a rank
INTERVAL = 3  # of the schedule that is planned for; it decides which caches are folded
_LEVELS = {BranchChoice.LINEAR: Granularity.LINEAR, BranchChoice.BRANCH: Granularity.BRANCH}


@dataclass(frozen=True, slots=True)
class Case:
    """What one row treats, and how.

    Attributes:
        group: of residual branches.
        choice: what is done to them.
        rank: of their calibration branches.
        rules: for a plan that does this to the group and leaves all else whole.
        targets: the calibration targets of such a plan.
    """

    group: str
    choice: BranchChoice
    rank: int
    rules: tuple[SiteRule, ...]
    targets: tuple[CalibrationTarget, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all calibration branches."""
        return sum(target.calibrate_macs for target in self.targets)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of the steps of a row, and of plain steps in turn with them."""

    plain: float
    refresh: float
    cheap: float

    def scaled(self, plain: float) -> StepTimes:
        """What they would have been where a plain step takes `plain` seconds."""
        ratio = plain / self.plain
        return StepTimes(plain, self.refresh * ratio, self.cheap * ratio)


def latency_cases(
    captured: CapturedGraph, sites: Sites, ranks: Sequence[int] | None, *, keeps: bool
) -> Iterator[Case]:
    """All treatments of every group.

    Args:
        captured: the plain graph.
        sites: its layers and branches.
        ranks: of the calibration branches; two by the width where None.
        keeps: whether to begin with no treatment at all, where keeping the values of a run
            saves by itself.
    """
    groups: dict[str, list[str]] = {}
    for branch in sites.branches:
        groups.setdefault(group_of(branch.name), []).append(branch.name)
    if keeps:
        yield _case(captured, sites, EVERY, BranchChoice.FULL, 0, ())
    for group, names in groups.items():
        chosen = ranks or _ranks([site for site in sites.linears if site.branch in names])
        for choice, level in _LEVELS.items():
            seen: set[int] = set()  # ranks above what the layers allow come to the same
            for rank in chosen:
                case = _case(captured, sites, group, choice, rank, names)
                whole = all(target.granularity is level for target in case.targets)
                if whole and case.macs not in seen:
                    yield case
                seen.add(case.macs)
        integers = _case(captured, sites, group, BranchChoice.INT8, 0, names)
        if integers.targets:
            yield integers
        yield _case(captured, sites, group, BranchChoice.REUSE, 0, names)


def joint_cases(cases: Iterable[Case], captured: CapturedGraph, sites: Sites) -> Iterator[Case]:
    """All groups that can be treated alike in one case: fewer steps to time than one by one.

    Args:
        cases: from `latency_cases`.
        captured: the plain graph that they were made from.
        sites: its layers and branches.
    """
    joined: dict[tuple[BranchChoice, int], list[Case]] = {}
    counts: Counter[tuple[str, BranchChoice]] = Counter()
    for case in cases:
        place = counts[case.group, case.choice]  # the lower rank of a group comes first
        counts[case.group, case.choice] += 1
        joined.setdefault((case.choice, place), []).append(case)
    for (choice, _), alike in joined.items():
        groups = {case.group for case in alike}
        names = [branch.name for branch in sites.branches if group_of(branch.name) in groups]
        rank = max(case.rank for case in alike)
        yield _case(captured, sites, EVERY, choice, rank, names)


def latency_schedule(steps: int, order: int) -> tuple[StepMode, ...]:
    """A short schedule with as many REFRESH steps as are kept, and one that is cheap at the end.

    Raises:
        BenchError: the runs are too short for it.
    """
    anchor_table((StepMode.REFRESH,), order)  # refuses an unknown order
    kept = order + 1
    if steps <= kept:
        raise BenchError(
            "recording",
            expected=f"a run of {kept + 1} steps or more",
            got=str(steps),
            fix="Record a longer run, or measure at a lower order.",
        )
    interval = min(INTERVAL, steps // kept)
    if interval == 1:
        return (*uniform_schedule(kept, 1), StepMode.CALIBRATE)
    return uniform_schedule(kept * interval, interval)


def _case(
    captured: CapturedGraph,
    sites: Sites,
    group: str,
    choice: BranchChoice,
    rank: int,
    names: Sequence[str],
) -> Case:
    mode = SiteMode.REUSE if choice is BranchChoice.REUSE else SiteMode.CALIBRATE
    kind = BranchKind.INT8 if choice is BranchChoice.INT8 else None
    others = [branch.name for branch in sites.branches if branch.name not in names]
    stream = [site.name for site in sites.linears if site.branch is None]
    rules = (
        *(SiteRule(glob.escape(name), SiteMode.FULL) for name in (*others, *stream)),
        *(SiteRule(glob.escape(name), mode, None, _LEVELS.get(choice), kind) for name in names),
    )
    # `joint` as in a plan: q, k and v together take less time than apart.
    targets, _ = assign(captured, sites, rank=rank, rules=rules, joint=True)
    return Case(group, choice, rank, rules, targets)


def _ranks(inside: Sequence[LinearSite]) -> tuple[int, int]:
    """A smaller and a larger rank for some layers; multiples of 8 but for narrow ones."""
    width = max(min(site.in_features, site.out_features) for site in inside)
    low = max(4, 8 * round(width / LOW_SHARE / 8))
    high = max(2 * low, 8 * round(width / HIGH_SHARE / 8))
    return min(low, width), min(high, width)


def case_plan(plan: Plan, case: Case) -> Plan:
    """A plan of the same schedule for one row, whose factors hold nothing that was observed."""
    recipe = replace(plan.recipe, rank=case.rank, rules=case.rules)
    moments = {target.name: _unit_moments(target) for target in case.targets if target.rank}
    return replace(plan, recipe=recipe, statistics=moments)


def _unit_moments(target: CalibrationTarget) -> SecondMoments:
    """What a plan holds for a target, with the unit matrix in the place of what is observed."""
    inputs, outputs = target.in_features, sum(target.out_features)
    if target.granularity is Granularity.BRANCH:
        cross = torch.eye(inputs, outputs)
        return SecondMoments(input=torch.eye(inputs), cross=cross, energy=cross.sum())
    if outputs < inputs:
        return SecondMoments(output=torch.eye(outputs))
    return SecondMoments(input=torch.eye(inputs))
