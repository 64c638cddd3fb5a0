"""Which part of the model every node belongs to: a repeated block, or what is around the blocks.

Blocks are found by the module paths alone. A numbered path component makes a list, as
nn.ModuleList and nn.Sequential do; a list holds the blocks if most of its elements are alike and
have modules of their own. A module beside a list that is like its elements, as the middle of a
model with skip connections, is a block that stands alone. No class names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from calicache.graph_passes.graph.surgery import module_path

BEFORE, BETWEEN, AFTER = "before", "between", "after"
RESTS = (BEFORE, BETWEEN, AFTER)
WHOLE = "model"  # of a model without repeated blocks


@dataclass(frozen=True, slots=True)
class BlockPaths:
    """Where the blocks of a model are.

    Attributes:
        lists: dotted paths of the lists whose elements are blocks, the main one first.
        alone: dotted paths of the blocks that stand alone.
    """

    lists: tuple[str, ...]
    alone: tuple[str, ...] = ()

    def block(self, path: str) -> str | None:
        """The block that a path is in."""
        names = path.split(".")
        for name in self.lists:
            depth = name.count(".") + 1 if name else 0
            inside = ".".join(names[:depth]) == name
            if inside and names[depth : depth + 1] and names[depth].isdigit():
                return ".".join(names[: depth + 1])
        return next((name for name in self.alone if _nested(path, name)), None)


def find_blocks(paths: Iterable[str]) -> BlockPaths:
    """The lists of blocks, and the blocks beside them.

    Args:
        paths: module paths of the nodes, in graph order.
    """
    known = tuple(paths)
    lists = find_block_lists(known)
    parents = {name.rpartition(".")[0] for name in lists if name}
    elements: dict[str, set[str]] = {}
    others: dict[str, set[str]] = {}
    for path in known:
        block = BlockPaths(lists).block(path)
        if block is not None:
            elements.setdefault(block, set()).add(path[len(block) :])
        for parent in parents if block is None else ():
            if parent == "" or _nested(path, parent):
                depth = parent.count(".") + 1 if parent else 0
                name = ".".join(path.split(".")[: depth + 1])
                others.setdefault(name, set()).add(path[len(name) :])
    alone = [n for n, own in others.items() if any(_like(own, e) for e in elements.values())]
    return BlockPaths(lists, tuple(alone))


def _like(one: set[str], other: set[str]) -> bool:
    """Whether two modules have most of their modules in common, and more than a layer."""
    common = len((one & other) - {""})
    return common > 1 and 2 * common > max(len(one), len(other))


def find_block_lists(paths: Iterable[str]) -> tuple[str, ...]:
    """Dotted paths of the lists whose elements are the blocks, the main one first.

    The outermost lists with most elements win; no list inside another's element is taken.

    Args:
        paths: module paths of the nodes, in graph order.
    """
    inside: dict[str, dict[str, set[str]]] = {}
    for path in paths:
        names = path.split(".")
        for depth in (depth for depth, name in enumerate(names) if name.isdigit()):
            elements = inside.setdefault(".".join(names[:depth]), {})
            elements.setdefault(names[depth], set()).add(".".join(names[depth + 1 :]))
    alike = {name: _alike(elements.values()) for name, elements in inside.items()}
    fit = [name for name, elements in inside.items() if _holds_blocks(elements, alike[name])]
    if not fit:  # blocks of one layer each
        fit = [name for name, elements in inside.items() if len(elements) > 1]
    fit.sort(key=lambda name: (alike[name] < 2, name.count("."), -len(inside[name])))
    chosen: list[str] = []
    for name in fit:
        if not any(_nested(name, other) or _nested(other, name) for other in chosen):
            chosen.append(name)
    return tuple(chosen)


def _alike(elements: Iterable[set[str]]) -> int:
    """How many elements have the same modules inside."""
    return max(Counter(frozenset(paths - {""}) for paths in elements).values())


def _holds_blocks(elements: Mapping[str, set[str]], alike: int) -> bool:
    with_modules = sum(bool(paths - {""}) for paths in elements.values())
    return 2 * with_modules > len(elements) and 2 * alike >= len(elements)


def _nested(inner: str, outer: str) -> bool:
    return outer == "" or inner.startswith(f"{outer}.")


def find_parts(
    graph: fx.Graph, blocks: BlockPaths, known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The part of every node but the output: a block such as `blocks.3`, or a rest.

    What is in no block is `before` if blocks are computed from it, `between` if it is also
    computed from blocks, else `after`. A second call of a block is a block `blocks.3@1`.

    Args:
        graph: the plain graph, or that of a variant.
        blocks: from `find_blocks`.
        known: parts of some of the nodes by name.
    """
    nodes = [node for node in graph.nodes if node.op != "output"]
    if not blocks.lists:
        return {node.name: WHOLE for node in nodes}
    parts = dict(known or {})
    for node in nodes:
        if node.name not in parts:
            part = _block_of(node, blocks) or _source_part(node, parts)
            parts |= {node.name: part} if part else {}
    leads, comes = _to_blocks(nodes, parts), _from_blocks(nodes, parts)
    for node in nodes:
        if node.name not in parts:
            unread = node.op == "placeholder" and not node.users
            before = node in leads or unread
            parts[node.name] = (BETWEEN if node in comes else BEFORE) if before else AFTER
    for node in nodes:  # a constant made in a block has no path that tells so
        readers = {parts[user.name] for user in node.users if user.op != "output"}
        if node.op == "get_attr" and parts[node.name] in RESTS and len(readers) == 1:
            parts[node.name] = readers.pop()
    return {node.name: parts[node.name] for node in nodes}


