"""Sizes in terms of those that are left open: fitted, printed, solved."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from calicache.export.artifact.open_sizes import Axis, SizeFormula, Sizes, fitted_formula

BATCH, PROMPT, TOKENS = Axis.BATCH, Axis.PROMPT, Axis.TOKENS
FIRST = {BATCH: 2, PROMPT: 5, TOKENS: 11}
# One axis moved at a time, and all of them.
POINTS = (
    FIRST,
    {**FIRST, BATCH: 3},
    {**FIRST, PROMPT: 7},
    {**FIRST, TOKENS: 13},
    {BATCH: 17, PROMPT: 19, TOKENS: 23},
)

FORMULAS: dict[str, Callable[[Sizes], int]] = {
    "7": lambda _: 7,
    "batch": lambda s: s[BATCH],
    "2*batch": lambda s: 2 * s[BATCH],
    "prompt": lambda s: s[PROMPT],
    "prompt + tokens": lambda s: s[PROMPT] + s[TOKENS],
    "2*tokens - 3": lambda s: 2 * s[TOKENS] - 3,
    "batch*tokens": lambda s: s[BATCH] * s[TOKENS],
    "batch*(prompt + 4*tokens + 1)": lambda s: s[BATCH] * (s[PROMPT] + 4 * s[TOKENS] + 1),
    "-1*prompt": lambda s: -s[PROMPT],
}


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_fitted_and_printed(text: str) -> None:
    size = FORMULAS[text]
    formula = fitted_formula([*map(size, POINTS)], POINTS)
    assert formula is not None
    assert str(formula) == text
    other = {BATCH: 4, PROMPT: 6, TOKENS: 9}
    assert formula.at(other) == size(other)


@pytest.mark.parametrize(
    "size",
    [
        lambda s: s[BATCH] ** 2,
        lambda s: s[PROMPT] * s[TOKENS],
        lambda s: s[TOKENS] ** 2,
        lambda s: s[BATCH] + s[TOKENS],
        lambda s: max(s[PROMPT], 6),
    ],
)
def test_what_is_no_sum_per_sample_is_none(size: Callable[[Sizes], int]) -> None:
    assert fitted_formula([*map(size, POINTS)], POINTS) is None


def test_shares_of_tokens_have_a_divisor() -> None:
    points = ({TOKENS: 8}, {TOKENS: 12}, {TOKENS: 20})
    formula = fitted_formula([2, 3, 5], points)
    assert formula == SizeFormula(per_sample=False, constant=0, factors={TOKENS: 1}, divisor=4)
    assert str(formula) == "tokens/4"
    assert formula.at({TOKENS: 40}) == 10
    assert formula.solved(10, {}) == 40


def test_an_axis_is_solved_from_a_size() -> None:
    joint = SizeFormula(per_sample=True, constant=1, factors={PROMPT: 1, TOKENS: 4})
    size = joint.at({BATCH: 3, PROMPT: 5, TOKENS: 2})
    assert size == 3 * (5 + 8 + 1)
    assert joint.solved(size, {BATCH: 3, PROMPT: 5}) == 2
    assert joint.solved(size, {PROMPT: 5, TOKENS: 2}) == 3
    assert joint.solved(size + 1, {BATCH: 3, PROMPT: 5}) is None
    assert joint.solved(size + 3, {BATCH: 3, PROMPT: 5}) is None
    empty = SizeFormula(per_sample=True, constant=0, factors={})
    assert empty.solved(4, {}) is None
