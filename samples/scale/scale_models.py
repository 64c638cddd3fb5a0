"""FLUX.1-dev and Wan 2.1 14B by their published configs, and small versions that fit here.

`calicache cost samples/scale/scale_models.py:flux --dtype bfloat16` says what all of it takes.
A short version has the true widths, one block of each kind and few tokens; a narrow one has more
blocks at a sixth or a tenth of the width. Their weights are random.
"""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from torch import nn

from calicache.tools.bench.models import BenchModel

HEAD = 128  # channels of a head, in both


def flux() -> BenchModel:
    """FLUX.1-dev: 1024 x 1024 pixels, 4,096 tokens beside 512 of text."""
    return _flux("FLUX.1-dev", (19, 38), 24, 64, 512)


def short_flux() -> BenchModel:
    """One block of each kind, 64 tokens beside 16 of text."""
    return _flux("FLUX, 1 + 1 blocks", (1, 1), 24, 8, 16)


def narrow_flux() -> BenchModel:
    """512 channels, 64 tokens beside 16 of text."""
    return _flux("FLUX, 512 wide, 2 + 2 blocks", (2, 2), 4, 8, 16)


def wan() -> BenchModel:
    """Wan 2.1 14B: 81 frames of 480 x 832 pixels, 32,760 tokens; one of two guidance calls."""
    return _wan("Wan 2.1 14B", 40, 40, (21, 60, 104), 512)


def short_wan() -> BenchModel:
    """One block, 80 tokens."""
    return _wan("Wan, 1 block", 1, 40, (5, 8, 8), 16)


def narrow_wan() -> BenchModel:
    """512 channels, 108 tokens."""
    return _wan("Wan, 512 wide, 4 blocks", 4, 4, (3, 12, 12), 16)


def _flux(name: str, blocks: tuple[int, int], heads: int, side: int, text: int) -> BenchModel:
    def build() -> nn.Module:
        torch.manual_seed(0)
        double, single = blocks
        model = FluxTransformer2DModel(
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=heads,
            guidance_embeds=True,
        )
        return model.eval()

    places = torch.zeros(side * side, 3)
    places[:, 1] = torch.arange(side).repeat_interleave(side)
    places[:, 2] = torch.arange(side).repeat(side)
    inputs = {
        "encoder_hidden_states": torch.zeros(1, text, 4096),
        "pooled_projections": torch.zeros(1, 768),
        "img_ids": places,
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((1,), 3.5),
    }
    return BenchModel(name, heads * HEAD, build, (1, side * side, 64), inputs, guidance=None)


def _wan(name: str, blocks: int, heads: int, grid: tuple[int, int, int], text: int) -> BenchModel:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=HEAD,
            num_layers=blocks,
            ffn_dim=heads * HEAD * 27 // 10,  # 13,824 at 5,120
        )
        return model.eval()

    inputs = {"encoder_hidden_states": torch.zeros(1, text, 4096)}
    return BenchModel(name, heads * HEAD, build, (1, 16, *grid), inputs, guidance=None)
