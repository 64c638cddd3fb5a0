"""How good sampled images are: against reference images of the same seeds, and as a set."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from classifier import FashionClassifier, load_classifier
from data import load_split
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

BATCH = 256


@dataclass(frozen=True, slots=True)
class Distance:
    """Mean over images of the relative L2 error, its standard error, and the PSNR in dB."""

    relative_error: float
    standard_error: float
    psnr: float


def distance(images: Tensor, reference: Tensor) -> Distance:
    """Compare images (M, 1, H, W) in -1 .. 1 with a reference of the same seeds."""
    relative = sample_errors(images, reference)
    psnr = peak_signal_noise_ratio(
        images.clamp(-1, 1),
        reference.clamp(-1, 1),
        data_range=2.0,
        dim=(1, 2, 3),
        reduction="elementwise_mean",
    )
    spread = float(relative.std()) / len(relative) ** 0.5
    return Distance(float(relative.mean()), spread, float(psnr))


def sample_errors(images: Tensor, reference: Tensor) -> Tensor:
    """Relative L2 error of every image (M, 1, H, W): (M,)."""
    return (images - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)


class Signed(nn.Module):
    """A classifier's features or logits from the uint8 images that torchmetrics hands on."""

    def __init__(self, classifier: FashionClassifier, *, logits: bool) -> None:
        super().__init__()
        self.classifier, self.logits = classifier, logits

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (B, 1, 28, 28) to (B, 128) or (B, 10)."""
        signed = images.float() / 127.5 - 1.0
        return self.classifier(signed) if self.logits else self.classifier.features(signed)


class SetScores:
    """FID against the 10,000 test images, and IS, by the sample classifier."""

    def __init__(self, data_folder: Path | None = None) -> None:
        classifier = load_classifier()
        self._fid = FrechetInceptionDistance(
            Signed(classifier, logits=False),
            reset_real_features=False,
            input_img_size=(1, 28, 28),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it keeps 10 numbers an image
            self._is = InceptionScore(Signed(classifier, logits=True), splits=1)
        split = load_split(data_folder, train=False)
        for part in torch.arange(len(split.labels)).split(BATCH):
            self._fid.update(eight_bit(split.batch(part)[0]), real=True)

    def score(self, images: Iterable[Tensor]) -> tuple[float, float]:
        """FID and IS of images in -1 .. 1, given in batches (B, 1, 28, 28)."""
        self._fid.reset()
        self._is.reset()
        for batch in images:
            self._fid.update(eight_bit(batch), real=False)
            self._is.update(eight_bit(batch))
        return float(self._fid.compute()), float(self._is.compute()[0])


def eight_bit(images: Tensor) -> Tensor:
    """Images in -1 .. 1 to uint8; torchmetrics hands other values to FID's network unscaled."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
