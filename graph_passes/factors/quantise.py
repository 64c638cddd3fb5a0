"""A weight in 8-bit integers: the calibration branch that keeps every direction.

y = y_ref + Q(W) Q(x - x_ref). What rounding loses is a share of the increment, which is small, and
not of the value. Ours. Ditto (HPCA 2025, arXiv 2501.11211) uses the same smallness in hardware: it
adds up exact differences, of few bits, of a model that is quantised already.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calicache.graph_passes.common.errors import DecomposeError

# 7 bits: with 8, the sums of two products of 8 bits leave the 16 bits that processors without
# VNNI add them in, and saturate. Measured, it loses nothing: 0.0006 of error against 0.0005.
WEIGHT_LEVELS = 63


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A weight in levels of the scales of its output channels.

    Attributes:
        levels: int8 (in, out), -63 .. 63; products read it column by column.
        scales: float32 (out,), what one level stands for.
        energy: share of the squared weight that is left after rounding, 0 .. 1.
    """

    levels: Tensor
    scales: Tensor
    energy: float

    def to(self, like: Tensor) -> QuantisedWeight:
        """The same on the device of a weight, whatever its dtype."""
        device = like.device
        return replace(self, levels=self.levels.to(device), scales=self.scales.to(device))

    def kept_energy(self) -> dict[int, float]:
        """Empty: there is no rank to choose."""
        return {}


def quantise_weight(weight: Tensor) -> QuantisedWeight:
    """Round a weight to the nearest levels.

    Args:
        weight: (out, in), on any device.

    Raises:
        DecomposeError: it holds NaN or Inf.
    """
    if weight.is_meta:
        levels = torch.empty_like(weight.T, dtype=torch.int8)
        return QuantisedWeight(levels, weight.new_empty(len(weight), dtype=torch.float32), 0.0)
    exact = weight.detach().double()
    peaks = exact.abs().amax(dim=1)
    if not bool(torch.isfinite(peaks).all()):
        raise DecomposeError(
            "weight",
            expected="finite numbers",
            got="NaN or Inf",
            fix="Check the checkpoint, or exclude the layer.",
        )
    scales = (peaks / WEIGHT_LEVELS).float().where(peaks > 0, 1.0)
    levels = (exact / scales.double()[:, None]).round().clamp(-WEIGHT_LEVELS, WEIGHT_LEVELS)
    lost = float((exact - levels * scales.double()[:, None]).square().sum())
    total = float(exact.square().sum())
    energy = 1.0 - lost / total if total else 1.0
    return QuantisedWeight(levels.T.contiguous().to(torch.int8), scales, energy)