def target_part(target: str, part: str, blocks: BlockPaths) -> str:
    """The part of a calibration target whose input or output is in a part.

    The two differ where a block reads its input as it comes from the block before. The target's
    name does not tell which call of the block it is in, the part does.
    """
    element = blocks.block(target.partition("@")[0])
    return part if element in (None, part.partition("@")[0]) else element


def _block_of(node: fx.Node, blocks: BlockPaths) -> str | None:
    """The block whose module or weight a node is, or whose target it calibrates."""
    element = blocks.block(str(node.target)) if node.op == "get_attr" else None
    for key, (module, _) in (node.meta.get("nn_module_stack") or {}).items():
        if element is None:
            element = blocks.block(str(module))
            _, at, call = str(key).rpartition("@")
            element = f"{element}@{call}" if at and element == module else element
    target = node.meta.get("calibrates")
    return target_part(target, element or "", blocks) or None if target else element


def _source_part(node: fx.Node, parts: Mapping[str, str]) -> str | None:
    """Where a node that no module made belongs: to the first block that it reads a value of."""
    if node.op != "call_function" or node.meta.get("nn_module_stack"):
        return None
    sources = [parts.get(source.name, AFTER) for source in node.all_input_nodes]
    return next((part for part in sources if part not in RESTS), None)


def _to_blocks(nodes: Sequence[fx.Node], parts: Mapping[str, str]) -> set[fx.Node]:
    """Nodes that a block, or what is before one, is computed from."""
    ancestors: set[fx.Node] = set()
    for node in reversed(nodes):
        if any(user in ancestors or parts.get(user.name, AFTER) != AFTER for user in node.users):
            ancestors.add(node)
    return ancestors


def _from_blocks(nodes: Sequence[fx.Node], parts: Mapping[str, str]) -> set[fx.Node]:
    """Nodes that are computed from a block."""
    descendants: set[fx.Node] = set()
    for node in nodes:
        sources = node.all_input_nodes
        if any(
            s in descendants or parts.get(s.name, BEFORE) not in (BEFORE, AFTER) for s in sources
        ):
            descendants.add(node)
    return descendants


def dotted_place(node: fx.Node) -> str:
    """Dotted path of what a node belongs to: its tensor, its calibration target or its module."""
    if node.op == "get_attr":
        return str(node.target).removeprefix("calibration.")
    return str(node.meta.get("calibrates") or module_path(node))
