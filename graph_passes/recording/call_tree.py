"""The nesting of a call's arguments: dicts, lists and tuples, and nothing else.

A tree comes from files too, so it holds names of containers alone and never a class to import.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from calicache.graph_passes.common.errors import RecordError

MAX_DEPTH = 32  # of nesting; far below where a walk over it could run out of stack
Key = str | int
_FIX = "Pass plain containers of tensors, numbers, strings and None, with texts as keys."


class Container(StrEnum):
    """What holds arguments together."""

    DICT = "dict"
    LIST = "list"
    TUPLE = "tuple"


@dataclass(frozen=True, slots=True)
class CallTree:
    """One container of arguments.

    Attributes:
        kind: which.
        keys: of a dict, in order; none for the others.
        children: what it holds; None stands for a value.

    Raises:
        RecordError: keys and children do not fit together.
    """

    kind: Container
    keys: tuple[Key, ...]
    children: tuple[CallTree | None, ...]

    def __post_init__(self) -> None:
        wanted = len(self.children) if self.kind is Container.DICT else 0
        if len(self.keys) != wanted or len(set(self.keys)) != wanted:
            raise _refused(
                "arguments",
                f"{wanted} different keys of a {self.kind.value}",
                f"{len(self.keys)}, {len(set(self.keys))} of them different",
            )


def flatten(value: Any, name: str = "", depth: int = 0) -> tuple[CallTree | None, dict[str, Any]]:
    """The nesting of a value, and what is inside by dotted name.

    Args:
        value: a container, or anything else, which is a leaf.
        name: of the value itself.
        depth: how deep in others it is.

    Raises:
        RecordError: a key that is no text or integer, nesting without end, or two leaves of one
            dotted name.
    """
    kind = _KINDS.get(type(value))
    if kind is None:
        return None, {name: value}
    _check_depth(depth)
    keys = tuple(value) if kind is Container.DICT else tuple(range(len(value)))
    wrong = [key for key in keys if type(key) not in (str, int)]
    if wrong:
        raise _refused(name or "arguments", "texts or integers as keys", repr(wrong[0]))
    children: list[CallTree | None] = []
    leaves: dict[str, Any] = {}
    for key, item in zip(keys, value.values() if kind is Container.DICT else value, strict=True):
        child, inside = flatten(item, _dotted(name, key), depth + 1)
        _check_names(leaves, inside)
        children.append(child)
        leaves |= inside
    return CallTree(kind, keys if kind is Container.DICT else (), tuple(children)), leaves


def leaf_names(tree: CallTree | None, name: str = "", depth: int = 0) -> Iterator[str]:
    """Dotted names of the leaves, in order.

    Raises:
        RecordError: nesting deeper than any recorded call has.
    """
    if tree is None:
        yield name
        return
    _check_depth(depth)
    keys: Sequence[Key] = tree.keys if tree.kind is Container.DICT else range(len(tree.children))
    for key, child in zip(keys, tree.children, strict=True):
        yield from leaf_names(child, _dotted(name, key), depth + 1)


def unflatten(tree: CallTree | None, leaves: Iterator[Any]) -> Any:
    """The value that `flatten` took apart.

    Args:
        tree: its nesting.
        leaves: what is inside, in order.
    """
    if tree is None:
        return next(leaves)
    children = [unflatten(child, leaves) for child in tree.children]
    if tree.kind is Container.DICT:
        return dict(zip(tree.keys, children, strict=True))
    return tuple(children) if tree.kind is Container.TUPLE else children


_KINDS: Mapping[type, Container] = {
    dict: Container.DICT,
    list: Container.LIST,
    tuple: Container.TUPLE,
}


def _dotted(name: str, key: Key) -> str:
    return f"{name}.{key}" if name else str(key)


def _check_names(leaves: Mapping[str, Any], inside: Mapping[str, Any]) -> None:
    twice = next((name for name in inside if name in leaves), None)
    if twice is not None:
        raise RecordError(
            twice,
            expected="one argument of that name",
            got="two, by way of a key with a dot in it",
            fix="Rename the key.",
        )


def _check_depth(depth: int) -> None:
    if depth >= MAX_DEPTH:
        raise _refused("arguments", f"nesting of {MAX_DEPTH} containers at the most", "more")


def _refused(where: str, expected: str, got: str) -> RecordError:
    return RecordError(where, expected=expected, got=got, fix=_FIX)
