"""Guards against a division by zero survive the way to ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.toys import run_onnx, targets, trace
from torch import Tensor

from calicache.export.lowerings.small_terms import scale_small_terms

aten = torch.ops.aten


def divided(x: Tensor) -> Tensor:
    return x / (x.relu() + 1e-15)


def test_a_tiny_term_is_added_at_another_scale_bit_by_bit() -> None:
    module = trace(divided, torch.randn(64))
    lowered = scale_small_terms(module)
    assert targets(lowered).count(aten.mul.Tensor) == 2
    x = torch.cat([torch.zeros(2), torch.randn(30) * 1e-12, torch.randn(32) * 1e6])
    assert torch.equal(lowered(x)[0], divided(x))
    assert targets(module) != targets(lowered)
    assert targets(scale_small_terms(lowered)) == targets(lowered)


@pytest.mark.slow
def test_onnx_runtime_divides_by_the_guard_where_there_is_zero() -> None:
    x = torch.tensor([0.0, -1.0, 2.0, 1e-9])
    result = run_onnx(trace(divided, x), x)[0].numpy()
    assert np.isfinite(result).all()
    # float32: one addition and one division.
    np.testing.assert_allclose(result, divided(x).numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 1e-5,  # the optimizer does not take it for zero
        lambda x: x + 0.0,
        lambda x: x + 1,
        lambda x: torch.add(x, x, alpha=1e-15),
        lambda x: (x.half() + 1e-15).float(),  # zero in half precision
    ],
)
def test_other_sums_are_left_alone(function) -> None:
    module = trace(function, torch.randn(4))
    assert targets(scale_small_terms(module)) == targets(module)
