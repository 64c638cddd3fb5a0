"""The least-squares optimum from second moments, against NumPy on the increments themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.factors import branch_factors, covariance_factors
from torch import Tensor

from calicache.graph_passes.common.errors import DecomposeError
from calicache.graph_passes.factors.covariance import RIDGE
from calicache.graph_passes.factors.decompose import CalibrationFactors
from calicache.graph_passes.factors.statistics import SecondMoments

SHAPES = [(24, 7), (7, 24), (16, 16), (1, 5), (5, 1)]  # tall, wide, square, one channel
sizes = st.integers(1, 12)
seeds = st.integers(0, 2**31)
# Moments and factors are float32: 6e-8 of the largest entry each, so an error is known to about
# 1e-6 of the whole energy.
ROUNDING = 2e-6

Increments = tuple[list[np.ndarray], np.ndarray]  # W of every sibling, and dx (n, in)


def increments(
    outs: list[int], width: int, seed: int, *, rows: int = 60, directions: int | None = None
) -> Increments:
    """Random W and dx whose channels are mixed and of very different sizes."""
    draw = np.random.default_rng(seed)
    weights = [draw.standard_normal((out, width)).astype(np.float32) for out in outs]
    inner = directions or width
    mix = draw.standard_normal((inner, width)) * 10.0 ** draw.uniform(-1, 1, width)
    return weights, draw.standard_normal((rows, inner)) @ mix


def moments_of(weights: list[np.ndarray], x: np.ndarray) -> SecondMoments:
    """float32 moments, of the smaller side."""
    stacked = np.concatenate(weights).astype(np.float64)
    seen = x @ stacked.T if len(stacked) < x.shape[1] else x
    second = torch.from_numpy(seen.T @ seen / len(seen)).float()
    return SecondMoments(output=second) if seen is not x else SecondMoments(input=second)


def factors_of(weights: list[np.ndarray], x: np.ndarray, rank: int) -> CalibrationFactors:
    tensors = [torch.from_numpy(weight) for weight in weights]
    return covariance_factors(tensors, rank, moments_of(weights, x))


def product(factors: CalibrationFactors) -> np.ndarray:
    return factors.up.double().numpy() @ factors.down.double().numpy()


def spectrum_of(factors: CalibrationFactors) -> np.ndarray:
    assert factors.spectrum is not None
    return factors.spectrum.double().numpy()


def squared_error(y: np.ndarray, x: np.ndarray, low_rank: np.ndarray) -> float:
    return float(((y - x @ low_rank.T) ** 2).sum())


def best_map(weight: np.ndarray, y: np.ndarray, rank: int) -> np.ndarray:
    """Eckart and Young: W projected on the top right singular vectors of Y = X W^T."""
    _, _, right = np.linalg.svd(y, full_matrices=False)
    top = right[:rank]
    return top.T @ (top @ weight)


def tail(y: np.ndarray, rank: int) -> float:
    return float((np.linalg.svd(y, compute_uv=False)[rank:] ** 2).sum())


def others(factors: CalibrationFactors, seed: int) -> list[np.ndarray]:
    """Maps of the same rank, near and far."""
    draw = np.random.default_rng(seed)
    up, down = factors.up.double().numpy(), factors.down.double().numpy()
    return [
        (up + noise * draw.standard_normal(up.shape))
        @ (down + noise * np.abs(down).max(initial=1.0) * draw.standard_normal(down.shape))
        for noise in (1e-4, 1e-2, 1.0)
    ]


# --- linear layers and sibling groups -----------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(outs=st.lists(sizes, min_size=1, max_size=3), width=sizes, seed=seeds, data=st.data())
def test_no_map_of_the_same_rank_has_a_smaller_error_on_the_increments(
    outs: list[int], width: int, seed: int, data: st.DataObject
) -> None:
    weights, x = increments(outs, width, seed)
    rank = data.draw(st.integers(0, min(width, sum(outs))))
    stacked = np.concatenate(weights).astype(np.float64)
    y = x @ stacked.T
    factors = factors_of(weights, x, rank)
    assert factors.up.shape == (sum(outs), rank)
    assert factors.down.shape == (rank, width)
    error, slack = squared_error(y, x, product(factors)), ROUNDING * float((y**2).sum())
    # The optimum, once as the tail of the singular values and once as a map.
    assert math.isclose(error, tail(y, rank), rel_tol=0, abs_tol=slack)
    best = squared_error(y, x, best_map(stacked, y, rank))
    assert math.isclose(error, best, rel_tol=0, abs_tol=slack)
    for other in others(factors, seed):
        assert error <= squared_error(y, x, other) + slack
    # The plain SVD of W, which knows nothing of x.
    left, singular, right = np.linalg.svd(stacked, full_matrices=False)
    blind = (left[:, :rank] * singular[:rank]) @ right[:rank]
    assert error <= squared_error(y, x, blind) + slack


def test_statistics_matter() -> None:
    # Otherwise the comparisons above would hold for the SVD of W as well.
    weights, x = increments([16], 16, 3)
    y = x @ weights[0].T.astype(np.float64)
    left, singular, right = np.linalg.svd(weights[0].astype(np.float64))
    blind = squared_error(y, x, (left[:, :4] * singular[:4]) @ right[:4])
    assert squared_error(y, x, product(factors_of(weights, x, 4))) < 0.5 * blind


def test_siblings_together_beat_siblings_apart_at_the_same_macs() -> None:
    # Three siblings of rank 4 cost 12 (16 + 16), one map of rank 6 costs 6 (16 + 48). The
    # siblings look at the same few directions, as q, k and v do.
    draw = np.random.default_rng(0)
    shared = draw.standard_normal((6, 16))
    weights = [(draw.standard_normal((16, 6)) @ shared).astype(np.float32) for _ in range(3)]
    _, x = increments([1], 16, 5)
    together = np.split(product(factors_of(weights, x, 6)), 3)
    for weight, joint in zip(weights, together, strict=True):
        y = x @ weight.T.astype(np.float64)
        apart = squared_error(y, x, product(factors_of([weight], x, 4)))
        assert squared_error(y, x, joint) < 0.1 * apart


def test_rows_of_up_are_in_the_order_of_the_weights() -> None:
    weights, x = increments([3, 5], 12, 1)
    whole = product(factors_of(weights, x, 8))
    # Full rank: the map is W up to the float32 rounding of two factors.
    scale = np.abs(whole).max()
    np.testing.assert_allclose(whole[:3], weights[0], rtol=0, atol=2e-6 * scale)
    np.testing.assert_allclose(whole[3:], weights[1], rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_the_weight(shape: tuple[int, int]) -> None:
    weights, x = increments([shape[0]], shape[1], 2)
    factors = factors_of(weights, x, min(shape))
    # up up^T is the identity on the range of W; both factors are rounded to float32.
    atol = 2e-6 * float(np.linalg.norm(weights[0], axis=0).max())
    np.testing.assert_allclose(product(factors), weights[0], rtol=0, atol=atol)
    assert factors.energy == 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_rank_0_is_the_zero_map(shape: tuple[int, int]) -> None:
    weights, x = increments([shape[0]], shape[1], 2)
    factors = factors_of(weights, x, 0)
    assert (factors.up.shape, factors.down.shape) == ((shape[0], 0), (0, shape[1]))
    assert factors.energy == 0.0


@pytest.mark.parametrize("shape", [(24, 7), (7, 24), (16, 16)])
def test_down_is_read_off_the_weight_by_up(shape: tuple[int, int]) -> None:
    draw = np.random.default_rng(3)
    weight, x = draw.standard_normal(shape), draw.standard_normal((50, shape[1]))
    factors = factors_of([weight], x, 5)
    assert factors.read is not None
    assert factors.read.data_ptr() == factors.up.data_ptr()  # no memory of its own
    read = factors.read.double().numpy() @ weight
    # float64 throughout: the weights are.
    np.testing.assert_allclose(read, factors.down.double().numpy(), rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(out=sizes, width=sizes, directions=st.integers(1, 4), seed=seeds, data=st.data())
def test_up_has_orthonormal_columns_even_where_nothing_moved(
    out: int, width: int, directions: int, seed: int, data: st.DataObject
) -> None:
    weights, x = increments([out], width, seed, directions=directions)
    rank = data.draw(st.integers(0, min(out, width)))
    up = factors_of(weights, x, rank).up.double()
    # Entries of `up` are below 1 and rounded to float32; a column has at most 12 of them.
    torch.testing.assert_close(up.T @ up, torch.eye(rank).double(), rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(outs=st.lists(sizes, min_size=1, max_size=2), width=sizes, seed=seeds, inner=sizes)
def test_energy_grows_with_rank_from_0_to_1(
    outs: list[int], width: int, seed: int, inner: int
) -> None:
    weights, x = increments(outs, width, seed, directions=inner)
    full = min(width, sum(outs))
    energies = [factors_of(weights, x, rank).energy for rank in range(full + 1)]
    assert energies == sorted(energies)
    assert 0.0 <= energies[0] <= energies[-1] == 1.0


@settings(max_examples=40, deadline=None)
@given(out=sizes, width=sizes, seed=seeds, data=st.data())
def test_energy_is_the_share_of_the_increment_that_is_kept(
    out: int, width: int, seed: int, data: st.DataObject
) -> None:
    weights, x = increments([out], width, seed)
    rank = data.draw(st.integers(0, min(out, width)))
    y = x @ weights[0].T.astype(np.float64)
    expected = 1.0 - tail(y, rank) / float((y**2).sum())
    # The moments are rounded to float32.
    energy = factors_of(weights, x, rank).energy
    assert math.isclose(energy, expected, rel_tol=0, abs_tol=ROUNDING)


@settings(max_examples=60, deadline=None)
@given(outs=st.lists(sizes, min_size=1, max_size=3), width=sizes, seed=seeds, data=st.data())
def test_spectrum_is_the_energy_of_every_direction(
    outs: list[int], width: int, seed: int, data: st.DataObject
) -> None:
    weights, x = increments(outs, width, seed)
    y = x @ np.concatenate(weights).astype(np.float64).T
    rank = data.draw(st.integers(0, min(width, sum(outs))))
    factors = factors_of(weights, x, rank)
    spectrum = spectrum_of(factors)
    # All directions, whatever the rank; moments and spectrum are rounded to float32.
    slack = ROUNDING * float((y**2).mean(axis=0).sum())
    expected = np.linalg.svd(y, compute_uv=False) ** 2 / len(y)
    np.testing.assert_allclose(spectrum, expected[: len(spectrum)], rtol=0, atol=slack)
    assert len(spectrum) == min(width, sum(outs))
    assert math.isclose(spectrum.sum(), (y**2).sum() / len(y), rel_tol=0, abs_tol=slack)
    # What the map keeps is the first r of them.
    left = squared_error(y, x, product(factors)) / len(y)
    assert math.isclose(left, spectrum[rank:].sum(), rel_tol=0, abs_tol=slack)
    assert math.isclose(factors.energy * spectrum.sum(), spectrum[:rank].sum(), abs_tol=slack)


@settings(max_examples=40, deadline=None)
@given(out=sizes, width=sizes, seed=seeds, directions=st.integers(1, 3))
def test_spectrum_falls_and_is_never_negative(
    out: int, width: int, seed: int, directions: int
) -> None:
    weights, x = increments([out], width, seed, directions=directions)
    spectrum = spectrum_of(factors_of(weights, x, 1))
    assert (spectrum >= 0).all()
    # Differences of running sums in float64, which rounding moves by 1e-16 of the whole.
    assert (np.diff(spectrum) <= 1e-14 * spectrum.sum()).all()
    # Moments in float32: 1e-7 of the largest entry lies beside the directions that were seen.
    assert spectrum[directions:].sum() <= ROUNDING * spectrum.sum()


def test_spectrum_of_increments_of_zero_is_zero() -> None:
    weights, _ = increments([5], 9, 4)
    spectrum = factors_of(weights, np.zeros((6, 9)), 1).spectrum
    assert spectrum is not None
    assert torch.equal(spectrum, torch.zeros(5))
    assert (spectrum.dtype, spectrum.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize("shape", SHAPES)
def test_increments_in_few_directions_are_met_exactly(shape: tuple[int, int]) -> None:
    weights, x = increments([shape[0]], shape[1], 4, directions=min(3, *shape))
    y = x @ weights[0].T.astype(np.float64)
    factors = factors_of(weights, x, min(3, *shape))
    # Rank-deficient moments: float32 rounding leaves 1e-7 of their largest entry beside them.
    assert squared_error(y, x, product(factors)) <= ROUNDING * float((y**2).sum())
    assert math.isclose(factors.energy, 1.0, rel_tol=0, abs_tol=ROUNDING)


@pytest.mark.parametrize("shape", SHAPES)
def test_increments_of_zero_give_finite_factors(shape: tuple[int, int]) -> None:
    weights, _ = increments([shape[0]], shape[1], 4)
    factors = factors_of(weights, np.zeros((6, shape[1])), 1)
    assert torch.isfinite(factors.up).all()
    assert torch.isfinite(factors.down).all()
    assert factors.energy == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["weight", "input", "output"])
def test_values_that_are_not_finite_are_refused(place: str, bad: float) -> None:
    values = {"weight": torch.randn(4, 8), "input": torch.eye(8), "output": torch.eye(4)}
    values[place].view(-1)[1] = bad
    side = "input" if place == "weight" else place
    with pytest.raises(DecomposeError) as caught:
        covariance_factors([values["weight"]], 2, SecondMoments(**{side: values[side]}))
    assert str(caught.value) == (
        "decompose: weight or statistics: expected finite values, got NaN or Inf. "
        "Check the checkpoint and the recording."
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_lose_only_the_rounding_of_the_factors(dtype: torch.dtype) -> None:
    weights, x = increments([24], 16, 6)
    moments, weight = moments_of(weights, x), torch.from_numpy(weights[0]).to(dtype)
    half = covariance_factors([weight], 6, moments)
    exact = covariance_factors([weight.double()], 6, moments)
    assert (half.up.dtype, half.down.dtype) == (dtype, dtype)
    # Entries of `up` are at most 1; each product rounds twice, and 6 of them add up.
    atol = 6 * torch.finfo(dtype).eps * float(exact.down.abs().max())
    np.testing.assert_allclose(product(half), product(exact), rtol=0, atol=atol)
    assert half.energy == exact.energy


def test_weights_are_left_alone_and_factors_need_no_gradient() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 4))
    before = weight.detach().clone()
    factors = covariance_factors([weight], 2, SecondMoments(input=torch.eye(4)))
    assert torch.equal(weight, before)
    for factor in (factors.up, factors.down):
        assert not factor.requires_grad
        assert factor.is_contiguous()


# --- whole residual branches --------------------------------------------------------------------


def branch_increments(width: int, out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """dx and a dy that is not a linear map of it."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((80, width)) * draw.uniform(0.3, 3.0, width)
    y = np.tanh(x @ draw.standard_normal((width, out))) + 0.3 * draw.standard_normal((80, out))
    return x, y


