"""The nesting of a call: plain containers alone, bounded, and the same after a file."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from calicache.graph_passes.common.errors import RecordError
from calicache.graph_passes.recording.call_tree import (
    MAX_DEPTH,
    CallTree,
    Container,
    flatten,
    leaf_names,
    unflatten,
)

TREES = TypeAdapter(CallTree)
VALUE = {"a": [1, (), {}], 3: ({"b": None}, "x")}


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


def test_a_value_is_taken_apart_and_rebuilt_again_by_way_of_json() -> None:
    tree, leaves = flatten(VALUE)
    assert tree is not None
    assert leaves == {"a.0": 1, "3.0.b": None, "3.1": "x"}
    again = TREES.validate_json(TREES.dump_json(tree), strict=True)
    assert again == tree
    assert [*leaf_names(again)] == [*leaves]
    rebuilt = unflatten(again, iter(leaves.values()))
    assert repr(rebuilt) == repr(VALUE)  # lists stay lists, keys and their order what they are


@pytest.mark.parametrize(
    "value", [OrderedDict(a=1), defaultdict(list), deque([1]), {1, 2}], ids=lambda v: type(v)
)
def test_other_containers_are_leaves(value: Any) -> None:
    assert flatten([value])[1] == {"0": value}


@pytest.mark.parametrize("key", [1.5, None, True, (1, 2)])
def test_keys_that_json_does_not_keep_are_refused(key: Any) -> None:
    with pytest.raises(RecordError) as caught:
        flatten({"a": {key: 1}})
    assert str(caught.value) == (
        f"record: a: expected texts or integers as keys, got {key!r}. "
        "Pass plain containers of tensors, numbers, strings and None, with texts as keys."
    )


def test_nesting_is_bounded() -> None:
    assert flatten(nested(MAX_DEPTH))[1] == {".".join("0" * MAX_DEPTH): 1}
    endless: list[Any] = []
    endless.append(endless)
    for value in (nested(MAX_DEPTH + 1), endless):
        with pytest.raises(RecordError, match="arguments: expected nesting of 32 containers"):
            flatten(value)
    deep: CallTree | None = None
    for _ in range(MAX_DEPTH + 1):
        deep = CallTree(Container.LIST, (), (deep,))
    with pytest.raises(RecordError, match="arguments: expected nesting of 32 containers"):
        list(leaf_names(deep))


FORGED = {
    "another kind": '{"kind": "collections.defaultdict", "keys": [], "children": []}',
    "a class": '{"kind": {"type": "x", "context": "[\\"os\\", \\"system\\"]"}, "keys": []}',
    "a key that is no text": '{"kind": "dict", "keys": [1.5], "children": [null]}',
    "a text": '"[1, {}]"',
    "very deep": '{"kind": "list", "keys": [], "children": [' * 500,
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_tree_is_refused(case: str) -> None:
    with pytest.raises(ValidationError):
        TREES.validate_json(FORGED[case], strict=True)


@pytest.mark.parametrize(
    ("kind", "keys", "children"), [("dict", [], 1), ("dict", ["a", "a"], 2), ("list", ["a"], 1)]
)
def test_keys_that_do_not_fit_are_refused(kind: str, keys: list[str], children: int) -> None:
    with pytest.raises(RecordError, match=r"arguments: expected \d different keys of a"):
        TREES.validate_python(
            {"kind": Container(kind), "keys": tuple(keys), "children": (None,) * children}
        )
