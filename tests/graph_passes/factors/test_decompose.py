from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.factors import decompose
from torch import Tensor

from calicache.graph_passes.common.errors import DecomposeError
from calicache.graph_passes.factors.decompose import CalibrationFactors, channel_scales
from calicache.graph_passes.factors.statistics import ChannelStatistics

SHAPES = [(24, 7), (7, 24), (16, 16), (1, 5), (5, 1)]  # tall, wide, square, one channel
shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
seeds = st.integers(0, 2**31)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_statistics(shape: tuple[int, int], seed: int, smallest: float) -> ChannelStatistics:
    """Values spread evenly in the exponent over smallest .. 1, both ends included."""

    def spread(size: int, at: int) -> Tensor:
        values = smallest ** torch.rand(size, generator=draw(seed + at))
        values[0] = 1.0
        values[-1] = smallest if size > 1 else 1.0
        return values

    return ChannelStatistics(spread(shape[1], 1), spread(shape[0], 2))


def weighted_error(weight: Tensor, low_rank: Tensor, statistics: ChannelStatistics) -> float:
    left, right = channel_scales(statistics.output), channel_scales(statistics.input)
    return float((left[:, None] * (weight - low_rank).double() * right).norm())


def product(factors: CalibrationFactors) -> Tensor:
    return factors.up.double() @ factors.down.double()


@pytest.mark.parametrize("shape", SHAPES)
def test_rank_0_is_the_zero_map(shape: tuple[int, int]) -> None:
    factors = decompose(torch.randn(shape), 0, random_statistics(shape, 3, 0.1))
    assert (factors.up.shape, factors.down.shape) == ((shape[0], 0), (0, shape[1]))
    assert factors.rank == 0
    assert factors.energy == 0.0


@pytest.mark.parametrize("smallest", [None, 0.1, 1e-12])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_the_weight(shape: tuple[int, int], smallest: float | None) -> None:
    weight = torch.randn(shape)
    statistics = random_statistics(shape, 3, smallest) if smallest else None
    factors = decompose(weight, min(shape), statistics)
    # Both factors are rounded to float32; scales of 1e-3 .. 1 must not cost a digit more.
    atol = 4e-7 * float(weight.norm(dim=0).max())
    torch.testing.assert_close(product(factors), weight.double(), rtol=0, atol=atol)
    assert factors.energy == 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_the_weight_in_float64(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    factors = decompose(weight, min(shape), random_statistics(shape, 5, 1e-12))
    # float64 rounding times the 1e3 between the largest and the smallest scale.
    torch.testing.assert_close(product(factors), weight, rtol=0, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=seeds, smallest=st.sampled_from([1.0, 1e-3, 1e-12]), data=st.data())
def test_up_has_orthonormal_columns(
    shape: tuple[int, int], seed: int, smallest: float, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, min(shape)))
    weight = torch.randn(shape, generator=draw(seed))
    up = decompose(weight, rank, random_statistics(shape, seed, smallest)).up.double()
    # Entries of `up` are below 1 and rounded to float32; a column has at most 12 of them.
    torch.testing.assert_close(up.T @ up, torch.eye(rank).double(), rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=seeds, smallest=st.sampled_from([1.0, 1e-3]), data=st.data())
def test_down_is_what_read_makes_of_the_weight(
    shape: tuple[int, int], seed: int, smallest: float, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, min(shape)))
    weight = torch.randn(shape, generator=draw(seed)).double()
    factors = decompose(weight, rank, random_statistics(shape, seed, smallest))
    if shape[0] > shape[1]:
        assert factors.read is None
        return
    assert factors.read is not None
    # float64; scales span at most three orders.
    torch.testing.assert_close(factors.read @ weight, factors.down, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=seeds, true_rank=st.integers(0, 12), smallest=st.sampled_from([1, 1e-9]))
