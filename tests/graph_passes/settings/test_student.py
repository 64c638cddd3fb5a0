"""Quantiles of Student's t against published tables, and its limits."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest

from calicache.graph_passes.settings.student import student_quantile

# Student's t, one-sided, as in the tables of statistics books: three decimals.
TABLE = {
    (0.95, 1): 6.314,
    (0.95, 4): 2.132,
    (0.99, 1): 31.821,
    (0.99, 2): 6.965,
    (0.99, 3): 4.541,
    (0.99, 9): 2.821,
    (0.99, 30): 2.457,
    (0.999, 5): 5.893,
}


@pytest.mark.parametrize(("share", "degrees"), TABLE)
def test_quantiles_are_those_of_the_tables(share: float, degrees: int) -> None:
    assert round(student_quantile(share, degrees), 3) == TABLE[share, degrees]


@pytest.mark.parametrize("share", [0.6, 0.9, 0.99, 0.9999])
def test_one_and_two_degrees_have_closed_forms(share: float) -> None:
    # Cauchy's distribution, and (2 p - 1) / sqrt(2 p (1 - p)); the rule is good to 1e-9.
    cauchy = math.tan(math.pi * (share - 0.5))
    assert math.isclose(student_quantile(share, 1), cauchy, rel_tol=1e-8)
    second = (2 * share - 1) / math.sqrt(2 * share * (1 - share))
    assert math.isclose(student_quantile(share, 2), second, rel_tol=1e-8)


def test_many_degrees_are_the_normal_distribution() -> None:
    # The next term of the expansion is z^3 / (4 v) = 3e-4.
    assert abs(student_quantile(0.99, 10_000) - NormalDist().inv_cdf(0.99)) < 5e-4
