"""Optimal low-rank maps from second moments of the increments; pure tensor functions.

For an exact map W and C = E[dx dx^T], the rank-r map W_r that minimises E||(W - W_r) dx||^2 is
U U^T W, where U holds the top r eigenvectors of W C W^T = E[dy dy^T] (reduced-rank regression
with a known full-rank map; Izenman, "Reduced-rank regression for the multivariate linear
model", 1975). For a whole residual branch there is no W: the full-rank map is the regression
M = E[dy dx^T] C^-1, and U holds the top r eigenvectors of M C M^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calicache.graph_passes.factors.decompose import (
    CalibrationFactors,
    best_columns,
    check_finite,
    check_rank,
    descending,
    kept_share,
)
from calicache.graph_passes.factors.statistics import SecondMoments

RIDGE = 1e-5  # of the regression
TINY_RIDGE = 1e-12  # of a singular W, above the rounding of W^T W


@dataclass(frozen=True, slots=True)
class OutputDirections:
    """Directions of W C W^T, whose best r columns U give the best map, U U^T W.

    Attributes:
        exact: float64 W (out, in), the full-rank map.
        dtype: of the factors.
        vectors: float64, the best direction last: of W C W^T (out, out), or of R C R^T (in, in)
            with W = Q R, where W is tall.
        triangle: float64 R (in, in), where W is tall.
        spectrum: float64 (k,), energy of every direction, largest first.
        readable: whether A x can be read off the output: not where W is a regression.
    """

    exact: Tensor
    dtype: torch.dtype
    vectors: Tensor
    triangle: Tensor | None
    spectrum: Tensor
    readable: bool

    def at(self, rank: int) -> CalibrationFactors:
        """The factors of rank r, `up` with the rows of all siblings; see `Decomposition`."""
        check_rank(rank, self.exact.shape)
        up = best_columns(self.vectors, rank)
        if self.triangle is not None:
            up = self.exact @ torch.linalg.solve_triangular(self.triangle, up, upper=True)
            # Directions that carry no energy are left to the QR's completion.
            up, _ = torch.linalg.qr(up)
        own = up.to(self.dtype).contiguous()
        return CalibrationFactors(
            (up.T @ self.exact).to(self.dtype).contiguous(),
            own,
            kept_share(self.spectrum, rank),
            own.T if self.readable else None,
            self.spectrum.float().cpu(),
        )

    def nbytes(self) -> int:
        """Memory that it holds."""
        held = (self.exact, self.vectors, self.triangle)
        return sum(value.nbytes for value in held if value is not None)


def decompose_increments(weights: Sequence[Tensor], moments: SecondMoments) -> OutputDirections:
    """Directions of one site, or of sibling sites stacked.

    Args:
        weights: W of every sibling, each (out, in).
        moments: `output` of the stacked y where out < in, else `input`.

    Raises:
        DecomposeError: weights or moments are not finite.
    """
    stacked = torch.cat([weight.detach().double() for weight in weights])  # W (out, in)
    check_finite(stacked, *moments.tensors().values())
    dtype = weights[0].dtype
    if moments.output is not None:
        values, vectors = _eigen(moments.output.to(stacked))
        return OutputDirections(stacked, dtype, vectors, None, descending(values), readable=True)
    assert moments.input is not None
    return _directions(stacked, moments.input.to(stacked), dtype, readable=True)


def decompose_branch(moments: SecondMoments, dtype: torch.dtype) -> OutputDirections:
    """Directions of the map from the input increment of a residual branch to its output's.

    Args:
        moments: `input` and `cross`.
        dtype: of the factors.

    Raises:
        DecomposeError: the moments are not finite.
    """
    assert moments.input is not None
    assert moments.cross is not None
    check_finite(moments.input, moments.cross)
    second, cross = moments.input.double(), moments.cross.double()
    # A small ridge keeps directions that were hardly seen from taking huge weights.
    ridge = (RIDGE * second.diagonal().mean()).clamp(min=torch.finfo(torch.float64).tiny)
    exact = torch.linalg.solve(second + ridge * torch.eye(len(second)).to(second), cross).T
    return _directions(exact, second, dtype, readable=False)


def _directions(
    exact: Tensor, second: Tensor, dtype: torch.dtype, *, readable: bool
) -> OutputDirections:
    """From W (out, in) and C (in, in), in the smaller of the two dimensions."""
    out_features, in_features = exact.shape
    if out_features <= in_features:
        values, vectors = _eigen(exact @ second @ exact.T)
        return OutputDirections(exact, dtype, vectors, None, descending(values), readable)
    # W is tall: with W = Q R, W C W^T = Q (R C R^T) Q^T, whose eigenvectors are Q V. R is the
    # Cholesky factor of W^T W, which costs a third of a QR; Q = W R^-1 is never made.
    triangle = _triangle(exact)
    values, vectors = _eigen(triangle @ second @ triangle.T)
    return OutputDirections(exact, dtype, vectors, triangle, descending(values), readable)


def _triangle(exact: Tensor) -> Tensor:
    """R (in, in), upper triangular, with R^T R = W^T W but for a ridge where W is singular."""
    gram = exact.T @ exact
    tiny = torch.finfo(gram.dtype).tiny
    size = gram.diagonal().mean().clamp(min=tiny)
    for ridge in (0.0, TINY_RIDGE):
        triangle: Tensor
        triangle, failed = torch.linalg.cholesky_ex(
            gram + ridge * size * torch.eye(len(gram)).to(gram), upper=True
        )
        if not int(failed):
            break
    return triangle


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values, vectors
