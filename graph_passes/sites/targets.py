"""What a CALIBRATE step does where: calibrate, reuse or compute in full, by site and branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from types import MappingProxyType

from calicache.graph_passes.common.arguments import of_kind, whole_number
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.common.rejection import Rejection
from calicache.graph_passes.common.shards import WeightShard
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.surgery import shape_of
from calicache.graph_passes.settings.choices import BranchKind, Granularity, SiteMode, SiteRule
from calicache.graph_passes.sites.branches import ResidualBranch
from calicache.graph_passes.sites.sites import LinearSite, Sites


@dataclass(frozen=True, slots=True)
class CalibrationTarget:
    """One place that a CALIBRATE step does not compute: nodes that become corrected anchors.

    Attributes:
        name: of the site, of the sibling group (`attn.q+k+v`), or of the residual branch.
        granularity: LINEAR or BRANCH.
        sites: names of its linear sites, in order.
        input_node: x, whose increment is mapped.
        nodes: the values y that are replaced; several for a sibling group.
        weights: `get_attr` targets of W, one a node; none for a branch.
        in_features: channels of x; `out_features` of every y.
        tokens: rows of x in one call.
        rank: r of a low-rank branch; 0 returns the anchors as they are.
        branch: kind of the calibration branch; one of INT8 has no rank.
        shard: which part of W this process has, where W is split; sizes are those of all of it.
    """

    name: str
    granularity: Granularity
    sites: tuple[str, ...]
    input_node: str
    nodes: tuple[str, ...]
    weights: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    tokens: int
    rank: int
    branch: BranchKind = BranchKind.LOW_RANK
    shard: WeightShard | None = None

    @property
    def own_features(self) -> tuple[int, int]:
        """Channels of x, and of all y together, that this process has."""
        sizes = [sum(self.out_features), self.in_features]
        if self.shard:
            sizes[self.shard.dim] //= self.shard.count
        return sizes[1], sizes[0]

    @property
    def corrects(self) -> bool:
        """Whether it has a calibration branch at all."""
        return self.branch is BranchKind.INT8 or self.rank > 0

    @property
    def calibrate_macs(self) -> int:
        """Of the calibration branch: T r (in + sum of out), or T in (sum of out) in integers."""
        inputs, outputs = self.own_features
        if self.branch is BranchKind.INT8:
            return self.tokens * inputs * outputs
        return self.tokens * self.rank * (inputs + outputs)


@dataclass(frozen=True, slots=True)
class Treatment:
    """What a CALIBRATE step does with one site, or with one branch.

    Attributes:
        mode: correct the anchor, return it, or compute all.
        rank: r of a calibration branch there; 0 for REUSE.
        granularity: where the calibration branches of a residual branch sit.
        branch: kind of the calibration branches.
        capped: whether the rank falls to what the place allows, rather than be refused.
    """

    mode: SiteMode
    rank: int
    granularity: Granularity
    branch: BranchKind = BranchKind.LOW_RANK
    capped: bool = True

    def under(self, rule: SiteRule | None) -> Treatment:
        """The same with what a rule says instead, as far as it says anything."""
        if rule is None:
            return self
        rank = self.rank if rule.rank is None else rule.rank
        return Treatment(
            mode=rule.mode,
            rank=0 if rule.mode is SiteMode.REUSE else rank,
            granularity=rule.granularity or self.granularity,
            branch=rule.branch or self.branch,
            capped=self.capped and rule.rank is None,
        )

    def rank_at(self, in_features: int, out_features: int) -> int:
        """The rank of a map of that size."""
        return min(self.rank, in_features, out_features) if self.capped else self.rank

    @property
    def is_whole(self) -> bool:
        """Whether a branch with it is one calibration target."""
        if self.mode is SiteMode.REUSE:
            return True
        return self.granularity is Granularity.BRANCH and self.branch is BranchKind.LOW_RANK


def assign(
    captured: CapturedGraph,
    sites: Sites,
    *,
    rank: int,
    granularity: Granularity = Granularity.LINEAR,
    branch: BranchKind = BranchKind.LOW_RANK,
    rules: Sequence[SiteRule] = (),
    joint: bool = False,
    ranks: Mapping[str, int] = MappingProxyType({}),
) -> tuple[tuple[CalibrationTarget, ...], tuple[Rejection, ...]]:
    """Choose what every CALIBRATE step corrects.

    Args:
        captured: the plain graph.
        sites: layers and branches of it.
        rank: r where no rule gives one; the smaller side of a layer where that is less.
        granularity: of the calibration branches where no rule says otherwise.
        branch: kind of the calibration branches where no rule says otherwise.
        rules: exceptions; the first that fits a name counts.
        joint: solve sibling sites together, at the rank that costs the same MACs.
        ranks: r of some targets, by name; before all else.

    Returns:
        The targets in graph order, and the branches that cannot be calibrated as a whole.

    Raises:
        PlanError: a rank is no whole number from 0 on or larger than its layer allows, or a rule
            or a rank fits nothing.
    """
    rank = whole_number("rank", rank, PlanError, 0)
    _check_rules(rules, sites)
    default = Treatment(SiteMode.CALIBRATE, rank, granularity, branch)
    branches = [branch.name for branch in sites.branches]
    by_branch = {name: default.under(_rule_for(rules, name)) for name in branches}
    whole, rejections = _whole_targets(captured, sites, by_branch)
    closed = {target.name for target in whole}  # branches whose layers have no treatment
    closed |= {name for name, treatment in by_branch.items() if treatment.mode is SiteMode.FULL}
    open_sites = [site for site in sites.linears if site.branch not in closed]
    by_site = _site_treatments(open_sites, by_branch, default, rules)
    layers = _layer_targets(open_sites, by_site, joint=joint)
    targets = _with_ranks(_in_graph_order([*whole, *layers], captured), ranks)
    return tuple(targets), tuple(rejections)


def _in_graph_order(
    targets: Sequence[CalibrationTarget], captured: CapturedGraph
) -> list[CalibrationTarget]:
    place = {node.name: number for number, node in enumerate(captured.graph.nodes)}
    return sorted(targets, key=lambda target: place[target.nodes[0]])


def _whole_targets(
    captured: CapturedGraph, sites: Sites, treatments: Mapping[str, Treatment]
) -> tuple[list[CalibrationTarget], list[Rejection]]:
    """Branches that are one target, and those that were to be and cannot."""
    targets: list[CalibrationTarget] = []
    rejections: list[Rejection] = []
    for branch in sites.branches:
        treatment = treatments[branch.name]
        if treatment.mode is SiteMode.FULL or not treatment.is_whole:
            continue
        reason = _reason_against(captured, branch) if treatment.rank else None
        if reason is None:
            inside = [site.name for site in sites.linears if site.branch == branch.name]
            targets.append(_branch_target(captured, branch, inside, treatment))
        else:
            rejections.append(Rejection(branch.name, branch.exits[0], reason))
    return targets, rejections


def _site_treatments(
    sites: Sequence[LinearSite],
    by_branch: Mapping[str, Treatment],
    default: Treatment,
    rules: Sequence[SiteRule],
) -> dict[str, Treatment]:
    """What is done with layers, by name: as with their branch, where no rule says otherwise."""
    treatments: dict[str, Treatment] = {}
    for site in sites:
        outer = default if site.branch is None else by_branch[site.branch]
        treatments[site.name] = outer.under(_rule_for(rules, site.name))
    return treatments


def _layer_targets(
    sites: Sequence[LinearSite], treatments: Mapping[str, Treatment], *, joint: bool
) -> list[CalibrationTarget]:
    """Targets of single layers, or of sibling layers of one branch and one rank."""
    groups: dict[tuple[str | None, str, int, WeightShard | None], list[LinearSite]] = {}
    integers: list[CalibrationTarget] = []
    for site in sites:
        treatment = treatments[site.name]
        if treatment.mode is SiteMode.FULL:
            continue
        if treatment.mode is SiteMode.CALIBRATE and treatment.branch is BranchKind.INT8:
            integers.append(replace(_layer_target([site], 0), branch=BranchKind.INT8))
            continue
        rank = treatment.rank_at(site.in_features, site.out_features)
        # Before the ranks of siblings are merged: the error names the layer.
        _check_bounds(site.name, site.in_features, site.out_features, rank)
        siblings = site.input_node if joint else site.name
        groups.setdefault((site.branch, siblings, rank, site.shard), []).append(site)
    return integers + [
        target
        for (_, _, rank, _), members in groups.items()
        for target in _sibling_targets(members, rank)
    ]


def _sibling_targets(members: Sequence[LinearSite], rank: int) -> list[CalibrationTarget]:
    """One target of sites that share their input; one each where that alone is exact.

    At full rank a map is exact, and narrow siblings, as keys and values of grouped queries, cost
    less apart than one map of theirs does that is exact too.
    """
    target = _layer_target(members, rank)
    exact = all(rank == min(site.in_features, site.out_features) for site in members)
    if exact and target.rank < min(target.in_features, sum(target.out_features)):
        return [_layer_target([site], rank) for site in members]
    return [target]


def _layer_target(members: Sequence[LinearSite], rank: int) -> CalibrationTarget:
    """One target of sites that share their input: rank r' for what they cost at r apart."""
    first, outs = members[0], tuple(site.out_features for site in members)
    # One map of rank r' costs r' (in + sum of out) where the members cost sum of r (in + out).
    apart = rank * sum(site.in_features + site.out_features for site in members)
    merged = min(apart // (first.in_features + sum(outs)), first.in_features, sum(outs))
    return CalibrationTarget(
        name=_joint_name([site.name for site in members]),
        granularity=Granularity.LINEAR,
        sites=tuple(site.name for site in members),
        input_node=first.input_node,
        nodes=tuple(site.node for site in members),
        weights=tuple(site.weight for site in members),
        in_features=first.in_features,
        out_features=outs,
        tokens=first.tokens,
        rank=merged,
        shard=first.shard,
    )


def _reason_against(captured: CapturedGraph, branch: ResidualBranch) -> str | None:
    """Why a branch cannot be calibrated as one map; None where it can."""
    shapes = [shape_of(captured.node(name)) for name in branch.exits]
    if branch.entry is None or len(shapes) > 1:
        return "not one map as a whole: several latent values go in or come out"
    before = shape_of(captured.node(branch.entry))
    if len(before) < 2 or before[:-1] != shapes[0][:-1]:
        return f"not token-wise as a whole: from {before} to {shapes[0]}"
    return None


def _branch_target(
    captured: CapturedGraph,
    branch: ResidualBranch,
    inside: Sequence[str],
    treatment: Treatment,
) -> CalibrationTarget:
    shapes = [shape_of(captured.node(name)) for name in branch.exits]
    entry = branch.entry or branch.exits[0]
    in_features = shape_of(captured.node(entry))[-1]
    return CalibrationTarget(
        name=branch.name,
        granularity=Granularity.BRANCH,
        sites=tuple(inside),
        input_node=entry,
        nodes=branch.exits,
        weights=(),
        in_features=in_features,
        out_features=tuple(shape[-1] for shape in shapes),
        tokens=prod(shapes[0][:-1]),
        rank=treatment.rank_at(in_features, shapes[0][-1]),
    )


def _with_ranks(
    targets: Sequence[CalibrationTarget], ranks: Mapping[str, int]
) -> list[CalibrationTarget]:
    """The same targets, some with other ranks; all ranks are checked."""
    names = [target.name for target in targets]
    for name in ranks:
        if name not in names:
            raise PlanError(
                f"rank of {name}",
                expected="a calibration target",
                got=f"none of that name among {', '.join(names[:4])} and others",
                fix="Take the names from `optimize(model, plan).compiled.targets`.",
            )
    ranked = [replace(target, rank=ranks.get(target.name, target.rank)) for target in targets]
    for target in ranked:
        if target.rank and target.branch is BranchKind.INT8:
            raise PlanError(
                f"rank of {target.name}",
                expected="none for a calibration branch of int8",
                got=str(target.rank),
                fix="Leave it out, or choose branch='low_rank' there.",
            )
        _check_bounds(target.name, target.in_features, sum(target.out_features), target.rank)
    return ranked


def _joint_name(names: Sequence[str]) -> str:
    """`attn.q`, `attn.k` as `attn.q+k`."""
    head = names[0].rpartition(".")[0]
    prefix = f"{head}." if head and all(name.startswith(f"{head}.") for name in names) else ""
    return prefix + "+".join(name.removeprefix(prefix) for name in names)


def _rule_for(rules: Sequence[SiteRule], name: str) -> SiteRule | None:
    """The first rule that fits."""
    return next((rule for rule in rules if fnmatchcase(name, rule.pattern)), None)


def _check_rules(rules: Sequence[SiteRule], sites: Sites) -> None:
    names = [site.name for site in sites.linears] + [branch.name for branch in sites.branches]
    for rule in rules:
        of_kind("rule", rule, SiteRule, PlanError)
        if not any(fnmatchcase(name, rule.pattern) for name in names):
            raise PlanError(
                f"rule {rule.pattern}",
                expected="a pattern that fits a site or a residual branch",
                got=f"none among {', '.join(names[:4])} and others",
                fix="Mend the pattern, or drop the rule.",
            )


def _check_bounds(name: str, in_features: int, out_features: int, rank: int) -> None:
    if not 0 <= rank <= min(in_features, out_features):
        raise PlanError(
            f"rank of {name}",
            expected=f"0 .. {min(in_features, out_features)} for {in_features} -> {out_features}",
            got=str(rank),
            fix="Choose a smaller rank, or exclude it.",
        )