def branch_moments(x: np.ndarray, y: np.ndarray) -> SecondMoments:
    second, cross = x.T @ x / len(x), x.T @ y / len(x)
    return SecondMoments(
        input=torch.from_numpy(second).float(), cross=torch.from_numpy(cross).float()
    )


def reduced_rank_regression(x: np.ndarray, y: np.ndarray, rank: int) -> np.ndarray:
    """Izenman 1975: least squares, then the top right singular vectors of the fitted values."""
    coefficients, *_ = np.linalg.lstsq(x, y, rcond=None)  # (in, out)
    _, _, right = np.linalg.svd(x @ coefficients, full_matrices=False)
    top = right[:rank]
    return top.T @ (top @ coefficients.T)


@settings(max_examples=80, deadline=None)
@given(width=sizes, out=sizes, seed=seeds, data=st.data())
def test_branch_map_is_the_reduced_rank_regression(
    width: int, out: int, seed: int, data: st.DataObject
) -> None:
    x, y = branch_increments(width, out, seed)
    rank = data.draw(st.integers(0, min(width, out)))
    factors = branch_factors(rank, branch_moments(x, y), torch.float32)
    error = squared_error(y, x, product(factors))
    best = squared_error(y, x, reduced_rank_regression(x, y, rank))
    # A ridge moves the minimum by RIDGE of the channels' mean variance, up to 30 times that of
    # the smallest: a second-order effect on the error, below 1e-5 of the whole energy.
    assert RIDGE == 1e-5
    slack = 1e-5 * float((y**2).sum())
    assert best - slack <= error <= best + slack
    for other in others(factors, seed):
        assert error <= squared_error(y, x, other) + slack


