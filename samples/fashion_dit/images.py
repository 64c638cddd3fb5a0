"""Grids of sample images as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SCALE = 4
GAP = 2
LABEL_WIDTH, LABEL_SIZE = 230, 20  # pixels


def save_grid(rows: Sequence[Tensor], path: Path, labels: Sequence[str] = ()) -> None:
    """Write rows of images, each (B, 1, H, W) in -1 .. 1, enlarged four times.

    Args:
        rows: of the grid.
        path: of the PNG file.
        labels: a text for every row, at its left; none without.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = [((row.clamp(-1, 1) + 1) * 127.5).round().byte().squeeze(1) for row in rows]
    padded = [torch.nn.functional.pad(row, (GAP, GAP, GAP, GAP), value=255) for row in pixels]
    lines = [torch.cat(list(row), dim=1) for row in padded]  # (H, B * W)
    grid = Image.fromarray(torch.cat(lines, dim=0).numpy())
    grid = grid.resize((grid.width * SCALE, grid.height * SCALE), Image.Resampling.NEAREST)
    (_labelled(grid, labels) if labels else grid).save(path)


def _labelled(grid: Image.Image, labels: Sequence[str]) -> Image.Image:
    """The grid with a column of texts at its left."""
    page = Image.new("L", (LABEL_WIDTH + grid.width, grid.height), 255)
    page.paste(grid, (LABEL_WIDTH, 0))
    font, height = ImageFont.load_default(LABEL_SIZE), grid.height // len(labels)
    draw = ImageDraw.Draw(page)
    for row, label in enumerate(labels):
        place = (LABEL_WIDTH - 2 * GAP * SCALE, round((row + 0.5) * height))
        draw.multiline_text(place, label, fill=0, font=font, anchor="rm", align="right")
    return page
