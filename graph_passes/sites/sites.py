"""Where a cache can go: linear layers on the latent stream, from the first branch to the last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import fx

from calicache.graph_passes.common.arguments import texts
from calicache.graph_passes.common.errors import PlanError, SiteError
from calicache.graph_passes.common.rejection import Rejection
from calicache.graph_passes.common.shards import WeightShard
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.operations import LINEAR, MATRIX_PRODUCTS
from calicache.graph_passes.graph.surgery import module_path, shape_of
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.sites.branches import ResidualBranch, find_branches

aten = torch.ops.aten
EXPERTS = "a product by weights that is no linear layer, as experts have"


@dataclass(frozen=True, slots=True)
class LinearSite:
    """A linear layer y = W x + b, applied per token, that depends on the latent.

    Attributes:
        name: dotted module path, such as `blocks.3.mlp.fc1`.
        node: its node; `input_node` is x.
        weight: `get_attr` target of W (out, in); `bias` that of b, or None.
        in_features, out_features: sizes of x and y per token.
        tokens: rows of x in one call, over batch and sequence.
        branch: name of the residual branch that holds it; None for one on the stream itself,
            between two branches.
        shard: which part of W this process has, where W is split; sizes are those of all of it.
    """

    name: str
    node: str
    input_node: str
    weight: str
    bias: str | None
    in_features: int
    out_features: int
    tokens: int
    branch: str | None
    shard: WeightShard | None = None


@dataclass(frozen=True, slots=True)
class SiblingGroup:
    """Sites that read the same input, such as q, k and v."""

    input_node: str
    sites: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sites:
    """All that `find_sites` found, in graph order."""

    linears: tuple[LinearSite, ...]
    groups: tuple[SiblingGroup, ...]
    branches: tuple[ResidualBranch, ...]
    rejections: tuple[Rejection, ...]


def find_sites(
    captured: CapturedGraph,
    classes: Mapping[str, Dependence],
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> Sites:
    """Find every latent-dependent, token-wise linear layer in a residual branch or between two.

    Args:
        captured: the graph.
        classes: class of every node, from `classify_nodes`.
        include: shell patterns; a site needs to match one.
        exclude: shell patterns; a site may match none.

    Raises:
        PlanError: the patterns are no texts.
    """
    include = texts("include", include, PlanError)
    exclude = texts("exclude", exclude, PlanError)
    branches, rejections = find_branches(captured.graph, classes)
    owner = {node: branch.name for branch in branches for node in branch.nodes}
    between = _between_branches(captured.graph, branches)
    names = _unique_names(node for node in captured.graph.nodes if node.target is LINEAR)
    linears: list[LinearSite] = []
    for node in captured.graph.nodes:
        if classes[node.name] is not Dependence.LATENT:
            continue
        if _takes_weights(node, classes):
            label = module_path(node) or node.name
            rejections.append(Rejection(label, node.name, EXPERTS))
        if node.target is not LINEAR:
            continue
        shard = captured.shards.get(str(node.args[1].target))
        site = _linear_site(node, names[node.name], owner.get(node.name), between, shard)
        if isinstance(site, LinearSite):
            reason = _pattern_reason(site.name, include, exclude)
            site = Rejection(site.name, site.node, reason) if reason else site
        if isinstance(site, LinearSite):
            linears.append(site)
        else:
            rejections.append(site)
    held = {site.branch for site in linears}
    kept = tuple(branch for branch in branches if branch.name in held)
    return Sites(tuple(linears), _groups(linears), kept, tuple(rejections))


def require_sites(sites: Sites) -> None:
    """Refuse a model without sites, whose output alone can be forecast.

    Raises:
        SiteError: nothing is left to calibrate; the reasons are in the message.
    """
    if sites.linears:
        return
    reasons = "; ".join(f"{r.name}: {r.reason}" for r in sites.rejections[:5])
    raise SiteError(
        "model",
        expected="a latent-dependent linear layer inside a residual branch",
        got=f"none ({reasons or 'the graph has no linear layer on the latent stream'})",
        fix="Check the include and exclude patterns, and that the model is a transformer.",
    )


def _takes_weights(node: fx.Node, classes: Mapping[str, Dependence]) -> bool:
    """Whether a product that is no linear layer has a matrix of weights for an operand."""
    return getattr(node.target, "overloadpacket", None) in MATRIX_PRODUCTS and any(
        classes[source.name] is Dependence.CONSTANT and len(shape_of(source)) > 1
        for source in node.all_input_nodes
    )


def _between_branches(graph: fx.Graph, branches: Sequence[ResidualBranch]) -> frozenset[str]:
    """Nodes that read what some branch gave and that some later branch joins."""
    joins = {name for branch in branches for name in branch.joins}
    after: set[str] = set()
    before: set[str] = set()
    for node in graph.nodes:
        if any(source.name in after or source.name in joins for source in node.all_input_nodes):
            after.add(node.name)
    for node in reversed(graph.nodes):
        if any(user.name in before or user.name in joins for user in node.users):
            before.add(node.name)
    return frozenset(after & before)


def _linear_site(
    node: fx.Node,
    name: str,
    branch: str | None,
    between: frozenset[str],
    shard: WeightShard | None,
) -> LinearSite | Rejection:
    source, weight, bias = (*node.args, None)[:3]
    assert isinstance(source, fx.Node)
    assert isinstance(weight, fx.Node)
    bias = bias or node.kwargs.get("bias")
    if weight.op != "get_attr" or (isinstance(bias, fx.Node) and bias.op != "get_attr"):
        return Rejection(name, node.name, "its weight or bias is computed, not a parameter")
    shape = shape_of(source)
    if len(shape) < 2:
        return Rejection(name, node.name, f"not token-wise: its input has shape {shape}")
    if branch is None and node.name not in between:
        return Rejection(name, node.name, "before the first residual branch or after the last")
    sizes = [*shape_of(weight)]
    if shard:
        sizes[shard.dim] *= shard.count
    out_features, in_features = sizes
    if not (out_features and in_features):
        return Rejection(name, node.name, "it has no channels")
    return LinearSite(
        name=name,
        node=node.name,
        input_node=source.name,
        weight=str(weight.target),
        bias=str(bias.target) if isinstance(bias, fx.Node) else None,
        in_features=in_features,
        out_features=out_features,
        tokens=prod(shape[:-1]),
        branch=branch,
        shard=shard,
    )


def _pattern_reason(name: str, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    if not any(fnmatchcase(name, pattern) for pattern in include):
        return f"matches no include pattern of {', '.join(include)}"
    hit = next((pattern for pattern in exclude if fnmatchcase(name, pattern)), None)
    return f"excluded by pattern {hit}" if hit else None


def _groups(linears: Sequence[LinearSite]) -> tuple[SiblingGroup, ...]:
    members: dict[str, list[str]] = {}
    for site in linears:
        members.setdefault(site.input_node, []).append(site.name)
    return tuple(SiblingGroup(source, tuple(names)) for source, names in members.items())


def _unique_names(nodes: Iterable[fx.Node]) -> dict[str, str]:
    """Node name to site name; a layer called twice gets `@1` at its second call."""
    seen: Counter[str] = Counter()
    names: dict[str, str] = {}
    for node in nodes:
        weight = node.args[1]
        owned = isinstance(weight, fx.Node) and weight.op == "get_attr"
        path = str(weight.target).removesuffix(".weight") if owned else module_path(node)  # type: ignore[union-attr]
        path = path or node.name
        names[node.name] = path if not seen[path] else f"{path}@{seen[path]}"
        seen[path] += 1
    return names
