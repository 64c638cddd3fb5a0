"""Images in npz files, in the layout of the ADM evaluator: `arr_0`, uint8 (N, H, W, C).

They are written and read piece by piece: 50,000 large images do not fit in memory.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from calicache.graph_passes.common.disk.files import Target, atomic_path
from calicache.graph_passes.common.errors import EvaluateError, reason_of

_ENTRY = "arr_0.npy"
_FEWEST = 2  # images that have a covariance
_DAMAGES = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def write_npz(path: Path, shape: tuple[int, ...], parts: Iterable[Tensor]) -> None:
    """Write images; the same ones give the same bytes.

    Args:
        path: of the file.
        shape: (N, H, W, C) of all images together.
        parts: of them in their order, uint8 (n, H, W, C).

    Raises:
        EvaluateError: something else is there, or it cannot be written.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        atomic_path(path, _TARGET) as place,
        zipfile.ZipFile(place, "w") as archive,
        # ZipInfo: without the time of day.
        archive.open(zipfile.ZipInfo(_ENTRY), "w", force_zip64=True) as file,
    ):
        npy.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part.contiguous().numpy().data)


@dataclass(frozen=True, slots=True)
class NpzImages:
    """The images of an npz file.

    Attributes:
        path: of the file.
        shape: (M, H, W, C).
    """

    path: Path
    shape: tuple[int, ...]

    @staticmethod
    def open(path: Path) -> NpzImages:
        """The images of a file, whose head is read.

        Raises:
            EvaluateError: it is no such file.
        """
        try:
            with zipfile.ZipFile(path) as archive, archive.open(_ENTRY) as file:
                shape = _shape(file)
                size = archive.getinfo(_ENTRY).file_size - file.tell()
            if size != math.prod(shape):
                raise ValueError(f"{size} bytes for images {shape}")
        except _DAMAGES as error:
            raise _refused(path, error) from error
        return NpzImages(path, shape)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Images uint8 (n, H, W, C) in their order, n being the size but in the last batch.

        Raises:
            EvaluateError: the file is damaged.
        """
        count, *one = self.shape
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(_ENTRY) as file:
                _shape(file)
                for start in range(0, count, size):
                    shape = (min(size, count - start), *one)
                    content = bytearray(file.read(math.prod(shape)))
                    yield torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape))
        except _DAMAGES as error:
            raise _refused(self.path, error) from error


def _shape(file: IO[bytes]) -> tuple[int, ...]:
    """The shape that the head of an array says, which has to be one of images."""
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype != np.uint8 or fortran or len(shape) != 4 or min(shape) < 1 or shape[0] < _FEWEST:
        raise ValueError(f"{dtype} {shape}{' in the order of Fortran' if fortran else ''}")
    return tuple(shape)


def _refused(path: Path, error: BaseException) -> EvaluateError:
    return EvaluateError(
        str(path),
        expected=f"an npz file with {_FEWEST} images or more: arr_0, uint8 (M, H, W, C)",
        got=reason_of(error),
        fix="Write it with numpy.savez(path, images).",
    )


def _foreign(path: Path) -> str | None:
    try:
        NpzImages.open(path)
    except EvaluateError as error:
        return error.got
    return None


_TARGET = Target("images in an npz file", EvaluateError, _foreign)
