"""A small CNN for Fashion-MNIST; its features and logits score generated images (FID and IS)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from weights import CLASSIFIER_WEIGHTS, load_weights

FEATURE_CHANNELS = 128
NUM_CLASSES = 10


class FashionClassifier(nn.Module):
    """Four 3x3 convolutions, global average pooling and one linear layer."""

    def __init__(self) -> None:
        """Random weights; `load_classifier` gives the trained ones."""
        super().__init__()
        self.backbone = nn.Sequential(
            *_convolution(1, 32, stride=1),  # (B, 32, 28, 28)
            *_convolution(32, 64, stride=2),  # (B, 64, 14, 14)
            *_convolution(64, FEATURE_CHANNELS, stride=2),  # (B, 128, 7, 7)
            *_convolution(FEATURE_CHANNELS, FEATURE_CHANNELS, stride=1),  # (B, 128, 7, 7)
        )
        self.head = nn.Linear(FEATURE_CHANNELS, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Images float32 (B, 1, 28, 28) in -1 .. 1 to features (B, 128), for FID."""
        return self.backbone(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Images float32 (B, 1, 28, 28) in -1 .. 1 to logits (B, 10), for IS."""
        return self.head(self.features(images))


def load_classifier(path: Path = CLASSIFIER_WEIGHTS) -> FashionClassifier:
    """The trained classifier in eval mode, without gradients."""
    model = FashionClassifier()
    load_weights(model, path)
    return model


def _convolution(inputs: int, outputs: int, *, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()
