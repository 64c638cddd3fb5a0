"""The weights of an artifact: one file for all its models, written once and from where they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

SMALL = 256  # bytes; tensors up to this size stay in the models, where shapes are read off them
PAGE, LINE = 4096, 64  # bytes; where large tensors can be mapped, and where small ones start


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file of tensors that is still to be written.

    Attributes:
        places: offset in bytes of every tensor by name, in the order of the file.
        tensors: by name.
        size: of the file, in bytes.
        sha256: of its content.
    """

    places: Mapping[str, int]
    tensors: Mapping[str, ir.TensorProtocol]
    size: int
    sha256: str

    def write(self, path: Path) -> None:
        """Write the file, one tensor at a time."""
        with path.open("wb") as file:
            for part in _parts(self.places, self.tensors):
                file.write(part)

    def external(self, name: str, file: Path) -> ir.ExternalTensor:
        """A tensor as a place in the file."""
        tensor = self.tensors[name]
        return ir.ExternalTensor(
            file.name,
            self.places[name],
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=file.parent,
        )


def plan_weight_file(models: Iterable[ir.Model]) -> WeightFile:
    """The file for the initializers of some models; those of one name are one tensor."""
    tensors = {
        name: value.const_value
        for model in models
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes > SMALL
    }
    ordered = sorted(tensors, key=lambda name: (tensors[name].nbytes, fingerprint(tensors[name])))
    places: dict[str, int] = {}
    end = 0
    for name in ordered:
        start = PAGE if tensors[name].nbytes >= PAGE else LINE
        places[name] = -(-end // start) * start
        end = places[name] + tensors[name].nbytes
    digest = hashlib.sha256()
    for part in _parts(places, tensors):
        digest.update(part)
    return WeightFile(places, tensors, end, digest.hexdigest())


def place_outside(models: Iterable[ir.Model], file: WeightFile, path: Path) -> None:
    """Let the models' initializers point into the file, in place."""
    for model in models:
        for name, value in model.graph.initializers.items():
            if name in file.places:
                value.const_value = file.external(name, path)


def fingerprint(tensor: ir.TensorProtocol) -> bytes:
    """Digest of dtype, shape and some thousand numbers; equal tensors have equal ones."""
    values = _flat(tensor)
    stride = max(1, len(values) // 1024)
    digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape};".encode())
    digest.update(np.ascontiguousarray(values[:1024]).data)
    digest.update(np.ascontiguousarray(values[::stride]).data)
    return digest.digest()


def same_content(one: ir.TensorProtocol, two: ir.TensorProtocol) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    same_form = one.dtype == two.dtype and one.shape == two.shape
    return same_form and np.array_equal(_flat(one), _flat(two))


def _flat(tensor: ir.TensorProtocol) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a tensor as they lie in a file; a view where the tensor is in memory so."""
    values = np.ascontiguousarray(tensor.numpy()).reshape(-1)
    return values.view(np.uint8)


def _parts(
    places: Mapping[str, int], tensors: Mapping[str, ir.TensorProtocol]
) -> Iterator[memoryview | bytes]:
    """What stands in the file, piece by piece."""
    end = 0
    for name, place in places.items():
        yield bytes(place - end)
        yield _flat(tensors[name]).data
        end = place + tensors[name].nbytes
