"""Optimal low-rank maps from second moments of the increments; pure tensor functions.

For an exact map W and C = E[dx dx^T], the rank-r map W_r that minimises E||(W - W_r) dx||^2 is
U U^T W, where U holds the top r eigenvectors of W C W^T = E[dy dy^T] (reduced-rank regression
with a known full-rank map; Izenman, "Reduced-rank regression for the multivariate linear
model", 1975). For a whole residual branch there is no W: the full-rank map is the regression
M = E[dy dx^T] C^-1, and U holds the top r eigenvectors of M C M^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from calicache.graph_passes.common.errors import DecomposeError
from calicache.graph_passes.factors.decompose import CalibrationFactors
from calicache.graph_passes.factors.statistics import SecondMoments

RIDGE = 1e-5


def covariance_factors(
    weights: Sequence[Tensor], rank: int, moments: SecondMoments
) -> CalibrationFactors:
    """The best rank-r map of one site, or of sibling sites stacked.

    Args:
        weights: W of every sibling, each (out, in).
        rank: r, 0 .. min(in, sum of out).
        moments: `output` of the stacked y where out < in, else `input`.

    Returns:
        Factors with `up` (sum of out, r), rows in the order of `weights`.

    Raises:
        DecomposeError: weights or moments are not finite.
    """
    dtype = weights[0].dtype
    stacked = torch.cat([weight.detach().double() for weight in weights])  # W (out, in)
    _check_finite(stacked, *moments.tensors().values())
    if moments.output is not None:
        spectrum, vectors = _eigen(moments.output.to(stacked))
        up = _top(vectors, rank)  # (out, r)
    else:
        assert moments.input is not None
        spectrum, up = _output_directions(stacked, moments.input.to(stacked), rank)
    factors = _factors(up, up.T @ stacked, spectrum, rank, dtype)
    return replace(factors, read=factors.up.T)


def branch_factors(rank: int, moments: SecondMoments, dtype: torch.dtype) -> CalibrationFactors:
    """The best rank-r map from the input increment of a residual branch to its output's.

    Args:
        rank: r, 0 .. min(in, out).
        moments: `input` and `cross`.
        dtype: of the factors.

    Raises:
        DecomposeError: the moments are not finite.
    """
    assert moments.input is not None
    assert moments.cross is not None
    _check_finite(moments.input, moments.cross)
    second, cross = moments.input.double(), moments.cross.double()
    # A small ridge keeps directions that were hardly seen from taking huge weights.
    ridge = (RIDGE * second.diagonal().mean()).clamp(min=torch.finfo(torch.float64).tiny)
    exact = torch.linalg.solve(second + ridge * torch.eye(len(second)).to(second), cross).T
    spectrum, up = _output_directions(exact, second, rank)
    return _factors(up, up.T @ exact, spectrum, rank, dtype)


def _output_directions(exact: Tensor, second: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues of W C W^T, ascending, and its top r eigenvectors (out, r)."""
    out_features, in_features = exact.shape
    if out_features <= in_features:
        spectrum, vectors = _eigen(exact @ second @ exact.T)
        return spectrum, _top(vectors, rank)
    # W is tall: with C = L L^T and M = W L, the top eigenvectors of M M^T are M V / s from
    # M^T M = V s^2 V^T.
    tall = exact @ _square_root(second)  # (out, in)
    spectrum, right = _eigen(tall.T @ tall)
    # Directions that carry no energy are left to the QR's completion.
    up, _ = torch.linalg.qr(tall @ _top(right, rank))
    return spectrum, up


def _square_root(second: Tensor) -> Tensor:
    """L with L L^T = C: by Cholesky, or by eigenvalues where C is singular."""
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex((second + second.T) / 2)
    if not int(failed):
        return lower
    values, basis = _eigen(second)
    return basis * values.clamp(min=0.0).sqrt()


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values, vectors


def _top(vectors: Tensor, rank: int) -> Tensor:
    return vectors[:, vectors.shape[1] - rank :].flip(1)


def _factors(
    up: Tensor, down: Tensor, spectrum: Tensor, rank: int, dtype: torch.dtype
) -> CalibrationFactors:
    # Running sums, so that rounding never makes the energy fall or pass 1.
    sums = torch.cat([spectrum.new_zeros(1), spectrum.clamp(min=0.0).flip(0).cumsum(0)])
    kept, total = float(sums[rank]), float(sums[-1])
    return CalibrationFactors(
        down.to(dtype).contiguous(),
        up.to(dtype).contiguous(),
        kept / total if total > 0 else 1.0,
        spectrum=sums.diff().float().cpu(),
    )


def _check_finite(*values: Tensor) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise DecomposeError(
            "weight or statistics",
            expected="finite values",
            got="NaN or Inf",
            fix="Check the checkpoint and the recorded recording.",
        )
