"""A small text-conditioned diffusion transformer for latents of 16x16.

The design follows "PixArt-alpha" (Chen et al., ICLR 2024): self-attention, cross-attention to
the caption and a perceptron in every block, and adaLN-single, one modulation of the timestep for
all blocks, to which each adds a table of its own. Queries and keys are normalised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scenes import CAPTION_LENGTH, PADDING, VOCABULARY
from shared import Mlp, TimestepEmbedder, modulate, sine_cosine_positions
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class SceneDiTConfig:
    """Sizes of the model; every place of the latent is a token."""

    latent_channels: int = 4
    grid: int = 16
    width: int = 192
    depth: int = 10
    heads: int = 6
    words: int = len(VOCABULARY)
    caption_length: int = CAPTION_LENGTH
    frequency_channels: int = 256


class Attention(nn.Module):
    """Multi-head attention of tokens (B, N, C) to a context (B, M, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, visible: Tensor | None = None) -> Tensor:
        """Mix the context into tokens; the shape stays (B, N, C).

        Args:
            x: tokens (B, N, C).
            context: what the tokens see, (B, M, C); they themselves in self-attention.
            visible: bool (B, 1, 1, M); all of the context when None.
        """
        batch, width = x.shape[0], x.shape[2]
        q, k, v = (
            layer(values).view(batch, values.shape[1], self.heads, -1)
            for layer, values in ((self.q, x), (self.k, context), (self.v, context))
        )  # (B, N, H, C/H), (B, M, H, C/H) twice
        mixed = F.scaled_dot_product_attention(
            self.q_norm(q).transpose(1, 2),
            self.k_norm(k).transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=visible,
        )  # (B, H, N, C/H)
        return self.proj(mixed.transpose(1, 2).reshape(batch, -1, width))


class Block(nn.Module):
    """Gated self-attention, cross-attention and a gated perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.cross_attn = Attention(width, heads)
        self.norm3 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width)
        self.table = nn.Parameter(torch.zeros(6, width))

    def forward(self, x: Tensor, modulation: Tensor, caption: Tensor, visible: Tensor) -> Tensor:
        """One block.

        Args:
            x: tokens (B, N, C).
            modulation: shifts, scales and gates that all blocks share, (B, 6, C).
            caption: embedded words (B, L, C).
            visible: which words are no padding, bool (B, 1, 1, L).

        Returns:
            Tokens (B, N, C).
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.table).unbind(1)
        seen = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1.unsqueeze(1) * self.attn(seen, seen)
        x = x + self.cross_attn(self.norm2(x), caption, visible)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm3(x), shift2, scale2))


class SceneDiT(nn.Module):
    """Predicts the velocity from latent to noise, given the timestep and a caption."""

    def __init__(self, config: SceneDiTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SceneDiTConfig()
        width = config.width
        self.latent_embed = nn.Linear(config.latent_channels, width)
        self.time_embed = TimestepEmbedder(width, config.frequency_channels)
        self.modulation = nn.Linear(width, 6 * width)
        self.word_embed = nn.Embedding(config.words, width)
        self.word_positions = nn.Parameter(torch.zeros(1, config.caption_length, width))
        self.caption_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.final_table = nn.Parameter(torch.zeros(2, width))
        self.final_proj = nn.Linear(width, config.latent_channels)
        positions = sine_cosine_positions(width, config.grid)
        self.register_buffer("positions", positions, persistent=False)
        self._initialise()

    def forward(self, hidden_states: Tensor, timestep: Tensor, caption: Tensor) -> Tensor:
        """Predict the velocity.

        Args:
            hidden_states: noisy latents, float (B, 4, 16, 16).
            timestep: a thousand times the share of noise, float in 0 .. 1000, (B,).
            caption: word ids int64 (B, L), padded with zeros; zeros alone mean unconditional.

        Returns:
            The predicted velocity, noise minus latent, (B, 4, 16, 16).
        """
        tokens = hidden_states.flatten(2).transpose(1, 2)  # (B, N, 4)
        velocity = self.token_velocity(tokens, self.positions, timestep, caption)
        return velocity.transpose(1, 2).reshape(hidden_states.shape)

    def token_velocity(
        self, tokens: Tensor, positions: Tensor, timestep: Tensor, caption: Tensor
    ) -> Tensor:
        """Predict the velocity of some or all places of the latents.

        Args:
            tokens: noisy latents at those places, float (B, N, 4).
            positions: where they are, rows of `self.positions`, float (B or 1, N, C).
            timestep: as in `forward`, (B,).
            caption: as in `forward`, int64 (B, L).

        Returns:
            The predicted velocity at those places, (B, N, 4).
        """
        x = self.latent_embed(tokens) + positions  # (B, N, C)
        time = self.time_embed(timestep)  # (B, C)
        modulation = self.modulation(F.silu(time)).view(-1, 6, self.config.width)  # (B, 6, C)
        words = self.caption_norm(self.word_embed(caption) + self.word_positions)  # (B, L, C)
        # The first place is always seen: attention to nothing would be no number.
        visible = F.pad(caption[:, 1:] != PADDING, (1, 0), value=True)[:, None, None, :]
        for block in self.blocks:
            x = block(x, modulation, words, visible)
        shift, scale = (time.unsqueeze(1) + self.final_table).unbind(1)  # (B, C) twice
        return self.final_proj(modulate(self.final_norm(x), shift, scale))  # (B, N, 4)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.word_embed.weight, std=1.0)
        nn.init.normal_(self.word_positions, std=1.0)
        nn.init.normal_(self.time_embed.fc1.weight, std=0.02)
        nn.init.normal_(self.time_embed.fc2.weight, std=0.02)
        # Every block starts as the identity, the output as zero.
        nn.init.zeros_(self.modulation.weight)
        for block in self.blocks:
            nn.init.zeros_(block.cross_attn.proj.weight)
        nn.init.zeros_(self.final_proj.weight)
