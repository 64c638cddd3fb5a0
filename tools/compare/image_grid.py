"""Full and cached results side by side as one PNG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calicache.graph_passes.common.errors import CompareError
from calicache.tools.compare.image_measures import NoPictures, PictureKind, Pictures
from calicache.tools.terminal.options import import_library

MOST_COLUMNS = 8
_MARGIN, _GAP, _SMALLEST = 96, 4, 96  # pixels: of the row names, between cells, of a cell's side
_LETTER_HEIGHT, _PAPER = 12, 255
_FACTORS = tuple(m * 10**d for d in range(5) for m in (1, 2, 5))


@dataclass(frozen=True, slots=True)
class ImageGrid:
    """What a grid shows: rows full, cached and difference, a column a sample.

    Attributes:
        path: of the PNG.
        columns: samples shown, from the first.
        factor: that absolute differences are multiplied with.
    """

    path: Path
    columns: int
    factor: int


def check_grid(path: Path, kind: PictureKind | NoPictures, channels: int) -> None:
    """Refuse a grid that could not be drawn or written, before anything is run.

    Args:
        path: of the PNG.
        kind: what the results are, or why they are no pictures.
        channels: of the results.

    Raises:
        CompareError: no images, no PNG, or nowhere to put it.
        LibraryError: pillow is missing.
    """
    if isinstance(kind, NoPictures) or kind is PictureKind.LATENTS:
        latents = f"latents of {channels} channels, and there is no decoder"
        raise CompareError(
            f"grid {path}",
            expected="images: results of 1 or 3 channels, or a decoder that makes some",
            got=kind.reason if isinstance(kind, NoPictures) else latents,
            fix="Pass --decoder FILE.py:FUNCTION, or leave the grid out.",
        )
    if path.suffix.lower() != ".png" or path.is_dir() or not path.absolute().parent.is_dir():
        raise CompareError(
            f"grid {path}",
            expected="the name of a PNG file in a folder that is there",
            got="a folder" if path.is_dir() else repr(str(path)),
            fix="Choose a name such as compare.png.",
        )
    _pillow("Image")


def save_grid(pictures: Pictures, path: Path) -> ImageGrid:
    """Draw the grid: at most 8 samples, row names at the left.

    Differences are shown on black, multiplied by the largest of 1, 2, 5, 10, ... 50000 under
    which none goes beyond white.

    Args:
        pictures: images, not latents.
        path: of the PNG; an existing one is replaced.

    Raises:
        CalicacheError: as `check_grid`.
    """
    check_grid(path, pictures.kind, pictures.full.shape[1])
    image, draw = _pillow("Image"), _pillow("ImageDraw")
    full, cached = (value[:MOST_COLUMNS] for value in (pictures.full, pictures.cached))
    difference = (cached - full).abs() / 2  # of the way from black to white
    largest = float(difference.max())
    factor = max((f for f in _FACTORS if f * largest <= 1.0), default=1)
    rows = {
        "full": (full + 1) / 2,
        "cached": (cached + 1) / 2,
        f"difference\nx {factor}": difference * factor,
    }
    zoom = max(1, -(-_SMALLEST // min(full.shape[2:])))  # whole pixels: small pictures stay sharp
    height, width = (side * zoom + _GAP for side in full.shape[2:])
    size = _MARGIN + len(full) * width, len(rows) * height - _GAP
    sheet = image.new("RGB", size, (_PAPER,) * 3)
    pen = draw.Draw(sheet)
    for place, (name, row) in enumerate(rows.items()):
        pen.multiline_text((_GAP, place * height + _LETTER_HEIGHT), name, fill=(0, 0, 0))
        for column, cell in enumerate(row):
            sheet.paste(
                image.fromarray(_pixels(cell, zoom)), (_MARGIN + column * width, place * height)
            )
    sheet.save(path, format="PNG")
    return ImageGrid(path, len(full), factor)


def _pixels(cell: Tensor, zoom: int) -> np.ndarray[Any, Any]:
    values = (cell.clamp(0, 1) * 255).round().to(torch.uint8)
    values = values.expand(3, -1, -1).permute(1, 2, 0)
    return values.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy()


def _pillow(module: str) -> Any:
    return import_library(f"PIL.{module}", "pillow", "draws the image grid")
