"""The sample DiT for `calicache bench --model samples/fashion_dit/bench_model.py:fashion_dit`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from model import FashionDiT
from weights import DIT_WEIGHTS, load_weights

from calicache.tools.bench.models import BenchModel

IMAGES = 16


def fashion_dit() -> BenchModel:
    """16 images, guidance batched: 32 samples of 49 tokens a call."""
    labels = torch.arange(IMAGES) % 10
    both = torch.cat([labels, torch.full_like(labels, FashionDiT().null_class)])
    return BenchModel(
        "sample DiT",
        FashionDiT().config.width,
        lambda: load_weights(FashionDiT(), DIT_WEIGHTS),
        (IMAGES, 1, 28, 28),
        {"class_labels": both},
        guidance=1.5,
    )