@settings(max_examples=40, deadline=None)
@given(width=sizes, out=sizes, seed=seeds)
def test_branch_up_is_orthonormal_and_energy_grows(width: int, out: int, seed: int) -> None:
    moments = branch_moments(*branch_increments(width, out, seed))
    ranks = range(min(width, out) + 1)
    by_rank = [branch_factors(rank, moments, torch.float32) for rank in ranks]
    energies = [factors.energy for factors in by_rank]
    assert energies == sorted(energies)
    assert 0.0 <= energies[0] <= energies[-1] == 1.0
    for rank, factors in zip(ranks, by_rank, strict=True):
        assert (factors.up.shape, factors.down.shape) == ((out, rank), (rank, width))
        up = factors.up.double()
        # Entries of `up` are below 1 and rounded to float32; a column has at most 12 of them.
        torch.testing.assert_close(up.T @ up, torch.eye(rank).double(), rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(width=sizes, out=sizes, seed=seeds, data=st.data())
def test_branch_spectrum_is_the_energy_that_a_linear_map_explains(
    width: int, out: int, seed: int, data: st.DataObject
) -> None:
    x, y = branch_increments(width, out, seed)
    rank = data.draw(st.integers(0, min(width, out)))
    factors = branch_factors(rank, branch_moments(x, y), torch.float32)
    spectrum, energy = spectrum_of(factors), float((y**2).sum()) / len(y)
    fitted = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    expected = np.linalg.svd(fitted, compute_uv=False) ** 2 / len(y)
    # The ridge takes RIDGE of the mean variance off every direction, twice; the smallest
    # variance is a thirtieth of the mean: below 1e-3 of the energy.
    np.testing.assert_allclose(spectrum, expected[: len(spectrum)], rtol=0, atol=1e-3 * energy)
    assert len(spectrum) == min(width, out)
    assert spectrum.sum() <= energy * (1 + ROUNDING)
    # What a map of rank r leaves is what no map explains, and the directions it does without.
    left = squared_error(y, x, product(factors)) / len(y)
    unexplained = energy - spectrum.sum()
    assert math.isclose(left, unexplained + spectrum[rank:].sum(), abs_tol=1e-3 * energy)


def test_branch_that_is_linear_is_found() -> None:
    weights, x = increments([9], 6, 8, rows=200)
    y = x @ weights[0].T.astype(np.float64)
    factors = branch_factors(6, branch_moments(x, y), torch.float32)
    # Increments of 0.1 .. 10 a channel: in the weakest direction the ridge takes a share.
    assert squared_error(y, x, product(factors)) <= 1e-5 * float((y**2).sum())


def test_branch_directions_that_were_never_seen_take_no_weight() -> None:
    x, y = branch_increments(8, 5, 9)
    x[:, 3] = 0.0
    factors = branch_factors(5, branch_moments(x, y), torch.float32)
    assert not product(factors)[:, 3].any()
    # Channel 6 is channel 5 again: the ridge shares the weight between them.
    x[:, 6] = x[:, 5]
    doubled = product(branch_factors(5, branch_moments(x, y), torch.float32))
    # Their moments are equal to the bit: only the solver and float32 factors round.
    atol = 1e-4 * np.abs(doubled).max()
    np.testing.assert_allclose(doubled[:, 6], doubled[:, 5], rtol=0, atol=atol)


def test_branch_increments_of_zero_give_the_zero_map() -> None:
    moments = branch_moments(np.zeros((4, 6)), np.zeros((4, 3)))
    factors = branch_factors(2, moments, torch.float32)
    assert not factors.down.any()
    assert torch.isfinite(factors.up).all()
    assert factors.energy == 1.0


@pytest.mark.parametrize("place", ["input", "cross"])
def test_branch_moments_that_are_not_finite_are_refused(place: str) -> None:
    values: dict[str, Tensor] = {"input": torch.eye(4), "cross": torch.ones(4, 3)}
    values[place].view(-1)[1] = math.nan
    with pytest.raises(DecomposeError, match="expected finite values, got NaN or Inf"):
        branch_factors(2, SecondMoments(**values), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_branch_factors_have_the_dtype_asked_for(dtype: torch.dtype) -> None:
    factors = branch_factors(2, branch_moments(*branch_increments(6, 4, 1)), dtype)
    assert (factors.up.dtype, factors.down.dtype) == (dtype, dtype)


def test_moments_name_what_is_there() -> None:
    one, two = torch.eye(2), torch.ones(2, 3)
    assert list(SecondMoments(input=one).tensors()) == ["input"]
    assert SecondMoments(input=one, cross=two).tensors() == {"input": one, "cross": two}
    assert SecondMoments().tensors() == {}
    energy = torch.tensor(3.0)
    assert list(SecondMoments(input=one, cross=two, energy=energy).tensors()) == [
        "input",
        "cross",
        "energy",
    ]
