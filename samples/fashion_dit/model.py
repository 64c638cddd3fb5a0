"""A small adaLN-Zero diffusion transformer for 28x28 grey-scale images.

The design follows "Scalable Diffusion Models with Transformers" (Peebles and Xie,
ICCV 2023): patchify, fixed sine-cosine positions, adaLN-Zero blocks, a class embedding
with one extra null class for classifier-free guidance, epsilon prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class FashionDiTConfig:
    """Sizes of the model. `num_classes` leaves the null class out."""

    image_size: int = 28
    patch_size: int = 4
    width: int = 256
    depth: int = 4
    heads: int = 4
    num_classes: int = 10
    frequency_channels: int = 256

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Patches in one image."""
        return self.grid**2


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift tokens (B, N, C) by one vector (B, C) per sample."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sine_cosine_positions(channels: int, grid: int) -> Tensor:
    """Fixed 2-D position table (1, grid * grid, channels): one half for rows, one for columns."""
    quarter = channels // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    axis = torch.arange(grid, dtype=torch.float64)
    angle = axis[:, None] * omega  # (G, C/4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # (G, C/2)
    rows = line[:, None, :].expand(grid, grid, -1)
    columns = line[None, :, :].expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=-1).reshape(1, grid * grid, channels).float()


class TimestepEmbedder(nn.Module):
    """Sinusoidal timestep features, then a two-layer perceptron."""

    def __init__(self, width: int, frequency_channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(frequency_channels, width)
        self.fc2 = nn.Linear(width, width)
        half = frequency_channels // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        """Timesteps (B,) to embeddings (B, C)."""
        angle = timestep[:, None].to(self.frequencies.dtype) * self.frequencies  # (B, F/2)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)  # (B, F)
        return self.fc2(F.silu(self.fc1(features)))


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens; the shape stays (B, N, C)."""
        split = (x.shape[0], x.shape[1], self.heads, -1)
        q, k, v = (layer(x).view(split).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, C/H)
        return self.proj(mixed.transpose(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    """Token-wise perceptron with a four times wider hidden layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """adaLN-Zero block: two gated residual branches, modulated by the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (B, N, C) and condition (B, C) to tokens (B, N, C)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FashionDiT(nn.Module):
    """Predicts the noise in a noisy image, given the timestep and the class."""

    def __init__(self, config: FashionDiTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or FashionDiTConfig()
        width, patch = config.width, config.patch_size
        self.patch_embed = nn.Linear(patch * patch, width)
        self.time_embed = TimestepEmbedder(width, config.frequency_channels)
        self.class_embed = nn.Embedding(config.num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final_proj = nn.Linear(width, patch * patch)
        positions = sine_cosine_positions(width, config.grid)
        self.register_buffer("positions", positions, persistent=False)
        self._initialise()

    @property
    def null_class(self) -> int:
        """Label that stands for "no class", for classifier-free guidance."""
        return self.config.num_classes

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            hidden_states: noisy images, float (B, 1, H, W).
            timestep: diffusion timesteps in 0 .. 999, (B,).
            class_labels: int64 (B,); `null_class` means unconditional.

        Returns:
            The predicted noise, (B, 1, H, W).
        """
        grid, patch = self.config.grid, self.config.patch_size
        batch = hidden_states.shape[0]
        patches = hidden_states.view(batch, grid, patch, grid, patch).transpose(2, 3)
        x = self.patch_embed(patches.reshape(batch, grid * grid, patch * patch))  # (B, N, C)
        x = x + self.positions
        condition = F.silu(self.time_embed(timestep) + self.class_embed(class_labels))  # (B, C)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.final_modulation(condition).chunk(2, dim=-1)
        x = self.final_proj(modulate(self.final_norm(x), shift, scale))  # (B, N, P*P)
        x = x.view(batch, grid, grid, patch, patch).transpose(2, 3)
        return x.reshape(hidden_states.shape)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_embed.weight, std=0.02)
        nn.init.normal_(self.time_embed.fc1.weight, std=0.02)
        nn.init.normal_(self.time_embed.fc2.weight, std=0.02)
        # adaLN-Zero: every block starts as the identity, the output as zero.
        for layer in [*(block.modulation for block in self.blocks), self.final_modulation]:
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_proj.weight)
