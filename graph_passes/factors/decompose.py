"""Statistics and a weight to low-rank calibration factors; pure tensor functions.

Source: "Accelerating Diffusion Transformer via Increment-Calibrated Caching with
Channel-Aware Singular Value Decomposition" (CVPR 2025, arXiv 2505.05829).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calicache.graph_passes.common.errors import DecomposeError
from calicache.graph_passes.factors.statistics import ChannelStatistics

POWER = 0.5
FLOOR_SHARE = 1e-3
OFFSET = 1e-6


@dataclass(frozen=True, slots=True)
class CalibrationFactors:
    """W_r = up @ down, the low-rank map from the increment of x to that of y.

    Attributes:
        down: A, (r, in).
        up: B, (out, r), with orthonormal columns.
        energy: share of the squared (weighted) singular values that W_r keeps, 0 .. 1.
        read: K, (r, out) with A = K W, so that A x = K (y - b) can be read off an output;
            None where there is none.
        spectrum: float32, the energy of every direction that there is, largest first; the map
            keeps the first r. None for a model on the meta device.
    """

    down: Tensor
    up: Tensor
    energy: float
    read: Tensor | None = None
    spectrum: Tensor | None = None

    @property
    def rank(self) -> int:
        """r; 0 leaves the increment out."""
        return self.down.shape[0]

    def kept_energy(self) -> dict[int, float]:
        """Share of the energy that a rank keeps: at 0, the powers of sqrt 2, r, and all directions.

        Empty where there is no spectrum, or no energy at all.
        """
        if self.spectrum is None or not float(self.spectrum.sum()):
            return {}
        energies, most = self.spectrum.double(), len(self.spectrum)
        powers = (round(2 ** (k / 2)) for k in range(2 * most.bit_length()))
        sums = energies.cumsum(0) / energies.sum()
        ranks = sorted({rank for rank in (*powers, self.rank, most) if 0 < rank <= most})
        return {0: 0.0} | {rank: float(sums[rank - 1]) for rank in ranks}


def channel_scales(statistics: Tensor) -> Tensor:
    """The paper's l or c from a statistic: power 0.5, floor at max / 1000, plus 1e-6.

    Args:
        statistics: (channels,), from `ChannelStatistics`.

    Returns:
        float64 (channels,), all positive.
    """
    scales = statistics.double().clamp(min=0.0) ** POWER
    return scales.clamp(min=float(scales.max()) * FLOOR_SHARE) + OFFSET


def decompose(
    weight: Tensor, rank: int, statistics: ChannelStatistics | None = None
) -> CalibrationFactors:
    """Best rank-r approximation of diag(l) W diag(c), the scales divided out again.

    With M = diag(l) W diag(c) and U its top left singular vectors, the result is
    W_r = diag(1/l) U Uᵀ diag(l) W (or the same from the right singular vectors, where W is
    tall). Computed in float64 from the eigenvectors of the smaller Gram matrix of M, which
    costs far less than an SVD of M.

    Args:
        weight: W (out, in).
        rank: r, 0 .. min(out, in).
        statistics: what l and c come from; None takes W itself.

    Raises:
        DecomposeError: the rank is out of range, or weight or statistics are not finite.
    """
    out_features, in_features = weight.shape
    if not 0 <= rank <= min(out_features, in_features):
        raise DecomposeError(
            "rank",
            expected=f"0 .. {min(out_features, in_features)} for a weight {tuple(weight.shape)}",
            got=str(rank),
            fix="Choose a smaller rank, or exclude the layer.",
        )
    if weight.is_meta:
        meta = torch.empty(0, device="meta", dtype=weight.dtype)
        return CalibrationFactors(
            meta.new_empty(rank, in_features),
            meta.new_empty(out_features, rank),
            0.0,
            None if out_features > in_features else meta.new_empty(rank, out_features),
        )
    exact = weight.detach().double()
    left, right = torch.ones(out_features), torch.ones(in_features)
    if statistics is not None:
        left, right = channel_scales(statistics.output), channel_scales(statistics.input)
    left, right = left.to(exact), right.to(exact)
    scaled = left[:, None] * exact * right  # M (out, in)
    if not bool(torch.isfinite(scaled).all()):
        raise DecomposeError(
            "weight or statistics",
            expected="finite values",
            got="NaN or Inf",
            fix="Check the checkpoint and the recorded recording.",
        )
    tall = out_features > in_features
    gram = scaled.T @ scaled if tall else scaled @ scaled.T
    values, vectors = torch.linalg.eigh(gram)  # ascending
    top = vectors[:, vectors.shape[1] - rank :].flip(1)
    read = None
    if tall:
        up, down = exact @ (right[:, None] * top), (top / right[:, None]).T
    else:
        up, read = top / left[:, None], top.T * left
        down = read @ exact
    # Orthonormal columns in `up`: the map is the same, and channels with a small scale do
    # not lose digits when the factors are rounded to the model's dtype.
    up, triangle = torch.linalg.qr(up)
    down = triangle @ down
    if read is not None:
        read = (triangle @ read).to(weight.dtype)
    # Running sums, so that rounding never makes the energy fall or pass 1.
    sums = torch.cat([values.new_zeros(1), values.clamp(min=0.0).flip(0).cumsum(0)])
    kept, total = float(sums[rank]), float(sums[-1])
    return CalibrationFactors(
        down.to(weight.dtype).contiguous(),
        up.to(weight.dtype).contiguous(),
        kept / total if total > 0 else 1.0,
        read,
        sums.diff().float().cpu(),
    )
