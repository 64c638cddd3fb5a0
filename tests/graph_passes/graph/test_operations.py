"""The operations of calibration branches in integers, against integers of numpy."""

from __future__ import annotations

import numpy as np
import torch

from calicache.graph_passes.graph.operations import quantise, quantised_product, token_scales


def test_scale_of_a_token_is_a_127th_of_its_peak() -> None:
    rows = torch.randn(5, 9) * torch.logspace(-6, 6, 5)[:, None]
    expected = np.abs(rows.numpy()).max(axis=1, keepdims=True) / 127
    # One rounding of a float32 product in each.
    np.testing.assert_allclose(token_scales(rows).numpy(), expected, rtol=2e-7, atol=0)


def test_levels_are_the_nearest_and_even_ones_from_ties() -> None:
    rows = torch.tensor([[127.0, 0.4, 0.5, 1.5, -0.5, -2.5, -127.0, 0.6]])
    levels = quantise(rows, token_scales(rows))
    assert levels.dtype is torch.uint8
    assert (levels.int() - 128).tolist() == [[127, 0, 0, 2, 0, -2, -127, 1]]


def test_token_of_zeros_has_the_level_of_zero() -> None:
    rows = torch.zeros(2, 4)
    scales = token_scales(rows)
    assert quantise(rows, scales).unique().tolist() == [128]
    weight = torch.ones(4, 3, dtype=torch.int8)
    assert not quantised_product(quantise(rows, scales), scales, weight, torch.ones(3)).any()


def test_product_is_that_of_the_integers_with_both_scales() -> None:
    rng = np.random.default_rng(0)
    levels, weight = rng.integers(-127, 128, (6, 40)), rng.integers(-63, 64, (40, 5))
    scales, weight_scales = rng.random((6, 1)), rng.random(5)
    expected = (levels @ weight) * weight_scales * scales
    got = quantised_product(
        torch.from_numpy(levels + 128).to(torch.uint8),
        torch.from_numpy(scales).float(),
        torch.from_numpy(weight).to(torch.int8),
        torch.from_numpy(weight_scales).float(),
    )
    # Sums below 2 ** 24 are exact in float32; two products are rounded.
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=0)
