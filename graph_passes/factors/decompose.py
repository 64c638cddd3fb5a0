"""Statistics and a weight to low-rank calibration factors; pure tensor functions.

Source: "Accelerating Diffusion Transformer via Increment-Calibrated Caching with
Channel-Aware Singular Value Decomposition" (CVPR 2025, arXiv 2505.05829).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

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

    @property
    def nbytes(self) -> int:
        """Memory that they hold."""
        tensors = (self.down, self.up, self.read, self.spectrum)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def to(self, like: Tensor) -> CalibrationFactors:
        """The same on the device and in the dtype of a weight."""
        read = None if self.read is None else self.read.to(like)
        return replace(self, down=self.down.to(like), up=self.up.to(like), read=read)

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


class Decomposition(Protocol):
    """All directions of one calibration target, of which a map of any rank takes the best."""

    @property
    def spectrum(self) -> Tensor:
        """float64 (k,), energy of every direction, largest first."""

    def at(self, rank: int) -> CalibrationFactors:
        """The factors of rank r, in the dtype of the weight.

        Raises:
            DecomposeError: there is no such rank.
        """

    def nbytes(self) -> int:
        """Memory that it holds."""


@dataclass(frozen=True, slots=True)
class ScaledDirections:
    """Directions of M = diag(l) W diag(c), the scales divided out again: the paper's weightings.

    With U the top left singular vectors of M, W_r = diag(1/l) U U^T diag(l) W (or the same from
    the right singular vectors V, where W is tall). From the eigenvectors of the smaller Gram
    matrix of M, which cost far less than an SVD of M.

    Attributes:
        exact: float64 W (out, in).
        dtype: of the factors.
        left, right: l (out,) and c (in,).
        vectors: float64 U (out, out), or V (in, in) where W is tall; the best direction last.
        spectrum: see `Decomposition`.
    """

    exact: Tensor
    dtype: torch.dtype
    left: Tensor
    right: Tensor
    vectors: Tensor
    spectrum: Tensor

    def at(self, rank: int) -> CalibrationFactors:
        """The factors of rank r, in the dtype of the weight; see `Decomposition`."""
        check_rank(rank, self.exact.shape)
        top = best_columns(self.vectors, rank)
        out_features, in_features = self.exact.shape
        read = None
        if out_features > in_features:
            up, down = self.exact @ (self.right[:, None] * top), (top / self.right[:, None]).T
        else:
            up, read = top / self.left[:, None], top.T * self.left
            down = read @ self.exact
        # Orthonormal columns in `up`: the map is the same, and channels with a small scale do
        # not lose digits when the factors are rounded to the model's dtype.
        up, triangle = torch.linalg.qr(up)
        return CalibrationFactors(
            (triangle @ down).to(self.dtype).contiguous(),
            up.to(self.dtype).contiguous(),
            kept_share(self.spectrum, rank),
            None if read is None else (triangle @ read).to(self.dtype),
            self.spectrum.float().cpu(),
        )

    def nbytes(self) -> int:
        """Memory that it holds."""
        return self.exact.nbytes + self.vectors.nbytes


def decompose_weight(
    weight: Tensor, statistics: ChannelStatistics | None = None
) -> ScaledDirections:
    """Directions of one layer's weight, scaled by its channel statistics.

    Args:
        weight: W (out, in).
        statistics: what l and c come from; None takes W itself.

    Raises:
        DecomposeError: weight or statistics are not finite.
    """
    exact = weight.detach().double()
    out_features, in_features = exact.shape
    left, right = torch.ones(out_features), torch.ones(in_features)
    if statistics is not None:
        left, right = channel_scales(statistics.output), channel_scales(statistics.input)
    left, right = left.to(exact), right.to(exact)
    scaled = left[:, None] * exact * right  # M (out, in)
    check_finite(scaled)
    gram = scaled.T @ scaled if out_features > in_features else scaled @ scaled.T
    values, vectors = torch.linalg.eigh(gram)  # ascending
    return ScaledDirections(exact, weight.dtype, left, right, vectors, descending(values))


def best_columns(vectors: Tensor, rank: int) -> Tensor:
    """The last r columns of eigenvectors in ascending order, the best first."""
    return vectors[:, vectors.shape[1] - rank :].flip(1)


def descending(values: Tensor) -> Tensor:
    """Energies (k,), largest first, from ascending eigenvalues; rounding below 0 is 0."""
    # Differences of running sums, so that rounding never makes a kept share fall or pass 1.
    energies = values.clamp(min=0.0).flip(0)
    return torch.cat([energies.new_zeros(1), energies.cumsum(0)]).diff()


def kept_share(spectrum: Tensor, rank: int) -> float:
    """Share of the energy in the best r directions, 0 .. 1; 1 where there is no energy."""
    sums = torch.cat([spectrum.new_zeros(1), spectrum.cumsum(0)])
    kept, total = float(sums[rank]), float(sums[-1])
    return kept / total if total > 0 else 1.0


def check_rank(rank: int, shape: Sequence[int]) -> None:
    """Refuse a rank that a map of this shape (out, in) cannot have.

    Raises:
        DecomposeError: it is below 0, or above the smaller side.
    """
    if not 0 <= rank <= min(shape):
        raise DecomposeError(
            "rank",
            expected=f"0 .. {min(shape)} for a weight {tuple(shape)}",
            got=str(rank),
            fix="Choose a smaller rank, or exclude the layer.",
        )


def check_finite(*values: Tensor) -> None:
    """Refuse NaN and Inf.

    Raises:
        DecomposeError: there is one.
    """
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise DecomposeError(
            "weight or statistics",
            expected="finite values",
            got="NaN or Inf",
            fix="Check the checkpoint and the recording.",
        )
