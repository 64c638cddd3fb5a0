"""The file of a recording: what its head holds, and which files may be replaced by one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter
from safetensors import SafetensorError

from calicache.graph_passes.common.disk.bounds import Digest
from calicache.graph_passes.common.disk.documents import DocumentKind
from calicache.graph_passes.common.disk.files import Target
from calicache.graph_passes.common.disk.tensor_files import owner_of
from calicache.graph_passes.common.errors import RecordError
from calicache.graph_passes.recording.signature import CallSignature


@dataclass(frozen=True, slots=True)
class RecordingJson:
    """What the head of a recording's file holds.

    Attributes:
        signature: the form that all calls share.
        calls: name of the tensor of every argument, call by call.
        results: see `Recording`.
        tensors: digests of all tensors.
        outputs: places of the calls whose output is known.
    """

    signature: CallSignature
    calls: Annotated[tuple[dict[str, str], ...], Field(min_length=1)]
    results: tuple[Annotated[int, Field(ge=1)], ...]
    tensors: dict[str, Digest]
    outputs: tuple[Annotated[int, Field(ge=0)], ...] = ()


RECORDING = DocumentKind(
    "recording",
    2,
    TypeAdapter(RecordingJson),
    RecordError,
    "a recording written by Recording.save",
    "Record again.",
)


def _foreign(path: Path) -> str | None:
    try:
        owner = owner_of(path)
    except (OSError, SafetensorError):
        return "something else"
    return None if owner == RECORDING.name else "a file of something else"


TARGET = Target("a recording", RecordError, _foreign)
