"""The file of a recording: what its head holds, and which files may be replaced by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from torch import Tensor

from calicache.graph_passes.common.disk.bounds import Digest
from calicache.graph_passes.common.disk.documents import DocumentKind
from calicache.graph_passes.common.disk.files import Target
from calicache.graph_passes.common.disk.tensor_files import owner_of
from calicache.graph_passes.common.errors import RecordError
from calicache.graph_passes.recording.signature import CallSignature
from calicache.graph_passes.recording.timestep import Call


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


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with copies of those that are there twice, as in runs that were taken twice."""
    first = {id(value): name for name, value in reversed([*tensors.items()])}
    return {
        name: value if first[id(value)] == name else value.clone()
        for name, value in tensors.items()
    }


def check_loaded(call: Call, signature: CallSignature, path: Path | str) -> None:
    """Refuse a call that is not of the recording's form.

    Raises:
        RecordError: it is not.
    """
    odd = set(call) - {spec.name for spec in signature.tensors}
    if odd:
        raise RECORDING.refused(path, f"a call with another argument: {min(odd)}")
    for spec in signature.tensors:
        tensor = call.get(spec.name)
        if tensor is None or tuple(tensor.shape) != spec.shape or tensor.dtype != spec.torch_dtype:
            raise RecordError(
                f"{path}: {spec.name}",
                expected=str(spec),
                got="nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}",
                fix="The file is damaged; record again.",
            )
