"""Residual branches, found by structure alone.

An `add` on the latent stream joins a branch where its one operand (the skip) comes, through data
movement only, from a value that the other operand, the exit, is computed from. Exits whose inner
parts overlap are one branch: the text and the image side of a joint attention, attention and MLP
side by side. What only the exits need is inside. No class names, no registry of blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import networkx as nx
import torch
from torch import Tensor, fx

from calicache.graph_passes.common.rejection import Rejection
from calicache.graph_passes.graph.operations import ADD, DATA_MOVEMENT, LINEAR
from calicache.graph_passes.graph.surgery import module_path
from calicache.graph_passes.recording.input_classes import Dependence

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class ResidualBranch:
    """A part of the graph between the residual streams it reads and the adds that join it again.

    Attributes:
        name: common module path of its linear layers.
        entry: the one latent value that goes into it; None where there are several.
        exits: the values that REUSE replaces, in graph order; one for each join.
        joins: the adds of skip and exit.
        nodes: all nodes that only the exits need, exits included, in graph order.
    """

    name: str
    entry: str | None
    exits: tuple[str, ...]
    joins: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Join:
    """An add, the value its skip comes from, its exit, and the latent nodes between the two."""

    node: fx.Node
    root: fx.Node
    exit: fx.Node
    inside: frozenset[str]


def find_branches(
    graph: fx.Graph, classes: Mapping[str, Dependence]
) -> tuple[list[ResidualBranch], list[Rejection]]:
    """Find the residual branches that hold a linear layer and no chain of other branches.

    Args:
        graph: the plain graph.
        classes: class of every node, from `classify_nodes`.

    Returns:
        The branches in graph order, and what looked like one and is not, with the reason.
    """
    by_name = {node.name: node for node in graph.nodes}
    flow = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    flow.add_edges_from((source, node) for node in graph.nodes for source in node.all_input_nodes)
    joins, rejections = _accept(_find_joins(graph, classes, flow), by_name, flow)
    all_joins = frozenset(join.node.name for join in joins)
    branches: list[ResidualBranch] = []
    uses: Counter[str] = Counter()
    for group in _overlapping(joins):
        branch = _branch(group, all_joins, graph, classes)
        linears = _linears(branch.nodes, by_name)
        if not linears:
            reason = "all its linear layers are also used outside it"
            label = _label([group[0].node])
            rejections.append(Rejection(label, group[0].node.name, reason))
            continue
        label = _label(linears)
        uses[label] += 1
        name = label if uses[label] == 1 else f"{label}@{uses[label] - 1}"
        branches.append(replace(branch, name=name))
    return branches, rejections


def _accept(
    joins: Sequence[_Join], by_name: Mapping[str, fx.Node], flow: nx.DiGraph
) -> tuple[list[_Join], list[Rejection]]:
    """The joins of branches with linear layers that are no chain of others; why not the rest."""
    # An add without a linear layer, as in an activation written by hand, hides no branch.
    bare = [join for join in joins if not _linears(join.inside, by_name)]
    rejections = [
        Rejection(_label([join.node]), join.node.name, "the branch has no linear layer")
        for join in bare
    ]
    accepted: list[_Join] = []
    holding = [join for join in joins if join not in bare]
    for join in holding:
        inner = [other for other in holding if other.node.name in join.inside]
        if inner and not _takes_in(join, inner, by_name, flow):
            label = _label(_linears(join.inside, by_name))
            reason = f"contains other residual branches (joined at {inner[0].node.name})"
            rejections.append(Rejection(label, join.node.name, reason))
        else:
            accepted.append(join)
    return accepted, rejections


def _find_joins(
    graph: fx.Graph, classes: Mapping[str, Dependence], flow: nx.DiGraph
) -> list[_Join]:
    joins: dict[fx.Node, _Join] = {}
    for node in graph.nodes:
        if node.target is not ADD or classes[node.name] is not Dependence.LATENT:
            continue
        first, second = node.args[:2]
        for skip, last in ((first, second), (second, first)):
            if not (isinstance(skip, fx.Node) and isinstance(last, fx.Node)):
                continue
            if classes[last.name] is not Dependence.LATENT or not _same_shape(skip, last):
                continue
            root = _skip_root(skip, last, flow, joins)
            if root is not None:
                between = nx.descendants(flow, root) & nx.ancestors(flow, last) | {last}
                latent = (n.name for n in between if classes[n.name] is Dependence.LATENT)
                joins[node] = _Join(node, root, last, frozenset(latent))
                break
    return list(joins.values())


def _skip_root(
    skip: fx.Node, last: fx.Node, flow: nx.DiGraph, joins: Mapping[fx.Node, _Join]
) -> fx.Node | None:
    """The value that the skip carries and the exit is computed from; None without one.

    Data movement is looked through, and a join that the exit does not see: branches side by side,
    x + attention(x) + mlp(x), all start at x.
    """
    root = skip
    while root is not last:
        if nx.has_path(flow, root, last):
            return root
        if root in joins:
            root = joins[root].root
        elif root.target in DATA_MOVEMENT:
            root = root.all_input_nodes[0]
        else:
            return None
    return None


def _same_shape(first: fx.Node, second: fx.Node) -> bool:
    values = (first.meta["val"], second.meta["val"])
    return all(isinstance(value, Tensor) for value in values) and (
        values[0].shape == values[1].shape
    )


def _takes_in(
    outer: _Join, inner: Sequence[_Join], by_name: Mapping[str, fx.Node], flow: nx.DiGraph
) -> bool:
    """Whether a branch takes others in: it has layers of its own, and they are no chain."""
    covered = frozenset[str]().union(*(join.inside for join in inner))
    if not _linears(outer.inside - covered, by_name):
        return False
    return not any(nx.has_path(flow, a.node, b.exit) for a in inner for b in inner)


def _overlapping(joins: Sequence[_Join]) -> list[list[_Join]]:
    """Joins whose insides share nodes, together; in graph order of their last joins."""
    shared = nx.Graph()
    shared.add_nodes_from(range(len(joins)))
    owner: dict[str, int] = {}
    for number, join in enumerate(joins):
        shared.add_edges_from((owner.setdefault(name, number), number) for name in join.inside)
    groups = [sorted(group) for group in nx.connected_components(shared)]
    return [[joins[number] for number in group] for group in sorted(groups)]


def _branch(
    group: Sequence[_Join],
    joins: frozenset[str],
    graph: fx.Graph,
    classes: Mapping[str, Dependence],
) -> ResidualBranch:
    """The branch of some exits, still without its name: all that only they need."""
    exits = {join.exit.name for join in group}
    own = {join.node.name for join in group}
    needed: set[str] = set()  # by the exits alone
    for node in reversed(graph.nodes):
        if node.op != "call_function" or (node.name in joins and node.name not in own):
            continue
        users = {user.name for user in node.users}
        if node.name in exits or (users and users <= needed):
            needed.add(node.name)
    inside = {name for name in needed if classes[name] is Dependence.LATENT}
    nodes = [node for node in graph.nodes if node.name in inside]
    entries = {
        source.name
        for node in nodes
        for source in node.all_input_nodes
        if source.name not in inside and classes[source.name] is Dependence.LATENT
    }
    return ResidualBranch(
        name="",
        entry=entries.pop() if len(entries) == 1 else None,
        exits=tuple(node.name for node in nodes if node.name in exits),
        joins=tuple(join.node.name for join in group),
        nodes=tuple(node.name for node in nodes),
    )


def _linears(nodes: Iterable[str], by_name: Mapping[str, fx.Node]) -> list[fx.Node]:
    return [by_name[name] for name in nodes if by_name[name].target is LINEAR]


def _label(nodes: Sequence[fx.Node]) -> str:
    """Common module path of some nodes."""
    paths = [module_path(node).split("@")[0].split(".") for node in nodes]
    if len(paths) == 1 and len(paths[0]) > 1 and nodes[0].target is LINEAR:
        paths = [paths[0][:-1]]
    common = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in common) or "model"
