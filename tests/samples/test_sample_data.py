"""Reading of Fashion-MNIST from a folder, and the classifier's features."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from classifier import load_classifier
from data import load_split


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 256
    write_idx(tmp_path / "t10k-images-idx3-ubyte", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.array([4, 0, 9]))
    return tmp_path


def test_a_folder_of_plain_files_is_read(folder: Path) -> None:
    split = load_split(folder, train=False)
    images, labels = split.batch(torch.tensor([2, 0]))
    assert labels.tolist() == [9, 4]
    assert images.shape == (2, 1, 28, 28)
    # 0 and 255 are the ends of the range; division by 127.5 is exact to float32 rounding.
    assert images[1, 0, 0, 0] == -1.0
    assert images[1].max() == pytest.approx(1.0, abs=1e-6)


def test_packed_files_are_read_too(folder: Path) -> None:
    plain = folder / "t10k-labels-idx1-ubyte"
    plain.with_name(plain.name + ".gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert load_split(folder, train=False).labels.tolist() == [4, 0, 9]


def test_missing_files_say_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        load_split(tmp_path, train=True)


def test_a_file_of_another_format_is_refused(folder: Path) -> None:
    (folder / "t10k-images-idx3-ubyte").write_bytes(b"PNG and so on")
    with pytest.raises(ValueError, match="not an IDX file"):
        load_split(folder, train=False)


def test_images_and_labels_must_match(folder: Path) -> None:
    write_idx(folder / "t10k-labels-idx1-ubyte", np.array([4, 0]))
    with pytest.raises(ValueError, match="do not match"):
        load_split(folder, train=False)


def test_classifier_scores_come_from_its_features() -> None:
    classifier = load_classifier()
    images = torch.rand(4, 1, 28, 28) * 2 - 1
    with torch.no_grad():
        features = classifier.features(images)
        logits = classifier(images)
    assert features.shape == (4, 128)
    assert logits.shape == (4, 10)
    head = [m for m in classifier.modules() if isinstance(m, torch.nn.Linear)][-1]
    # The same float32 product, computed twice.
    torch.testing.assert_close(head(features), logits, rtol=1e-5, atol=1e-5)
