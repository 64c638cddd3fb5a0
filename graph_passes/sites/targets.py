"""What a CALIBRATE step does where: calibrate, reuse or compute in full, by site and branch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from types import MappingProxyType

from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.common.rejection import Rejection
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.surgery import shape_of
from calicache.graph_passes.settings.choices import Granularity, SiteMode, SiteRule
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
        rank: r; 0 returns the anchors as they are.
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

    @property
    def calibrate_macs(self) -> int:
        """Multiply-accumulates of the calibration branch, T r (in + sum of out)."""
        return self.tokens * self.rank * (self.in_features + sum(self.out_features))


def assign(
    captured: CapturedGraph,
    sites: Sites,
    *,
    rank: int,
    granularity: Granularity = Granularity.LINEAR,
    rules: Sequence[SiteRule] = (),
    joint: bool = False,
    ranks: Mapping[str, int] = MappingProxyType({}),
) -> tuple[tuple[CalibrationTarget, ...], tuple[Rejection, ...]]:
    """Choose what every CALIBRATE step corrects.

    Args:
        captured: the plain graph.
        sites: what was found in it.
        rank: r where no rule gives one; the smaller side of a layer where that is less.
        granularity: of the calibration branches where no rule says otherwise.
        rules: exceptions; the first that fits a name counts.
        joint: solve sibling sites together, at the rank that costs the same MACs.
        ranks: r of some targets, by name; before all else.

    Returns:
        The targets in graph order, and the branches that cannot be calibrated as a whole.

    Raises:
        PlanError: a rank is larger than its layer allows, or a rule or a rank fits nothing.
    """
    _check_rules(rules, sites)
    targets: list[CalibrationTarget] = []
    rejections: list[Rejection] = []
    for branch in sites.branches:
        inside = [site for site in sites.linears if site.branch == branch.name]
        rule = _first(rules, branch.name)
        mode = rule.mode if rule else SiteMode.CALIBRATE
        own, asked = _rank(rule, rank), rule is not None and rule.rank is not None
        level = (rule.granularity if rule else None) or granularity
        if mode is SiteMode.FULL:
            continue
        if mode is SiteMode.REUSE or level is Granularity.BRANCH:
            wanted = 0 if mode is SiteMode.REUSE else own
            target = _branch_target(captured, branch, inside, wanted, capped=not asked)
            if isinstance(target, CalibrationTarget):
                targets.append(target)
                continue
            rejections.append(target)
        targets.extend(_linear_targets(inside, rules, own, joint, capped=not asked))
    stream = [site for site in sites.linears if site.branch is None]
    targets.extend(_linear_targets(stream, rules, rank, joint))
    place = {node.name: number for number, node in enumerate(captured.graph.nodes)}
    targets = _with_ranks(targets, ranks)
    targets.sort(key=lambda target: place[target.nodes[0]])
    for target in targets:
        _check_rank(target)
    return tuple(targets), tuple(rejections)


def _with_ranks(
    targets: Sequence[CalibrationTarget], ranks: Mapping[str, int]
) -> list[CalibrationTarget]:
    names = [target.name for target in targets]
    for name in ranks:
        if name not in names:
            raise PlanError(
                f"rank of {name}",
                expected="a calibration target",
                got=f"none of that name among {', '.join(names[:4])} and others",
                fix="Take the names from `optimize(model, plan).compiled.targets`.",
            )
    return [replace(target, rank=ranks.get(target.name, target.rank)) for target in targets]


def _linear_targets(
    linears: Sequence[LinearSite],
    rules: Sequence[SiteRule],
    rank: int,
    joint: bool,
    *,
    capped: bool = True,
) -> Iterator[CalibrationTarget]:
    chosen: list[tuple[LinearSite, int]] = []
    for site in linears:
        rule = _first(rules, site.name)
        if rule and rule.mode is SiteMode.FULL:
            continue
        reused = rule is not None and rule.mode is SiteMode.REUSE
        default = min(rank, site.in_features, site.out_features) if capped else rank
        chosen.append((site, 0 if reused else _rank(rule, default)))
    if not joint:
        yield from (_linear_target([site], own) for site, own in chosen)
        return
    siblings: dict[tuple[str, int], list[LinearSite]] = {}
    for site, own in chosen:
        siblings.setdefault((site.input_node, own), []).append(site)
    for (_, own), members in siblings.items():
        yield _linear_target(members, own)


def _linear_target(members: Sequence[LinearSite], rank: int) -> CalibrationTarget:
    first, outs = members[0], tuple(site.out_features for site in members)
    for site in members:  # before the ranks of siblings are merged: the error names the layer
        if not 0 <= rank <= min(site.in_features, site.out_features):
            raise _rank_error(site.name, site.in_features, site.out_features, rank)
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
    )


def _branch_target(
    captured: CapturedGraph,
    branch: ResidualBranch,
    inside: Sequence[LinearSite],
    rank: int,
    *,
    capped: bool,
) -> CalibrationTarget | Rejection:
    shapes = [shape_of(captured.node(name)) for name in branch.exits]
    entry = branch.entry or branch.exits[0]
    if rank:
        if branch.entry is None or len(shapes) > 1:
            reason = "not one map as a whole: several latent values go in or come out"
            return Rejection(branch.name, branch.exits[0], reason)
        before = shape_of(captured.node(entry))
        rank = min(rank, before[-1], shapes[0][-1]) if capped else rank
        if len(before) < 2 or before[:-1] != shapes[0][:-1]:
            reason = f"not token-wise as a whole: from {before} to {shapes[0]}"
            return Rejection(branch.name, branch.exits[0], reason)
    return CalibrationTarget(
        name=branch.name,
        granularity=Granularity.BRANCH,
        sites=tuple(site.name for site in inside),
        input_node=entry,
        nodes=branch.exits,
        weights=(),
        in_features=shape_of(captured.node(entry))[-1],
        out_features=tuple(shape[-1] for shape in shapes),
        tokens=prod(shapes[0][:-1]),
        rank=rank,
    )


def _joint_name(names: Sequence[str]) -> str:
    """`attn.q`, `attn.k` as `attn.q+k`."""
    head = names[0].rpartition(".")[0]
    prefix = f"{head}." if head and all(name.startswith(f"{head}.") for name in names) else ""
    return prefix + "+".join(name.removeprefix(prefix) for name in names)


def _first(rules: Sequence[SiteRule], name: str) -> SiteRule | None:
    return next((rule for rule in rules if fnmatchcase(name, rule.pattern)), None)


def _rank(rule: SiteRule | None, default: int) -> int:
    return default if rule is None or rule.rank is None else rule.rank


def _check_rules(rules: Sequence[SiteRule], sites: Sites) -> None:
    names = [site.name for site in sites.linears] + [branch.name for branch in sites.branches]
    for rule in rules:
        if not any(fnmatchcase(name, rule.pattern) for name in names):
            raise PlanError(
                f"rule {rule.pattern}",
                expected="a pattern that fits a site or a residual branch",
                got=f"none among {', '.join(names[:4])} and others",
                fix="Mend the pattern, or drop the rule.",
            )


def _check_rank(target: CalibrationTarget) -> None:
    if not 0 <= target.rank <= min(target.in_features, sum(target.out_features)):
        raise _rank_error(target.name, target.in_features, sum(target.out_features), target.rank)


def _rank_error(name: str, in_features: int, out_features: int, rank: int) -> PlanError:
    return PlanError(
        f"rank of {name}",
        expected=f"0 .. {min(in_features, out_features)} for {in_features} -> {out_features}",
        got=str(rank),
        fix="Choose a smaller rank, or exclude it.",
    )
