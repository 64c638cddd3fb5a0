"""Fashion-MNIST (MIT licence) from Debian's `dataset-fashion-mnist` package or a folder."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASS_NAMES = (
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_IDX_UINT8 = 0x08


@dataclass(frozen=True, slots=True)
class Split:
    """Images uint8 (M, 28, 28) and labels int64 (M,)."""

    images: Tensor
    labels: Tensor

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images float32 (B, 1, 28, 28) in -1 .. 1 and labels (B,) at the given places."""
        images = self.images[index].float().div(127.5).sub(1.0).unsqueeze(1)
        return images, self.labels[index]


def load_split(folder: Path | None = None, *, train: bool) -> Split:
    """Read one split of the four IDX files.

    Args:
        folder: where the files are; Debian's place when None.
        train: the 60,000 training images, else the 10,000 test images.

    Raises:
        FileNotFoundError: the files are not there.
        ValueError: a file is not in IDX format, or images and labels do not match.
    """
    folder = folder or DEBIAN_FOLDER
    prefix = "train" if train else "t10k"
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte")
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte")
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(f"{folder}: images {images.shape} and labels {labels.shape} do not match")
    return Split(torch.from_numpy(images), torch.from_numpy(labels).long())


def _read_idx(path: Path) -> np.ndarray:
    packed = path.with_name(path.name + ".gz")
    if packed.exists():
        raw = gzip.decompress(packed.read_bytes())
    elif path.exists():
        raw = path.read_bytes()
    else:
        raise FileNotFoundError(
            f"{path}[.gz] is missing; install Debian's dataset-fashion-mnist or pass --data FOLDER"
        )
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != _IDX_UINT8:
        raise ValueError(f"{path}: not an IDX file of bytes")
    dims = raw[3]
    shape = np.frombuffer(raw, ">u4", count=dims, offset=4).astype(int)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy()