@example(shape=(6, 7), seed=1, true_rank=2, smallest=1)  # rounding made it fall once
def test_energy_grows_with_rank_from_0_to_1(
    shape: tuple[int, int], seed: int, true_rank: int, smallest: float
) -> None:
    generator = draw(seed)
    weight = torch.randn(shape[0], true_rank, generator=generator) @ torch.randn(
        true_rank, shape[1], generator=generator
    )
    statistics = random_statistics(shape, seed, smallest)
    energies = [decompose(weight, r, statistics).energy for r in range(min(shape) + 1)]
    assert energies == sorted(energies)
    assert 0.0 <= energies[0] <= energies[-1] == 1.0


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=seeds, data=st.data())
def test_energy_is_the_share_of_squared_singular_values(
    shape: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, min(shape)))
    weight = torch.randn(shape, generator=draw(seed))
    statistics = random_statistics(shape, seed, 1e-3)
    left, right = channel_scales(statistics.output), channel_scales(statistics.input)
    squares = torch.linalg.svdvals(left[:, None] * weight.double() * right) ** 2
    expected = float(squares[:rank].sum() / squares.sum())
    # float64 throughout: a Gram matrix keeps the squares to about 1e-15 of the largest.
    assert math.isclose(
        decompose(weight, rank, statistics).energy, expected, rel_tol=0, abs_tol=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=seeds, data=st.data())
def test_spectrum_is_the_squared_singular_values(
    shape: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, min(shape)))
    weight = torch.randn(shape, generator=draw(seed))
    statistics = random_statistics(shape, seed, 1e-3)
    left, right = channel_scales(statistics.output), channel_scales(statistics.input)
    scaled = left[:, None] * weight.double() * right
    spectrum = decompose(weight, rank, statistics).spectrum
    assert spectrum is not None
    assert (spectrum.dtype, tuple(spectrum.shape)) == (torch.float32, (min(shape),))
    # All of them, whatever the rank; float64, then rounded to float32.
    whole = float(scaled.square().sum())
    expected = torch.linalg.svdvals(scaled) ** 2
    torch.testing.assert_close(spectrum.double(), expected, rtol=1e-6, atol=1e-12 * whole)
    assert math.isclose(float(spectrum.sum()), whole, rel_tol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    seed=seeds,
    smallest=st.sampled_from([1.0, 1e-3, 1e-12]),
    noise=st.sampled_from([1e-3, 0.1, 1.0, 10.0]),
    data=st.data(),
)
def test_no_map_of_the_same_rank_has_a_smaller_weighted_error(
    shape: tuple[int, int], seed: int, smallest: float, noise: float, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, min(shape)))
    generator = draw(seed)
    weight = torch.randn(shape, generator=generator)
    statistics = random_statistics(shape, seed, smallest)
    factors = decompose(weight, rank, statistics)
    best = weighted_error(weight, product(factors), statistics)
    # Rounding of the factors to float32, against the size of what is approximated.
    slack = 1e-6 * weighted_error(weight, torch.zeros(shape), statistics)
    near_up = factors.up + noise * torch.randn(factors.up.shape, generator=generator)
    near_down = factors.down + noise * torch.randn(factors.down.shape, generator=generator)
    random_map = near_up @ torch.linalg.pinv(near_up) @ weight  # best map into a random space
    for other in (near_up @ near_down, random_map):
        assert best <= weighted_error(weight, other, statistics) + slack


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=seeds, smallest=st.sampled_from([1.0, 1e-3, 1e-12]), data=st.data())
def test_weighted_error_is_the_tail_of_the_singular_values(
    shape: tuple[int, int], seed: int, smallest: float, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, min(shape)))
    weight = torch.randn(shape, generator=draw(seed))
    statistics = random_statistics(shape, seed, smallest)
    left, right = channel_scales(statistics.output), channel_scales(statistics.input)
    singular = torch.linalg.svdvals(left[:, None] * weight.double() * right)
    error = weighted_error(weight, product(decompose(weight, rank, statistics)), statistics)
    # Eckart and Young; float32 rounding of the factors is relative to the whole.
    slack = 1e-6 * float(singular.norm())
    assert math.isclose(error, float(singular[rank:].norm()), rel_tol=0, abs_tol=slack)


def test_zero_statistics_weigh_all_channels_alike() -> None:
    weight = torch.randn(6, 9)
    zero = decompose(weight, 3, ChannelStatistics(torch.zeros(9), torch.zeros(6)))
    # The same map up to float32 rounding of the factors.
    torch.testing.assert_close(product(zero), product(decompose(weight, 3)), rtol=0, atol=1e-6)


