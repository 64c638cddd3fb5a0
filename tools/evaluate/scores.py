"""FID, IS and PSNR by torchmetrics, from what can be added up over shards and processes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calicache.graph_passes.common.ranks import Ranks

_LARGEST = 255.0


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over features, in float64: all that FID needs of a set of images.

    Attributes:
        count: (), of images.
        total: (D,), of their features.
        products: (D, D), of the features' products.
    """

    count: Tensor
    total: Tensor
    products: Tensor

    @staticmethod
    def of(features: Tensor) -> Moments:
        """Of features (N, D)."""
        values = features.double()
        count = torch.tensor(float(len(values)), dtype=torch.float64)
        return Moments(count, values.sum(dim=0), values.t() @ values)

    @staticmethod
    def none(width: int) -> Moments:
        """Of no images, with features of a width."""
        return Moments.of(torch.zeros(0, width))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count, self.total + other.total, self.products + other.products
        )

    def __sub__(self, other: Moments) -> Moments:
        return Moments(
            self.count - other.count, self.total - other.total, self.products - other.products
        )

    def everywhere(self, ranks: Ranks) -> Moments:
        """The sum over all processes.

        Raises:
            RankError: a process is gone.
        """
        return Moments(ranks.add(self.count), ranks.add(self.total), ranks.add(self.products))


class _Given(nn.Module):
    """The network in the place of Inception: what it is given was made before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, values: Tensor) -> Tensor:
        return values


def frechet_distance(real: Moments, fake: Moments) -> float:
    """FID of two sets of at least two images each."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    width = len(real.total)
    metric: Any = FrechetInceptionDistance(_Given(width), sync_on_compute=False)
    for kind, moments in (("real", real), ("fake", fake)):
        metric.update(torch.zeros(0, width, dtype=torch.float64), real=kind == "real")
        setattr(metric, f"{kind}_features_num_samples", moments.count.long())
        setattr(metric, f"{kind}_features_sum", moments.total)
        setattr(metric, f"{kind}_features_cov_sum", moments.products)
    return float(metric.compute())


def inception_score(logits: Sequence[Tensor]) -> float:
    """IS of all images together, from their logits (N, K) in parts."""
    from torchmetrics.image.inception import InceptionScore

    # It shuffles the images, which makes no difference without splits.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of its memory, and of the deviation of one split
        metric: Any = InceptionScore(_Given(logits[0].shape[1]), splits=1, sync_on_compute=False)
        for part in logits:
            metric.update(part.double())
        return float(metric.compute()[0])


def image_psnr(images: Tensor, reference: Tensor) -> Tensor:
    """PSNR of every image uint8 (N, H, W, C) in dB, float64 (N,); infinite for equal ones."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    psnr: Tensor = peak_signal_noise_ratio(
        images.double(), reference.double(), _LARGEST, reduction="none", dim=(1, 2, 3)
    )
    return psnr
