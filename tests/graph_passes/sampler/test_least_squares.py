"""Ridge least squares by normal equations, against numpy's solution of the whole problem."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calicache.graph_passes.sampler.least_squares import FAINT, RIDGE, NormalEquations


def drawn(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def by_numpy(columns: Tensor, residual: Tensor) -> np.ndarray:
    """min |A c - r|^2 + RIDGE sum_k |a_k|^2 c_k^2 as one problem with more rows."""
    ridge = np.diag(np.sqrt(RIDGE) * columns.norm(dim=1).numpy())
    rows = np.concatenate([columns.T.numpy(), ridge])
    right = np.concatenate([residual.numpy(), np.zeros(len(columns))])
    solution: np.ndarray = np.linalg.lstsq(rows, right, rcond=None)[0]
    return solution


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 5), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_solution_is_that_of_the_whole_problem(count: int, scale: float, seed: int) -> None:
    columns, residual = scale * drawn(count, 30, seed=seed), drawn(30, seed=seed + 100)
    solution = NormalEquations.of(columns, residual).solution(residual.square().sum())
    # Float64; 30 random rows are well conditioned, below 1e2.
    np.testing.assert_allclose(solution, by_numpy(columns, residual), rtol=1e-9, atol=1e-12 / scale)


def test_problems_side_by_side_are_solved_as_one_by_one() -> None:
    columns, residuals = drawn(6, 3, 20), drawn(6, 20, seed=1)
    together = NormalEquations.of(columns, residuals).solution(1.0)
    for k in range(6):
        alone = NormalEquations.of(columns[k], residuals[k]).solution(1.0)
        # The same float64 products in blocks of another size.
        torch.testing.assert_close(together[k], alone, rtol=1e-12, atol=1e-14)


def test_sum_is_the_equations_of_all_rows() -> None:
    columns, residual = drawn(3, 50), drawn(50, seed=1)
    parts = [
        NormalEquations.of(columns[:, rows], residual[rows]) for rows in (slice(20), slice(20, 50))
    ]
    whole, added = NormalEquations.of(columns, residual), parts[0] + parts[1]
    # Float64 sums of 50 products in another order.
    torch.testing.assert_close(added.gram, whole.gram, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(added.moment, whole.moment, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [0.0, 0.9])
def test_faint_columns_get_nothing_and_change_nothing(size: float) -> None:
    columns, residual = drawn(3, 20), drawn(20, seed=1)
    energy = float(residual.square().sum())
    faint = size * (FAINT * energy) ** 0.5 * columns[1] / columns[1].norm()
    spoiled = torch.stack([columns[0], faint, columns[2]])
    solution = NormalEquations.of(spoiled, residual).solution(energy)
    assert solution[1] == 0.0
    alone = NormalEquations.of(columns[[0, 2]], residual).solution(energy)
    torch.testing.assert_close(solution[[0, 2]], alone, rtol=1e-12, atol=1e-14)  # float64


def test_columns_that_are_alike_share_what_they_explain() -> None:
    column, residual = drawn(1, 20), drawn(20, seed=1)
    twice = NormalEquations.of(column.repeat(2, 1), residual).solution(1.0)
    once = NormalEquations.of(column, residual).solution(1.0)
    # A condition of 2 / RIDGE loses six of sixteen digits; the ridge itself moves 1e-6.
    assert twice.tolist() == pytest.approx([float(once) / 2] * 2, rel=1e-5)


def test_runs_that_diverged_give_no_error() -> None:
    columns = drawn(2, 20)
    columns[0, 3] = float("inf")
    assert not torch.isfinite(NormalEquations.of(columns, drawn(20)).solution(1.0)).all()
