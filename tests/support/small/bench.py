"""A DiT small enough to be benchmarked in a test; processes of the bench read it from this file."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from calicache.tools.bench.models import BenchModel

BLOCKS = 2


def build(head_width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=head_width,
        in_channels=4,
        out_channels=8,
        num_layers=BLOCKS,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return model.eval()


def tiny() -> BenchModel:
    return BenchModel("tiny", 32, build, (1, 4, 8, 8), {"class_labels": torch.tensor([1, 10])})


def heavy() -> BenchModel:
    """Few layers, whose weights of some 150 MB outweigh what libraries take."""
    return replace(tiny(), name="heavy", width=1024, build=partial(build, 512))


def no_model() -> int:
    return 3
