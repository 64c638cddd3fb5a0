"""Arguments of a wrong kind or range: what is refused, in which words, and what is taken."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calicache.graph_passes.common.arguments import (
    number,
    numbers,
    of_kind,
    path_of,
    texts,
    whole_number,
)
from calicache.graph_passes.common.errors import PlanError, RunError


def message(call: Callable[[], object], kind: type[Exception] = PlanError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_of_any_library_become_plain_ones(value: Any) -> None:
    got = whole_number("rank", value, PlanError, 0)
    assert (got, type(got)) == (3, int)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (2.0, "2.0"),
        ("3", "'3'"),
        (None, "None"),
        (True, "True"),
        ([3], "[3]"),
        (np.float32(3), "np.float32(3.0)"),
        (torch.tensor(3.0), "tensor(3.)"),
        ("x" * 100, "a value of the class str"),
    ],
)
def test_what_is_no_whole_number_is_told(value: Any, got: str) -> None:
    assert message(lambda: whole_number("rank", value, PlanError, 0, 7)) == (
        f"plan: rank: expected a whole number, 0 .. 7, got {got}. Give such a value as rank."
    )


@pytest.mark.parametrize(
    ("value", "most", "fix", "told"),
    [
        (-1, None, "", "expected 0 or more, got -1. Raise rank."),
        (-1, 7, "", "expected 0 .. 7, got -1. Raise rank."),
        (8, 7, "", "expected 0 .. 7, got 8. Lower rank."),
        (8, 7, "Mend it.", "expected 0 .. 7, got 8. Mend it."),
    ],
)
def test_numbers_out_of_range_are_told_the_range(
    value: int, most: int | None, fix: str, told: str
) -> None:
    assert message(lambda: whole_number("rank", value, PlanError, 0, most, fix)) == (
        f"plan: rank: {told}"
    )
    assert whole_number("rank", 0, PlanError, 0, most, fix) == 0


@pytest.mark.parametrize("value", [2, 2.0, np.float16(2), np.int64(2), torch.tensor([2.0])])
def test_numbers_of_any_library_become_plain_ones(value: Any) -> None:
    got = number("budget", value, PlanError)
    assert (got, type(got)) == (2.0, float)


@pytest.mark.parametrize(
    "value", ["2", b"2", None, True, [2], torch.ones(2), 1 + 2j, torch.ones(1, device="meta")]
)
def test_what_is_no_number_is_refused_by_the_error_of_the_caller(value: Any) -> None:
    got = f"{value!r}"
    assert message(lambda: number("budget", value, RunError), RunError) == (
        f"run: budget: expected a number, got {got}. Give such a value as budget."
    )


def test_a_value_of_another_class_is_refused() -> None:
    assert of_kind("plan", 3, int, PlanError) == 3
    assert message(lambda: of_kind("plan", "p", int, PlanError)) == (
        "plan: plan: expected a value of the class int, got 'p'. Give such a value as plan."
    )


@pytest.mark.parametrize("value", [["a", "b"], ("a", "b"), {"a": 1, "b": 2}, iter(["a", "b"])])
def test_texts_are_taken_from_what_holds_several(value: Any) -> None:
    assert texts("include", value, PlanError) == ("a", "b")


@pytest.mark.parametrize("value", ["blocks.*", 3, None, [1], ["a", None]])
def test_one_text_and_what_is_none_are_refused(value: Any) -> None:
    assert message(lambda: texts("include", value, PlanError)) == (
        f"plan: include: expected a list or tuple of texts, got {value!r}. "
        "Give such a value as include."
    )


class Place(os.PathLike[str]):
    def __fspath__(self) -> str:
        return "a/b"


@pytest.mark.parametrize("value", ["a/b", Path("a/b"), Place()])
def test_paths_are_texts_or_path_like(value: Any) -> None:
    assert path_of(value, PlanError) == Path("a/b")


@pytest.mark.parametrize("value", [3, None, b"a", "a\0b", ["a"]])
def test_what_is_no_path_is_refused(value: Any) -> None:
    assert message(lambda: path_of(value, PlanError)) == (
        f"plan: path: expected a path as text, without a zero byte, got {value!r}. "
        "Give such a value as path."
    )


@pytest.mark.parametrize(
    "value", [[1, 2.5], (1, 2.5), torch.tensor([1, 2.5]), np.array([1, 2.5]), iter([1, 2.5])]
)
def test_numbers_are_taken_from_what_holds_several(value: Any) -> None:
    assert numbers("timesteps", value, PlanError) == (1.0, 2.5)


@pytest.mark.parametrize("value", ["12", 3, None, [], torch.tensor(3.0)])
def test_one_number_and_none_are_refused(value: Any) -> None:
    with pytest.raises(PlanError, match="timesteps: expected a list of numbers"):
        numbers("timesteps", value, PlanError)


@pytest.mark.parametrize("value", [[1, None], torch.zeros(2, 2), ["12"]])
def test_several_that_are_no_numbers_are_refused(value: Any) -> None:
    with pytest.raises(PlanError, match="timesteps: expected a number"):
        numbers("timesteps", value, PlanError)
