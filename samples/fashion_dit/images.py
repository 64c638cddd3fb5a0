"""Grids of sample images as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

SCALE = 4
GAP = 2


def save_grid(rows: Sequence[Tensor], path: Path) -> None:
    """Write rows of images, each (B, 1, H, W) in -1 .. 1, enlarged four times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = [((row.clamp(-1, 1) + 1) * 127.5).round().byte().squeeze(1) for row in rows]
    padded = [torch.nn.functional.pad(row, (GAP, GAP, GAP, GAP), value=255) for row in pixels]
    lines = [torch.cat(list(row), dim=1) for row in padded]  # (H, B * W)
    grid = Image.fromarray(torch.cat(lines, dim=0).numpy())
    grid.resize((grid.width * SCALE, grid.height * SCALE), Image.Resampling.NEAREST).save(path)
