"""How alike two sets of pictures are: PSNR and SSIM of results, decoded where they can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from calicache.graph_passes.common.errors import CompareError, reason_of
from calicache.tools.terminal.options import import_library

IMAGE_CHANNELS = (1, 3)
IMAGE_RANGE = (-1.0, 1.0)
_WINDOW = 11  # of SSIM, in pixels

Decoder = Callable[[Tensor], Tensor]


class PictureKind(StrEnum):
    """What is compared.

    IMAGES are results of 1 or 3 channels, taken as they are; DECODED is what a decoder made of
    results; LATENTS are results of other channels, each channel in a range of its own.
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


def picture_kind(shape: Sequence[int], decoder: Decoder | None) -> PictureKind | NoPictures:
    """What results of a shape are compared as, or why they cannot be.

    Args:
        shape: (B, ...) of the results.
        decoder: makes images of them; None for none.
    """
    if decoder is not None:
        return PictureKind.DECODED
    if len(shape) != 4:
        form = f"results of the shape {tuple(shape)} are no (B, C, H, W)"
        return NoPictures(f"{form}, and there is no decoder")
    return PictureKind.IMAGES if shape[1] in IMAGE_CHANNELS else PictureKind.LATENTS


def make_pictures(full: Tensor, cached: Tensor, decoder: Decoder | None) -> Pictures | NoPictures:
    """The results as pictures, or why there are none.

    Args:
        full: results of the full runs (N, ...).
        cached: of the cached runs, alike.
        decoder: latents (N, ...) to images (N, C, H, W) in -1 .. 1, C being 1 or 3.

    Raises:
        CompareError: the decoder fails or returns something else.
    """
    kind = picture_kind(full.shape, decoder)
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
