"""The trained models of the grid: what they are asked for, and how their images are seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from grid_shared import (
    DIT_WEIGHTS,
    NUM_CLASSES,
    Autoencoder,
    FashionClassifier,
    FashionDiT,
    Split,
    captions,
    draw_scenes,
    empty_captions,
    latent_noise,
    load_autoencoder,
    load_classifier,
    load_scene_dit,
    load_split,
    load_weights,
    render,
)
from torch import Tensor, nn

REAL_IMAGES, PART = 10_000, 250

Request = tuple[Tensor, tuple[str, Tensor, Tensor]]  # noise, and `denoise`'s conditions


@dataclass(frozen=True, slots=True)
class Subject:
    """A trained model.

    Attributes:
        model: in eval mode.
        draw: noise and conditions of a seed and a number of samples, other ones for each seed.
        features: of final latents (B, ...), (B, F): what FID sees.
        real: the features of real images, (N, F).
    """

    model: nn.Module
    draw: Callable[[int, int], Request]
    features: Callable[[Tensor], Tensor]
    real: Callable[[], Tensor]


def load_subject(name: str, data: Path | None = None) -> Subject:
    """A subject of `cells.SAMPLERS`.

    Args:
        name: `fashion` or `scenes`.
        data: folder of Fashion-MNIST's files; Debian's place if None.
    """
    return {"fashion": _fashion, "scenes": _scenes}[name](data)


def _fashion(data: Path | None) -> Subject:
    classifier = load_classifier()
    return Subject(
        load_weights(FashionDiT(), DIT_WEIGHTS),
        _draw_fashion,
        partial(_fashion_features, classifier),
        partial(_real_fashion, classifier, data),
    )


def _draw_fashion(seed: int, count: int) -> Request:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % NUM_CLASSES
    nulls = torch.full_like(labels, NUM_CLASSES)
    return torch.randn(count, 1, 28, 28, generator=draw), ("class_labels", labels, nulls)


@torch.no_grad()
def _fashion_features(classifier: FashionClassifier, images: Tensor) -> Tensor:
    """Of images (B, 1, 28, 28) in -1 .. 1, (B, 128)."""
    return classifier.features(images.clamp(-1, 1))


def _real_fashion(classifier: FashionClassifier, data: Path | None) -> Tensor:
    split = load_split(data, train=False)
    parts = torch.arange(len(split.labels)).split(PART)
    return torch.cat([_fashion_features(classifier, split.batch(part)[0]) for part in parts])


def _scenes(data: Path | None) -> Subject:
    autoencoder, split = load_autoencoder(), load_split(data, train=False)
    return Subject(
        load_scene_dit(),
        partial(_draw_scenes, split),
        partial(_scene_features, autoencoder),
        partial(_real_scenes, autoencoder, split),
    )


def _draw_scenes(split: Split, seed: int, count: int) -> Request:
    draw = torch.Generator().manual_seed(seed)
    asked = captions(draw_scenes(split, count, draw))
    return latent_noise(count, draw), ("caption", asked, empty_captions(count))


@torch.no_grad()
def _scene_features(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Of latents (B, 4, 16, 16), (B, 192): the encoder's view of their images."""
    return _encoder_features(autoencoder, autoencoder.decode(latents).clamp(-1, 1))


def _encoder_features(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Mean and deviation over the places of what the encoder's last layer reads, (B, 2 W)."""
    hidden = autoencoder.encoder[:-1](images)  # (B, W, 16, 16)
    return torch.cat([hidden.mean((2, 3)), hidden.std((2, 3))], dim=1)


@torch.no_grad()
def _real_scenes(autoencoder: Autoencoder, split: Split) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    features = []
    for _ in range(REAL_IMAGES // PART):
        # As the transformer sees them: behind the autoencoder.
        latents = autoencoder.encode(render(draw_scenes(split, PART, draw), split))
        features.append(_scene_features(autoencoder, latents))
    return torch.cat(features)
