"""Guidance in recovered updates: one scale, shares by step, and when neither can be told."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from calicache.graph_passes.common.errors import NoSampler
from calicache.graph_passes.sampler.guidance import constant_shares, recover_guidance, weighted_sum
from calicache.graph_passes.sampler.recover import RecordedSampler
from calicache.graph_passes.sampler.update import SamplerSteps

STEPS = 5


def draw(seed: int, rows: int) -> Tensor:
    draw_ = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, 4, 4, generator=draw_, dtype=torch.float64)


def recorded(rows: Sequence[tuple[float, ...]], alike: bool = False) -> RecordedSampler:
    """A run of an update by x and by the parts of outputs that are drawn; parts alike if told."""
    parts = len(rows[0]) - 1
    steps = SamplerSteps("x", parts, tuple(rows))
    outputs = [draw(9 + k, 1 if alike else parts) for k in range(len(rows))]
    outputs = [torch.cat([e] * parts) if alike else e for e in outputs]
    latents = [torch.cat([draw(1, 1)] * parts)]
    for k, output in enumerate(outputs):
        latents.append(steps.next_latent(k, steps.terms(latents[-1], output), ()))
    run = [{"x": x} for x in latents[:-1]]
    return RecordedSampler((run,), (tuple(outputs),), (latents[-1][:1],), steps)


@pytest.mark.parametrize("conditional", [0, 1])
def test_one_scale_for_all_steps_is_recovered(conditional: int) -> None:
    shares = (1.5, -0.5) if conditional == 0 else (-0.5, 1.5)
    rows = [(0.9, *(share * -0.1 * (1 + k) for share in shares)) for k in range(STEPS)]
    guidance = recover_guidance(recorded(rows))
    assert guidance.conditional == conditional
    # float64 throughout: a least-squares fit to exact sums.
    assert guidance.scale == pytest.approx(1.5, rel=1e-9)
    assert all(row == pytest.approx(shares, rel=1e-9) for row in guidance.shares)


def test_shares_that_differ_do_not_matter_where_the_parts_are_alike() -> None:
    rows = [(0.9, -0.05 - 0.01 * k, -0.05 + 0.01 * k) for k in range(STEPS)]
    assert recover_guidance(recorded(rows, alike=True)).scale is not None
    assert recover_guidance(recorded(rows)).scale is None


def test_scale_that_changes_gives_shares_by_step() -> None:
    rows = [(0.9, -0.1 * s, -0.1 * (1 - s)) for s in (1.0, 3.0, 3.0, 1.0, 2.0)]
    guidance = recover_guidance(recorded(rows))
    assert (guidance.conditional, guidance.scale) == (None, None)
    # Quotients of the given numbers.
    assert [row[0] for row in guidance.shares] == pytest.approx([1.0, 3.0, 3.0, 1.0, 2.0], rel=1e-9)


def test_weights_of_zero_tell_nothing() -> None:
    with pytest.raises(NoSampler, match="outputs of zero"):
        recover_guidance(recorded([(0.9, 0.0, 0.0)] * STEPS))


def test_shares_are_constant_within_a_tolerance() -> None:
    rows = [(0.9, 1.5 * b, -0.5 * b, 0.1, 1.5 * d, -0.5 * d) for b, d in ((0.2, 0.1), (0.3, 0.05))]
    # Exact but for rounding of float64.
    assert constant_shares(rows, 2, 1e-9) == pytest.approx((1.5, -0.5), rel=1e-12)
    off = [rows[0], (0.9, 1.51 * 0.3, -0.5 * 0.3, *rows[1][3:])]
    assert constant_shares(off, 2, 1e-4) is None
    assert constant_shares(off, 2, 0.1) is not None
    assert constant_shares([(0.9, 0.0, 0.0)], 2, 0.1) is None  # nothing to share


def test_weighted_sum_is_in_float64() -> None:
    total = weighted_sum((0.5, -2.0), (torch.ones(2), torch.ones(2)))
    assert total.dtype is torch.float64
    assert total.tolist() == [-1.5, -1.5]  # exact in binary
