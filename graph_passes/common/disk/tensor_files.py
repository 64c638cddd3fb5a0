"""safetensors files with a document of ours in their head, which has a digest of every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from calicache.graph_passes.common.disk.documents import DAMAGES, DocumentKind
from calicache.graph_passes.common.disk.files import check_regular
from calicache.graph_passes.common.disk.hashing import digest

OWNER, _CONTENT = "calicache", "content"


class WithDigests(Protocol):
    """A value whose document stands beside tensors."""

    @property
    def tensors(self) -> Mapping[str, str]:
        """Digests of all tensors, by name."""


Value = TypeVar("Value", bound=WithDigests)


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Digest of every tensor by name."""
    return {name: digest(value) for name, value in tensors.items()}


def write_tensors(
    kind: DocumentKind[Value], value: Value, tensors: Mapping[str, Tensor], file: Path
) -> None:
    """Write tensors and the document of a value that holds their digests."""
    metadata = {OWNER: kind.name, _CONTENT: kind.dumps(value)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)


def owner_of(file: Path) -> str | None:
    """Name of the kind that a safetensors file is marked with; None where it has none of ours.

    Raises:
        OSError, SafetensorError: it is no such file.
    """
    check_regular(file)
    with safe_open(file, framework="pt") as opened:
        return (opened.metadata() or {}).get(OWNER)


def read_tensors(kind: DocumentKind[Value], file: Path) -> tuple[Value, dict[str, Tensor]]:
    """What `write_tensors` wrote.

    Raises:
        CalicacheError: of the kind's error: the file is missing, damaged, or something else.
    """
    try:
        check_regular(file)
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get(OWNER) != kind.name:
                raise ValueError(f"not marked as a {kind.name}")
            value = kind.loads(metadata.get(_CONTENT, ""))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        _check(tensors, value.tensors)
    except DAMAGES as error:
        raise kind.refused(file, error) from error
    return value, tensors


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, str]) -> None:
    odd = sorted(set(tensors) ^ set(expected))
    if odd:
        raise ValueError(f"other tensors than it was saved with: {odd[0]}")
    for name, value in tensors.items():
        if digest(value) != expected[name]:
            raise ValueError(f"{name} is not what it was saved with: its SHA-256 is another")
