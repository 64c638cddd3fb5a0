"""Where a cache can go: linear sites and the residual branches that hold them.

Residual branches are found by structure alone: an `add` on the latent stream whose one
operand (the skip) comes, through data movement only, from a value that the other operand is
computed from. Dominators give the branch's single entry and single exit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile

import networkx as nx
import torch
from torch import fx

from calicache.graph_passes.capture import CapturedGraph, module_path, shape_of
from calicache.graph_passes.dependence import Dependence
from calicache.graph_passes.errors import SiteError

aten = torch.ops.aten

LINEAR = aten.linear.default
ADD = aten.add.Tensor
DATA_MOVEMENT = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.permute.default,
        aten.transpose.int,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.to.dtype,
        aten._to_copy.default,
    }
)
_SOURCE, _SINK = "<source>", "<sink>"


@dataclass(frozen=True, slots=True)
class LinearSite:
    """A linear layer y = W x + b, applied per token, that depends on the latent.

    Attributes:
        name: dotted module path, such as `blocks.3.mlp.fc1`.
        node: its node; `input_node` is x.
        weight: `get_attr` target of W (out, in); `bias` that of b, or None.
        in_features, out_features: sizes of x and y per token.
        tokens: rows of x in one call, over batch and sequence.
        branch: name of the residual branch that holds it.
    """

    name: str
    node: str
    input_node: str
    weight: str
    bias: str | None
    in_features: int
    out_features: int
    tokens: int
    branch: str


@dataclass(frozen=True, slots=True)
class SiblingGroup:
    """Sites that read the same input, such as q, k and v."""

    input_node: str
    sites: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ResidualBranch:
    """A part of the graph between the value it starts from and the add that joins it again.

    Attributes:
        name: common module path of its linear layers.
        entry: node the branch starts from; not part of it.
        exit: last node of the branch; REUSE replaces its value.
        join: the add of skip and branch.
        nodes: all nodes of the branch, `exit` included, in graph order.
    """

    name: str
    entry: str
    exit: str
    join: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SiteRejection:
    """Something that looked like a site or a branch and is left alone, with the reason."""

    name: str
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Sites:
    """All that `find_sites` found, in graph order."""

    linears: tuple[LinearSite, ...]
    groups: tuple[SiblingGroup, ...]
    branches: tuple[ResidualBranch, ...]
    rejections: tuple[SiteRejection, ...]


def find_sites(
    captured: CapturedGraph,
    classes: Mapping[str, Dependence],
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> Sites:
    """Find every latent-dependent, token-wise linear layer inside a residual branch.

    Args:
        captured: the graph.
        classes: class of every node, from `classify_nodes`.
        include: shell patterns; a site needs to match one.
        exclude: shell patterns; a site may match none.

    Raises:
        SiteError: nothing is left to calibrate; the reasons are in the message.
    """
    latent = _latent_graph(captured.graph, classes)
    branches, rejections = _find_branches(captured.graph, latent)
    owner = {node: branch.name for branch in branches for node in branch.nodes}
    names = _unique_names(node for node in captured.graph.nodes if node.target is LINEAR)
    linears: list[LinearSite] = []
    for node in captured.graph.nodes:
        if node.target is not LINEAR or classes[node.name] is not Dependence.LATENT:
            continue
        site = _linear_site(node, names[node.name], classes, owner.get(node.name))
        if isinstance(site, LinearSite):
            reason = _pattern_reason(site.name, include, exclude)
            site = SiteRejection(site.name, site.node, reason) if reason else site
        if isinstance(site, LinearSite):
            linears.append(site)
        else:
            rejections.append(site)
    if not linears:
        reasons = "; ".join(f"{r.name}: {r.reason}" for r in rejections[:5])
        raise SiteError(
            "model",
            expected="a latent-dependent linear layer inside a residual branch",
            got=f"none ({reasons or 'the graph has no linear layer on the latent stream'})",
            fix="Check the include and exclude patterns, and that the model is a transformer.",
        )
    held = {site.branch for site in linears}
    kept = tuple(branch for branch in branches if branch.name in held)
    return Sites(tuple(linears), _groups(linears), kept, tuple(rejections))


def _linear_site(
    node: fx.Node, name: str, classes: Mapping[str, Dependence], branch: str | None
) -> LinearSite | SiteRejection:
    source, weight, bias = (*node.args, None)[:3]
    assert isinstance(source, fx.Node)
    assert isinstance(weight, fx.Node)
    bias = bias or node.kwargs.get("bias")
    if weight.op != "get_attr" or (isinstance(bias, fx.Node) and bias.op != "get_attr"):
        return SiteRejection(name, node.name, "its weight or bias is computed, not a parameter")
    if classes[source.name] is not Dependence.LATENT:
        return SiteRejection(name, node.name, "its input does not depend on the latent")
    shape = shape_of(source)
    if len(shape) < 3:
        return SiteRejection(name, node.name, f"not token-wise: its input has shape {shape}")
    if branch is None:
        return SiteRejection(name, node.name, "outside every residual branch")
    out_features, in_features = shape_of(weight)
    tokens = 1
    for size in shape[:-1]:
        tokens *= size
    return LinearSite(
        name=name,
        node=node.name,
        input_node=source.name,
        weight=str(weight.target),
        bias=str(bias.target) if isinstance(bias, fx.Node) else None,
        in_features=in_features,
        out_features=out_features,
        tokens=tokens,
        branch=branch,
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


def _latent_graph(graph: fx.Graph, classes: Mapping[str, Dependence]) -> nx.DiGraph:
    """Data flow between latent nodes, from one source (the inputs) to one sink (the output)."""
    flow = nx.DiGraph()
    for node in graph.nodes:
        if classes[node.name] is not Dependence.LATENT:
            continue
        name = _SINK if node.op == "output" else node.name
        sources = [n for n in node.all_input_nodes if classes[n.name] is Dependence.LATENT]
        flow.add_edges_from((source.name, name) for source in sources)
        if not sources:
            flow.add_edge(_SOURCE, name)
    return flow


def _find_branches(
    graph: fx.Graph, latent: nx.DiGraph
) -> tuple[list[ResidualBranch], list[SiteRejection]]:
    dominator = nx.immediate_dominators(latent, _SOURCE)
    post_dominator = nx.immediate_dominators(latent.reverse(copy=False), _SINK)
    order = {node.name: place for place, node in enumerate(graph.nodes)}
    found: list[tuple[fx.Node, str, set[str], str]] = []
    rejections: list[SiteRejection] = []
    for join in graph.nodes:
        if join.target is not ADD or join.name not in latent:
            continue
        for skip, last in _skip_candidates(join, latent):
            nodes = _between(latent, skip, last)
            reason = _not_single(skip, last, join.name, nodes, dominator, post_dominator)
            if reason:
                rejections.append(SiteRejection(_label([join]), join.name, reason))
            else:
                found.append((join, skip, nodes, last))
    joins = {join.name for join, *_ in found}
    branches: list[ResidualBranch] = []
    taken: Counter[str] = Counter()
    by_name = {node.name: node for node in graph.nodes}
    for join, skip, nodes, last in found:
        linears = [by_name[name] for name in nodes if by_name[name].target is LINEAR]
        label = _label(linears or [join])
        inner = nodes & joins
        if inner:
            reason = f"contains other residual branches (joined at {min(inner, key=order.get)})"  # type: ignore[arg-type]
            rejections.append(SiteRejection(label, join.name, reason))
        elif linears:
            taken[label] += 1
            name = label if taken[label] == 1 else f"{label}@{taken[label] - 1}"
            ordered = tuple(sorted(nodes, key=order.__getitem__))
            branches.append(ResidualBranch(name, skip, last, join.name, ordered))
        else:
            rejections.append(SiteRejection(label, join.name, "the branch has no linear layer"))
    return branches, rejections


def _skip_candidates(join: fx.Node, latent: nx.DiGraph) -> Iterator[tuple[str, str]]:
    """(entry, exit) of the branch joined here: the skip comes from what the exit needs."""
    first, second = join.args[:2]
    for skip, last in ((first, second), (second, first)):
        if not (isinstance(skip, fx.Node) and isinstance(last, fx.Node)):
            continue
        if skip.name not in latent or last.name not in latent or skip is last:
            continue
        root = skip
        while root.target in DATA_MOVEMENT:
            root = root.all_input_nodes[0]
        if root is not last and nx.has_path(latent, root.name, last.name):
            yield root.name, last.name


def _between(latent: nx.DiGraph, entry: str, last: str) -> set[str]:
    return (nx.descendants(latent, entry) & nx.ancestors(latent, last)) | {last}


def _not_single(
    entry: str,
    last: str,
    join: str,
    nodes: set[str],
    dominator: Mapping[str, str],
    post_dominator: Mapping[str, str],
) -> str | None:
    """Why the branch is not one part with a single entry and a single exit; None if it is."""
    if entry not in _chain(dominator, last):
        return f"the branch has an entry besides {entry}"
    if dominator.get(join) != entry:
        return f"the skip path of the add does not start at {entry} alone"
    for name in sorted(nodes):
        if last not in {name, *_chain(post_dominator, name)}:
            return f"{name} inside the branch is also used outside it"
    return None


def _chain(parents: Mapping[str, str], name: str) -> list[str]:
    """The dominators of a node, nearest first."""
    chain: list[str] = []
    while name in parents and parents[name] != name:
        name = parents[name]
        chain.append(name)
    return chain


def _label(nodes: Sequence[fx.Node]) -> str:
    """Common module path of some nodes."""
    paths = [module_path(node).split("@")[0].split(".") for node in nodes]
    if len(paths) == 1 and len(paths[0]) > 1 and nodes[0].target is LINEAR:
        paths = [paths[0][:-1]]
    common = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in common) or "model"


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