@settings(deadline=None)
@given(rank=st.integers(0, 6))
def test_kept_energy_is_told_at_few_ranks_and_at_its_own(rank: int) -> None:
    weight = torch.randn(6, 9, generator=draw(2))
    factors = decompose(weight, rank)
    kept = factors.kept_energy()
    assert list(kept) == sorted({0, 1, 2, 3, 4, 6, rank})
    # Float32 energies, summed in another order.
    assert kept[rank] == pytest.approx(factors.energy, rel=1e-6, abs=1e-9)
    squares = torch.linalg.svdvals(weight.double()).square()
    for k, share in kept.items():
        assert share == pytest.approx(float(squares[:k].sum() / squares.sum()), rel=1e-5)


def test_kept_energy_of_a_zero_map_is_not_known() -> None:
    assert decompose(torch.zeros(4, 4), 2).kept_energy() == {}


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_weight_gives_the_zero_map(shape: tuple[int, int]) -> None:
    factors = decompose(torch.zeros(shape), 1, random_statistics(shape, 3, 1e-3))
    assert not factors.down.any()
    assert torch.isfinite(factors.up).all()
    assert factors.energy == 1.0


@pytest.mark.parametrize("rank", [-1, 5])
def test_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(DecomposeError) as caught:
        decompose(torch.randn(8, 4), rank)
    assert str(caught.value) == (
        f"decompose: rank: expected 0 .. 4 for a weight (8, 4), got {rank}. "
        "Choose a smaller rank, or exclude the layer."
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["weight", "input", "output"])
def test_values_that_are_not_finite_are_refused(place: str, bad: float) -> None:
    values = {"weight": torch.randn(8, 4), "input": torch.rand(4), "output": torch.rand(8)}
    values[place].view(-1)[1] = bad
    statistics = ChannelStatistics(values["input"], values["output"])
    message = (
        "decompose: weight or statistics: expected finite values, got NaN or Inf. "
        "Check the checkpoint and the recording."
    )
    with pytest.raises(DecomposeError, match=re.escape(message)):
        decompose(values["weight"], 2, statistics)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_lose_only_the_rounding_of_the_factors(dtype: torch.dtype) -> None:
    weight = torch.randn(24, 16).to(dtype)
    statistics = random_statistics((24, 16), 3, 1e-3)
    half, exact = decompose(weight, 6, statistics), decompose(weight.double(), 6, statistics)
    assert (half.up.dtype, half.down.dtype) == (dtype, dtype)
    # Entries of `up` are at most 1; each product rounds twice, and 6 of them add up.
    atol = 6 * torch.finfo(dtype).eps * float(exact.down.abs().max())
    torch.testing.assert_close(product(half), product(exact), rtol=0, atol=atol)
    assert half.energy == exact.energy


def test_weight_is_left_alone_and_factors_need_no_gradient() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 4))
    before = weight.detach().clone()
    factors = decompose(weight, 2, random_statistics((8, 4), 3, 0.1))
    assert torch.equal(weight, before)
    assert not factors.up.requires_grad
    assert not factors.down.requires_grad
    assert factors.up.is_contiguous()
    assert factors.down.is_contiguous()


def test_channel_scales_are_the_papers() -> None:
    statistics = torch.tensor([0.0, 1e-12, 0.04, 0.25, 4.0])
    expected = [0.002 + 1e-6, 0.002 + 1e-6, 0.2 + 1e-6, 0.5 + 1e-6, 2.0 + 1e-6]
    scales = channel_scales(statistics)
    assert scales.dtype == torch.float64
    # The statistic 0.04 is given in float32.
    torch.testing.assert_close(scales, torch.tensor(expected).double(), rtol=1e-7, atol=0)


@settings(deadline=None)
@given(st.lists(st.floats(-1.0, 1.0, width=32), min_size=1, max_size=20))
def test_channel_scales_span_at_most_three_orders(values: list[float]) -> None:
    scales = channel_scales(torch.tensor(values))
    assert float(scales.min()) > 0.0
    # The floor is max / 1000 before 1e-6 is added to both, which only brings them closer.
    assert float(scales.max() / scales.min()) <= 1000.0 * (1 + 1e-12)
