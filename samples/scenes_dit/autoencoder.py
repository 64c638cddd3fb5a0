"""A small convolutional autoencoder between 64x64 RGB images and 16x16 latents of 4 channels.

The latents are batch-normalised, so every channel has a variance of one, and the decoder learns
on latents with some noise: near latents then are near images, as a diffusion model needs it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from shared import load_weights
from torch import Tensor, nn

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
AUTOENCODER_WEIGHTS = WEIGHTS_FOLDER / "autoencoder.safetensors"
LATENT_CHANNELS, LATENT_SIZE = 4, 16
LATENT_NOISE = 0.1


class Residual(nn.Module):
    """Two 3x3 convolutions beside a skip path; the shape stays (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(hidden)))


class Autoencoder(nn.Module):
    """Encoder, decoder and the normalisation of the latents between them."""

    def __init__(self, narrow: int = 32, wide: int = 96) -> None:
        """Random weights; `load_autoencoder` gives the trained ones."""
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),  # (B, 12, 32, 32)
            nn.Conv2d(12, narrow, 3, padding=1),
            Residual(narrow),
            nn.Conv2d(narrow, wide, 3, stride=2, padding=1),  # (B, W, 16, 16)
            Residual(wide),
            nn.Conv2d(wide, LATENT_CHANNELS, 1),  # (B, 4, 16, 16)
        )
        self.normalise = nn.BatchNorm2d(LATENT_CHANNELS, affine=False)
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, wide, 3, padding=1),  # (B, W, 16, 16)
            Residual(wide),
            nn.Conv2d(wide, 4 * narrow, 1),
            nn.PixelShuffle(2),  # (B, N, 32, 32)
            Residual(narrow),
            nn.Conv2d(narrow, 12, 3, padding=1),
            nn.PixelShuffle(2),  # (B, 3, 64, 64)
        )

    def encode(self, images: Tensor) -> Tensor:
        """Images float32 (B, 3, 64, 64) in -1 .. 1 to latents (B, 4, 16, 16) of unit variance."""
        return self.normalise(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, 16, 16) to images (B, 3, 64, 64), nominally in -1 .. 1."""
        return self.decoder(latents)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images (B, 3, 64, 64) again, by way of latents with `noise` (B, 4, 16, 16) on them."""
        return self.decode(self.encode(images) + LATENT_NOISE * noise)


def load_autoencoder(path: Path = AUTOENCODER_WEIGHTS) -> Autoencoder:
    """The trained autoencoder in eval mode, without gradients."""
    model = Autoencoder()
    load_weights(model, path)
    return model


def latent_noise(batch: int, draw: torch.Generator) -> Tensor:
    """Standard normal latents (B, 4, 16, 16)."""
    return torch.randn(batch, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=draw)
