"""A weight in levels, against the formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.models import relative

from calicache.graph_passes.common.errors import DecomposeError
from calicache.graph_passes.factors.quantise import quantise_weight


def test_every_channel_is_rounded_to_its_own_levels() -> None:
    weight = torch.randn(5, 7) * torch.logspace(-3, 3, 5)[:, None]
    exact = weight.double().numpy()
    scales = (np.abs(exact).max(axis=1) / 63).astype(np.float32)  # 7 bits: -63 .. 63
    levels = np.rint(exact / scales.astype(np.float64)[:, None])

    quantised = quantise_weight(weight)

    assert quantised.levels.dtype is torch.int8
    assert np.array_equal(quantised.levels.numpy(), levels.T)
    assert np.array_equal(quantised.scales.numpy(), scales)
    lost = ((exact - levels * scales[:, None]) ** 2).sum() / (exact**2).sum()
    assert math.isclose(quantised.energy, 1 - lost, rel_tol=1e-12)  # sums of doubles


def test_whole_levels_are_kept_exactly() -> None:
    levels = torch.randint(-63, 64, (4, 6))
    levels[:, 0] = 63
    quantised = quantise_weight(levels * torch.tensor([[0.5], [2.0], [0.125], [1.0]]))
    assert torch.equal(quantised.levels.T.long(), levels)
    assert quantised.energy == 1.0


def test_channel_of_zeros_stays_one() -> None:
    weight = torch.randn(3, 4)
    weight[1] = 0.0
    quantised = quantise_weight(weight)
    assert not quantised.levels[:, 1].any()
    assert bool(torch.isfinite(quantised.scales).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_differ_by_what_they_hold_themselves(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 5)
    quantised = quantise_weight(weight.to(dtype))
    restored = quantised.levels.T * quantised.scales[:, None]
    # Half a level of 63 in every number, and the dtype's own rounding: 2 ** -9 for bfloat16.
    assert relative(restored, weight) < 0.02
    assert quantised.scales.dtype is torch.float32


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    weight = torch.randn(3, 4)
    weight[2, 1] = value
    with pytest.raises(DecomposeError, match="NaN or Inf"):
        quantise_weight(weight)


def test_meta_weight_gives_shapes() -> None:
    quantised = quantise_weight(torch.empty(5, 3, device="meta"))
    assert (quantised.levels.shape, quantised.scales.shape) == ((3, 5), (5,))
    assert quantised.levels.dtype is torch.int8
