"""FID of features, with an interval over the samples that were drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 200


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the middle 95 % of what resampled samples give."""

    value: float
    low: float
    high: float


class FrechetDistance:
    """Distance of feature sets to a reference, Heusel et al. 2017, eq. 6.

        |m - m_r|^2 + tr(C + C_r - 2 (C_r^1/2 C C_r^1/2)^1/2)

    Resampled sets are drawn anew from the same samples, by the same numbers for every set: two
    sets of the same seeds are compared sample by sample. The reference is taken as it is.
    """

    def __init__(self, reference: Tensor) -> None:
        """Of features (N, F)."""
        reference = reference.double()
        self._mean, self._covariance = reference.mean(0), torch.cov(reference.T)
        values, vectors = torch.linalg.eigh(self._covariance)
        self._root = vectors * values.clamp(min=0).sqrt() @ vectors.T

    def __call__(self, features: Tensor) -> float:
        """Of features (M, F)."""
        features = features.double()
        covariance = torch.cov(features.T)
        both = torch.linalg.eigvalsh(self._root @ covariance @ self._root)
        traces = covariance.trace() + self._covariance.trace()
        apart = (features.mean(0) - self._mean).square().sum()
        return float(apart + traces - 2 * both.clamp(min=0).sqrt().sum())

    def interval(self, features: Tensor) -> Interval:
        """Of features (M, F), with its interval."""
        return _interval(self(features), self.resampled(features))

    def difference(self, features: Tensor, others: Tensor) -> Interval:
        """How much more a set has than another of the same seeds, both (M, F)."""
        value = self(features) - self(others)
        return _interval(value, self.resampled(features) - self.resampled(others))

    def resampled(self, features: Tensor) -> Tensor:
        """Distances of resampled sets, (RESAMPLES,).

        A set drawn with repetitions lies further from the reference than its samples do; what
        that adds, on the mean, is taken off.
        """
        draw = torch.Generator().manual_seed(0)
        count = len(features)
        sets = (torch.randint(count, (count,), generator=draw) for _ in range(RESAMPLES))
        distances = torch.tensor([self(features[chosen]) for chosen in sets])
        return distances - (distances.mean() - self(features))


def _interval(value: float, resampled: Tensor) -> Interval:
    low, high = resampled.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Interval(value, float(low), float(high))
