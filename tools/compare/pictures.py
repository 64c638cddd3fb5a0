"""Results as pictures: PSNR and SSIM of full and cached ones, and a grid of both as one PNG."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calicache.graph_passes.common.errors import CompareError, reason_of
from calicache.tools.terminal.options import import_library

IMAGE_CHANNELS = (1, 3)
IMAGE_RANGE = (-1.0, 1.0)
_NEAR, _MOST_BEYOND = 1.25, 0.05  # samplers that do not clamp leave images a little beyond -1 .. 1
_WINDOW = 11  # of SSIM, in pixels
MOST_COLUMNS = 8
_MARGIN, _GAP, _SMALLEST = 96, 4, 96  # pixels: of the row names, between cells, of a cell's side
_LETTER_HEIGHT, _PAPER = 12, 255
_FACTORS = tuple(m * 10**d for d in range(5) for m in (1, 2, 5))

Decoder = Callable[[Tensor], Tensor]


class PictureKind(StrEnum):
    """What is compared.

    IMAGES are results of 1 or 3 channels in -1 .. 1, taken as they are; DECODED is what a decoder
    made of results; LATENTS are all other results, each channel in a range of its own.
    """

    IMAGES = "images"
    DECODED = "decoded images"
    LATENTS = "latents"


@dataclass(frozen=True, slots=True)
class NoPictures:
    """Why results cannot be compared as pictures."""

    reason: str


@dataclass(frozen=True, slots=True)
class Pictures:
    """Results of the full and of the cached runs as (N, C, H, W), float32.

    Attributes:
        kind: what they are.
        full, cached: images in -1 .. 1, values beyond that clamped; latents as they are.
    """

    kind: PictureKind
    full: Tensor = field(repr=False, compare=False)
    cached: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class ImageMeasures:
    """PSNR and SSIM over the samples.

    Attributes:
        kind: what was compared.
        data_range: from the least to the greatest value that is possible.
        scale: what the values were measured in, in words.
        psnr_mean, psnr_worst: in dB; infinite where there is no difference.
        ssim_mean, ssim_worst: 1 where there is no difference; None for pictures with a side
            below 11 pixels, which its window does not fit into.
    """

    kind: PictureKind
    data_range: float
    scale: str
    psnr_mean: float
    psnr_worst: float
    ssim_mean: float | None
    ssim_worst: float | None


def picture_kind(results: Tensor, decoder: Decoder | None) -> PictureKind | NoPictures:
    """What results are compared as, or why they cannot be.

    Args:
        results: (B, ...) of a full run.
        decoder: makes images of them; None for none.
    """
    if decoder is not None:
        return PictureKind.DECODED
    if results.ndim != 4:
        form = f"results of the shape {tuple(results.shape)} are no (B, C, H, W)"
        return NoPictures(f"{form}, and there is no decoder")
    beyond = float((results.abs() > _NEAR).float().mean())
    images = results.shape[1] in IMAGE_CHANNELS and beyond < _MOST_BEYOND
    return PictureKind.IMAGES if images else PictureKind.LATENTS


def make_pictures(full: Tensor, cached: Tensor, decoder: Decoder | None) -> Pictures | NoPictures:
    """The results as pictures, or why there are none.

    Args:
        full: results of the full runs (N, ...).
        cached: of the cached runs, alike.
        decoder: latents (N, ...) to images (N, C, H, W) in -1 .. 1, C being 1 or 3.

    Raises:
        CompareError: the decoder fails or returns something else.
    """
    kind = picture_kind(full, decoder)
    if isinstance(kind, NoPictures):
        return kind
    if not bool(torch.isfinite(cached).all()):
        return NoPictures("the cached run diverged: its result is not finite")
    if kind is PictureKind.LATENTS:
        return Pictures(kind, full, cached)
    if decoder is not None:
        full, cached = (_decode(decoder, latents) for latents in (full, cached))
    return Pictures(kind, full.clamp(*IMAGE_RANGE), cached.clamp(*IMAGE_RANGE))


def measure_pictures(pictures: Pictures) -> ImageMeasures:
    """PSNR and SSIM of every sample, with torchmetrics.

    Images have the data range 2, from -1 to 1. Of latents every channel is first scaled to
    0 .. 1 by the range that it has in the full results.

    Raises:
        LibraryError: torchmetrics is missing.
    """
    psnr, ssim = measure_functions()
    full, cached = pictures.full, pictures.cached
    data_range, scale = 2.0, "-1 .. 1"
    if pictures.kind is PictureKind.LATENTS:
        full, cached = _scaled(full, cached)
        data_range, scale = 1.0, "each channel by its range in the full results"
    decibels = psnr(cached, full, data_range=data_range, reduction="none", dim=(1, 2, 3)).tolist()
    alike: list[float] | None = None
    if min(full.shape[2:]) >= _WINDOW:
        windows = ssim(cached, full, data_range=data_range, reduction="none", kernel_size=_WINDOW)
        alike = windows.reshape(-1).tolist()
    return ImageMeasures(
        kind=pictures.kind,
        data_range=data_range,
        scale=scale,
        psnr_mean=math.fsum(decibels) / len(decibels),
        psnr_worst=min(decibels),
        ssim_mean=None if alike is None else math.fsum(alike) / len(alike),
        ssim_worst=None if alike is None else min(alike),
    )


def measure_functions() -> tuple[Any, Any]:
    """PSNR and SSIM.

    Raises:
        LibraryError: torchmetrics is missing.
    """
    name = "torchmetrics.functional.image"
    functions = import_library(name, "torchmetrics", "measures PSNR and SSIM")
    return functions.peak_signal_noise_ratio, functions.structural_similarity_index_measure


def _decode(decoder: Decoder, latents: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            images = decoder(latents)
    except Exception as error:  # the user's code may raise anything
        raise _bad_decoder(latents, reason_of(error)) from error
    if not isinstance(images, Tensor):
        raise _bad_decoder(latents, type(images).__name__)
    shape = tuple(images.shape)
    wrong = len(shape) != 4 or shape[0] != len(latents) or shape[1] not in IMAGE_CHANNELS
    if wrong or not images.is_floating_point():
        raise _bad_decoder(latents, f"{images.dtype} {shape}")
    return images.detach().float().cpu()


def _bad_decoder(latents: Tensor, got: str) -> CompareError:
    return CompareError(
        "decoder",
        expected=f"a function from latents {tuple(latents.shape)} to images "
        f"({len(latents)}, 1 or 3, H, W) in -1 .. 1",
        got=got,
        fix="Let it return such a tensor.",
    )


def _scaled(full: Tensor, cached: Tensor) -> tuple[Tensor, Tensor]:
    least, most = (full.amin((0, 2, 3), True), full.amax((0, 2, 3), True))
    width = torch.where(most > least, most - least, torch.ones_like(most))
    return (full - least) / width, (cached - least) / width


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
    grey_or_colour = kind is PictureKind.DECODED or channels in IMAGE_CHANNELS
    if isinstance(kind, NoPictures) or not grey_or_colour:
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
        pictures: of 1 or 3 channels; what is beyond -1 .. 1 is clamped.
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
