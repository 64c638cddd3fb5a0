"""Ridge least squares by the normal equations: one problem, or a batch of them side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-6
FAINT = 1e-12  # share of the energy below which a column moves nothing


@dataclass(frozen=True, slots=True)
class NormalEquations:
    """G and h of the least squares |A c - r|^2, with the columns a_k of A; float64.

    Attributes:
        gram: G = A^T A, (..., K, K).
        moment: h = A^T r, (..., K).
    """

    gram: Tensor
    moment: Tensor

    @staticmethod
    def of(columns: Tensor, residual: Tensor) -> NormalEquations:
        """From the columns a_k (..., K, n) and r (..., n)."""
        gram = columns @ columns.mT
        moment = (columns @ residual[..., None])[..., 0]
        return NormalEquations(gram, moment)

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """The equations of both problems' rows together."""
        return NormalEquations(self.gram + other.gram, self.moment + other.moment)

    def solution(self, energy: Tensor | float) -> Tensor:
        """Solve for the c of the least |A c - r|^2 + RIDGE sum_k |a_k|^2 c_k^2.

        Args:
            energy: what |a_k|^2 is compared with; columns that are faint beside it get 0.

        Returns:
            c, (..., K).
        """
        squares = self.gram.diagonal(dim1=-2, dim2=-1)
        faint = squares <= FAINT * energy
        strong = ~faint
        gram = self.gram * strong[..., None] * strong[..., None, :]
        ridge = RIDGE * squares * strong + faint
        solution: Tensor = torch.linalg.solve(gram + torch.diag_embed(ridge), self.moment * strong)
        return solution
