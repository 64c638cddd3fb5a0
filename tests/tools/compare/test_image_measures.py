"""PSNR and SSIM against their formulas, what counts as an image, decoders that do not fit."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from support.comparisons import draw
from torch import Tensor

from calicache.graph_passes.common.errors import CompareError, LibraryError
from calicache.tools.compare.pictures import (
    Decoder,
    ImageMeasures,
    NoPictures,
    PictureKind,
    Pictures,
    make_pictures,
    measure_functions,
    measure_pictures,
    picture_kind,
)

# torchmetrics computes in float32, the formulas here in float64.
RTOL = 1e-4


def measured(full: Tensor, cached: Tensor, decoder: Decoder | None = None) -> ImageMeasures:
    pictures = make_pictures(full, cached, decoder)
    assert isinstance(pictures, Pictures)
    return measure_pictures(pictures)


@pytest.mark.parametrize(
    ("channels", "kind"),
    [
        (1, PictureKind.IMAGES),
        (3, PictureKind.IMAGES),
        (2, PictureKind.LATENTS),
        (4, PictureKind.LATENTS),
        (16, PictureKind.LATENTS),
    ],
)
def test_one_or_three_channels_are_images(channels: int, kind: PictureKind) -> None:
    assert picture_kind(torch.zeros(2, channels, 8, 8), None) is kind
    assert (
        picture_kind(torch.zeros(2, channels, 8, 8), lambda latents: latents) is PictureKind.DECODED
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_values_far_beyond_images_are_latents(channels: int) -> None:
    images = draw(1, 2, channels, 16, 16).clamp(-1.2, 1.2)  # of a sampler that does not clamp
    assert picture_kind(images, None) is PictureKind.IMAGES
    assert picture_kind(draw(1, 2, channels, 16, 16), None) is PictureKind.LATENTS


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 3, 4, 8, 8)])
def test_other_dimensions_are_none_without_a_decoder(shape: tuple[int, ...]) -> None:
    assert picture_kind(torch.zeros(shape), None) == NoPictures(
        f"results of the shape {shape} are no (B, C, H, W), and there is no decoder"
    )
    assert isinstance(make_pictures(torch.zeros(shape), torch.zeros(shape), None), NoPictures)
    assert picture_kind(torch.zeros(shape), lambda latents: latents) is PictureKind.DECODED


def test_psnr_of_images_is_that_of_the_formula() -> None:
    full = draw(1, 3, 3, 16, 16).clamp(-1, 1)
    cached = (full + 0.1 * draw(2, 3, 3, 16, 16)).clamp(-1, 1)
    squared = (full - cached).double().square().mean((1, 2, 3))
    expected = (10 * (2.0**2 / squared).log10()).tolist()
    measures = measured(full, cached)
    assert measures.psnr_mean == pytest.approx(sum(expected) / 3, rel=RTOL)
    assert measures.psnr_worst == pytest.approx(min(expected), rel=RTOL)
    assert measures.kind is PictureKind.IMAGES
    assert (measures.data_range, measures.scale) == (2.0, "-1 .. 1")


def test_values_beyond_white_do_not_count() -> None:
    full = torch.ones(1, 1, 16, 16)
    assert measured(full, 5 * full).psnr_mean == math.inf


def test_ssim_of_flat_images_is_that_of_the_formula() -> None:
    # Without variance only the means and the constant (0.01 * 2)^2 are left.
    a, b, constant = 0.5, 0.25, 0.02**2
    expected = (2 * a * b + constant) / (a * a + b * b + constant)
    measures = measured(torch.full((1, 3, 16, 16), a), torch.full((1, 3, 16, 16), b))
    assert measures.ssim_mean == pytest.approx(expected, rel=RTOL)


def test_ssim_of_contrast_is_that_of_the_formula() -> None:
    # A chessboard of 0.5 +- 0.1 against one of half the contrast, the constant being (0.03 * 2)^2.
    board = torch.ones(32, 32)
    board[::2, ::2] = board[1::2, 1::2] = -1
    variance, constant = 0.1**2, 0.06**2
    expected = (2 * variance / 2 + constant) / (variance + variance / 4 + constant)
    full, cached = (0.5 + contrast * board[None, None] for contrast in (0.1, 0.05))
    # Seen through a window the means are not quite equal.
    assert measured(full, cached).ssim_mean == pytest.approx(expected, abs=1e-3)


def test_equal_images_have_no_difference() -> None:
    full = draw(1, 2, 1, 16, 16).clamp(-1, 1)
    measures = measured(full, full)
    assert (measures.psnr_mean, measures.psnr_worst) == (math.inf, math.inf)
    assert measures.ssim_worst == pytest.approx(1.0, abs=1e-6)


def test_worst_sample_is_the_one_with_most_noise() -> None:
    full = draw(1, 2, 1, 16, 16).clamp(-1, 1)
    noise = draw(2, 2, 1, 16, 16) * torch.tensor([0.01, 0.2]).view(2, 1, 1, 1)
    measures, alone = measured(full, full + noise), measured(full[1:], (full + noise)[1:])
    assert measures.psnr_worst == pytest.approx(alone.psnr_mean, rel=RTOL)
    assert measures.ssim_worst == pytest.approx(alone.ssim_mean, rel=RTOL)
    assert measures.psnr_mean > measures.psnr_worst
    assert measures.ssim_mean is not None
    assert measures.ssim_worst is not None
    assert measures.ssim_mean > measures.ssim_worst


def test_latents_are_measured_channel_by_channel() -> None:
    scales = torch.tensor([1.0, 10.0, 0.1, 3.0]).view(1, 4, 1, 1)
    full, noise = draw(1, 2, 4, 16, 16), 0.05 * draw(2, 2, 4, 16, 16)
    measures = measured(full, full + noise)
    scaled = measured(scales * full, scales * (full + noise))
    assert measures.kind is PictureKind.LATENTS
    assert measures.data_range == 1.0
    assert measures.scale == "each channel by its range in the full results"
    # The range of a channel is its unit.
    assert scaled.psnr_mean == pytest.approx(measures.psnr_mean, rel=RTOL)
    width = full.amax((0, 2, 3), True) - full.amin((0, 2, 3), True)
    squared = (noise / width).double().square().mean((1, 2, 3))
    expected = (10 * (1 / squared).log10()).mean()
    assert measures.psnr_mean == pytest.approx(float(expected), rel=RTOL)


def test_channel_without_a_range_is_taken_as_it_is() -> None:
    full = torch.zeros(1, 4, 16, 16)
    assert measured(full, full + 0.1).psnr_mean == pytest.approx(20.0, rel=RTOL)


@pytest.mark.parametrize(("side", "has_ssim"), [(10, False), (11, True)])
def test_ssim_needs_eleven_pixels(side: int, has_ssim: bool) -> None:
    full = draw(1, 1, 1, side, 20).clamp(-1, 1)
    measures = measured(full, 0.9 * full)
    assert (measures.ssim_mean is not None) == has_ssim
    assert (measures.ssim_worst is not None) == has_ssim
    assert measures.psnr_mean > 0


def test_diverged_run_has_no_pictures() -> None:
    full = torch.zeros(1, 1, 16, 16)
    assert make_pictures(full, full / 0, None) == NoPictures(
        "the cached run diverged: its result is not finite"
    )


@pytest.mark.parametrize(
    ("decoder", "got"),
    [
        (lambda z: z, r"got torch.float32 \(2, 5, 8\)"),
        (lambda _: torch.zeros(1, 3, 8, 8), r"got torch.float32 \(1, 3, 8, 8\)"),
        (lambda _: torch.zeros(2, 4, 8, 8), r"got torch.float32 \(2, 4, 8, 8\)"),
        (lambda _: torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"got torch.uint8 \(2, 3, 8, 8\)"),
        (lambda z: [z], "got list"),
        (lambda z: z.no_such_method(), "got AttributeError: 'Tensor' object has no attribute"),
    ],
)
def test_decoder_that_makes_no_images_is_refused(decoder: Decoder, got: str) -> None:
    latents = torch.zeros(2, 5, 8)
    expected = r"compare: decoder: expected a function from latents \(2, 5, 8\) to images "
    with pytest.raises(CompareError, match=rf"{expected}\(2, 1 or 3, H, W\) in -1 .. 1, {got}"):
        make_pictures(latents, latents, decoder)


def test_missing_library_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(LibraryError, match=r"torchmetrics: .* pip install 'calicache\[report\]'"):
        measure_functions()
