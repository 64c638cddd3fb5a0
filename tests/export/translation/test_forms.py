"""Forms of operations: equal for equal operations, and different for anything that matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.toys import trace
from torch import Tensor

from calicache.export.translation.forms import Form, forms_of

aten = torch.ops.aten
ROWS = torch.zeros(3, 4)


def texts(function: Callable[..., Any], *inputs: Tensor) -> list[str]:
    return [form.text for form in forms_of(trace(function, *inputs)).values()]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (lambda x: x + 1, lambda x: x.sin() + 1),
        (lambda x: torch.cat([x, x.sin()]), lambda x: torch.cat([x.cos(), x.exp()])),
    ],
)
def test_operations_that_differ_in_their_values_alone_have_one_form(
    one: Callable[[Tensor], Tensor], two: Callable[[Tensor], Tensor]
) -> None:
    assert texts(one, ROWS)[-1] == texts(two, ROWS)[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "two", "inputs"),
    [
        (lambda x: x + 1, lambda x: x + 2, (ROWS, ROWS)),
        (lambda x: x + 1, lambda x: x + 1.0, (ROWS, ROWS)),
        (lambda x: x + 1, lambda x: x - 1, (ROWS, ROWS)),
        (lambda x: x + 1, lambda x: x + 1, (ROWS, ROWS[:2])),
        (lambda x: x + 1, lambda x: x + 1, (ROWS, ROWS.double())),
        (lambda x: x.split(1)[0], lambda x: x.split(1)[1], (ROWS, ROWS)),
        (lambda x: x.softmax(0), lambda x: x.softmax(1), (ROWS, ROWS)),
    ],
)
def test_numbers_dtypes_shapes_and_items_tell_forms_apart(
    one: Callable[[Tensor], Tensor],
    two: Callable[[Tensor], Tensor],
    inputs: tuple[Tensor, Tensor],
) -> None:
    assert texts(one, inputs[0]) != texts(two, inputs[1])


def test_a_value_read_twice_is_one_source() -> None:
    module = trace(lambda x, y: (x * x, x * y), ROWS, ROWS)
    same, other = forms_of(module).values()
    assert [len(form.sources) for form in (same, other)] == [1, 2]
    assert same.text != other.text


def test_items_are_those_that_are_read() -> None:
    module = trace(lambda x: (x.split(1)[2], x.split(1)[0]), ROWS)
    forms: list[Form] = list(forms_of(module).values())
    assert [form.items for form in forms] == [(2,), (0,)]
