"""Residual branches, found by structure alone.

An `add` on the latent stream joins a branch where its one operand (the skip) comes, through
data movement only, from a value that the other operand is computed from. Dominators give the
branch's single entry and single exit. No class names, no registry of blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import networkx as nx
import torch
from torch import fx

from calicache.graph_passes.capture import module_path
from calicache.graph_passes.dependence import Dependence

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


def find_branches(
    graph: fx.Graph, classes: Mapping[str, Dependence]
) -> tuple[list[ResidualBranch], list[SiteRejection]]:
    """Find the residual branches that hold a linear layer and no other branch.

    Args:
        graph: the plain graph.
        classes: class of every node, from `classify_nodes`.

    Returns:
        The branches in graph order, and what looked like one and is not, with the reason.
    """
    latent = _latent_graph(graph, classes)
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
            reason = _not_single(skip, last, nodes, dominator, post_dominator)
            if reason:
                rejections.append(SiteRejection(_label([join]), join.name, reason))
            else:
                found.append((join, skip, nodes, last))
    by_name = {node.name: node for node in graph.nodes}
    # An add without a linear layer, as in an activation written by hand, hides no branch.
    joins = {join.name for join, _, nodes, _ in found if _linears(nodes, by_name)}
    branches: list[ResidualBranch] = []
    taken: Counter[str] = Counter()
    for join, skip, nodes, last in found:
        linears = _linears(nodes, by_name)
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


def _linears(nodes: Iterable[str], by_name: Mapping[str, fx.Node]) -> list[fx.Node]:
    return [by_name[name] for name in nodes if by_name[name].target is LINEAR]


def _skip_candidates(join: fx.Node, latent: nx.DiGraph) -> Iterator[tuple[str, str]]:
    """(entry, exit) of the branch joined here: the skip comes from what the exit needs."""
    first, second = join.args[:2]
    for skip, last in ((first, second), (second, first)):
        if not (isinstance(skip, fx.Node) and isinstance(last, fx.Node)):
            continue
        if skip.name not in latent or last.name not in latent or skip is last:
            continue
        root = skip
        while root.target in DATA_MOVEMENT and not nx.has_path(latent, root.name, last.name):
            root = root.all_input_nodes[0]
        if root is not last and nx.has_path(latent, root.name, last.name):
            yield root.name, last.name


def _between(latent: nx.DiGraph, entry: str, last: str) -> set[str]:
    inside: set[str] = nx.descendants(latent, entry) & nx.ancestors(latent, last)
    return inside | {last}


def _not_single(
    entry: str,
    last: str,
    nodes: set[str],
    dominator: Mapping[str, str],
    post_dominator: Mapping[str, str],
) -> str | None:
    """Why the branch is not one part with a single entry and a single exit; None if it is."""
    if entry not in _chain(dominator, last):
        return f"the branch has an entry besides {entry}"
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
