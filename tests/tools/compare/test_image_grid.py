"""The grid as it was drawn: cells, differences, and what is refused before anything is run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.comparisons import draw
from torch import Tensor

from calicache.graph_passes.common.errors import CompareError, LibraryError
from calicache.tools.compare.pictures import (
    NoPictures,
    PictureKind,
    Pictures,
    check_grid,
    save_grid,
)

MARGIN, GAP = 96, 4


def images(full: Tensor, cached: Tensor) -> Pictures:
    return Pictures(PictureKind.IMAGES, full, cached)


def cell(path: Path, row: int, column: int, side: int) -> np.ndarray:
    """Pixels (side, side, 3) of one cell."""
    sheet = np.asarray(Image.open(path))
    top, left = row * (side + GAP), MARGIN + column * (side + GAP)
    return sheet[top : top + side, left : left + side]


def test_cells_are_the_images(tmp_path: Path) -> None:
    full = draw(1, 2, 3, 100, 100).clamp(-1, 1)
    cached = (full + 0.01).clamp(-1, 1)
    path = tmp_path / "a grid.png"
    grid = save_grid(images(full, cached), path)
    assert (grid.path, grid.columns) == (path, 2)
    for row, shown in enumerate((full, cached)):
        for column in range(2):
            expected = ((shown[column] + 1) / 2 * 255).round().byte().permute(1, 2, 0).numpy()
            assert (cell(path, row, column, 100) == expected).all()


def test_difference_is_enlarged_as_far_as_it_fits(tmp_path: Path) -> None:
    full = torch.zeros(1, 1, 96, 96)
    cached = full.clone()
    cached[0, 0, 7, 5] = -0.03  # 0.015 of the way from black to white, and 50 times that is 0.75
    grid = save_grid(images(full, cached), tmp_path / "g.png")
    assert grid.factor == 50
    shown = cell(tmp_path / "g.png", 2, 0, 96)
    assert (shown[7, 5] == round(0.75 * 255)).all()
    assert shown.sum() == 3 * round(0.75 * 255)


@pytest.mark.parametrize(("off", "factor"), [(2.0, 1), (1.0, 2), (0.019, 100), (0.0, 50000)])
def test_factor_is_one_two_or_five(off: float, factor: int, tmp_path: Path) -> None:
    full = torch.full((1, 1, 16, 16), -1.0)
    assert save_grid(images(full, full + off), tmp_path / "g.png").factor == factor


def test_small_images_are_enlarged_by_whole_pixels(tmp_path: Path) -> None:
    full = draw(1, 1, 1, 28, 28).clamp(-1, 1)
    save_grid(images(full, full), tmp_path / "g.png")
    shown = cell(tmp_path / "g.png", 0, 0, 112)
    expected = ((full[0, 0] + 1) / 2 * 255).round().byte().numpy().repeat(4, 0).repeat(4, 1)
    assert (shown == expected[..., None]).all()


def test_at_most_eight_samples_are_shown(tmp_path: Path) -> None:
    full = torch.zeros(11, 1, 96, 96)
    assert save_grid(images(full, full), tmp_path / "g.png").columns == 8
    width, height = Image.open(tmp_path / "g.png").size
    assert (width, height) == (MARGIN + 8 * (96 + GAP), 3 * (96 + GAP) - GAP)


def test_every_row_has_its_name_at_the_left(tmp_path: Path) -> None:
    full = torch.zeros(1, 1, 96, 96)
    save_grid(images(full, full), tmp_path / "g.png")
    sheet = np.asarray(Image.open(tmp_path / "g.png").convert("L"))
    for row in range(3):
        margin = sheet[row * 100 : row * 100 + 96, : MARGIN - GAP]
        assert margin.min() < 100
        assert (margin[:, -GAP:] == 255).all()  # it fits


def test_same_pictures_give_the_same_file(tmp_path: Path) -> None:
    full, cached = draw(1, 2, 1, 28, 28).clamp(-1, 1), draw(2, 2, 1, 28, 28).clamp(-1, 1)
    for name in ("a.png", "b.png"):
        save_grid(images(full, cached), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def refusal(path: Path, kind: PictureKind | NoPictures, channels: int = 1) -> str:
    with pytest.raises(CompareError) as refused:
        check_grid(path, kind, channels)
    return str(refused.value)


def test_latents_cannot_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "g.png"
    assert refusal(path, PictureKind.LATENTS, 4) == (
        f"compare: grid {path}: expected images: results of 1 or 3 channels, or a decoder that "
        "makes some, got latents of 4 channels, and there is no decoder. Pass --decoder "
        "FILE.py:FUNCTION, or leave the grid out."
    )
    reason = "results of the shape (2, 5, 8) are no (B, C, H, W), and there is no decoder"
    assert f"got {reason}. Pass --decoder" in refusal(path, NoPictures(reason))
    assert not path.exists()


def test_other_names_and_places_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "g.jpg", tmp_path / "not there" / "g.png"):
        assert refusal(path, PictureKind.IMAGES) == (
            f"compare: grid {path}: expected the name of a PNG file in a folder that is there, got "
            f"{str(path)!r}. Choose a name such as compare.png."
        )
    (tmp_path / "folder.png").mkdir()
    assert "got a folder. Choose" in refusal(tmp_path / "folder.png", PictureKind.DECODED)


def test_missing_library_is_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("PIL", *(name for name in sys.modules if name.startswith("PIL."))):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LibraryError, match=r"pillow: .* pip install 'calicache\[report\]'"):
        check_grid(tmp_path / "g.png", PictureKind.IMAGES, 1)
