"""Where an ONNX file is damaged: the parser says only that it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.descriptor import (  # type: ignore[import-untyped]  # comes with onnx
    Descriptor,
    FieldDescriptor,
)

# Wire types of protobuf's encoding, https://protobuf.dev/programming-guides/encoding.
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT = 10


def where_damaged(path: Path) -> str:
    """The first field that cannot be read, and its place in the file; empty where all can be."""
    data = memoryview(path.read_bytes())
    try:
        _walk(data, 0, len(data), onnx.ModelProto.DESCRIPTOR, "")
    except _DamageError as damage:
        at = f"{damage.field or 'the start'}, byte {damage.place} of {len(data)}"
        return f"{at}: {damage.reason}"
    return ""


@dataclass
class _DamageError(Exception):
    field: str
    place: int
    reason: str


def _walk(data: memoryview, place: int, end: int, message: Descriptor, owner: str) -> None:
    """Read every field from `place` to `end`, and every message inside."""
    seen: dict[int, int] = {}
    while place < end:
        start = place
        tag, place = _varint(data, place, end, owner)
        number, wire = tag >> 3, tag & 7
        field = message.fields_by_number.get(number)
        name = _path(owner, field, number, seen)
        if wire == _VARINT:
            _, place = _varint(data, place, end, name)
            continue
        if wire == _LENGTH:
            length, place = _varint(data, place, end, name)
        elif wire in _FIXED:
            length = _FIXED[wire]
        else:
            raise _DamageError(name, start, f"there is no wire type {wire}")
        if place + length > end:
            raise _DamageError(name, start, f"it says {length} bytes, {end - place} are there")
        if wire == _LENGTH and field is not None and field.message_type is not None:
            _walk(data, place, place + length, field.message_type, name)
        place += length


def _varint(data: memoryview, place: int, end: int, field: str) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and the place after it."""
    value = 0
    for count in range(_LONGEST_VARINT):
        if place + count >= end:
            raise _DamageError(field, place, "it ends inside a number")
        byte = data[place + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, place + count + 1
    raise _DamageError(field, place, f"a number of more than {_LONGEST_VARINT} bytes")


def _path(owner: str, field: FieldDescriptor | None, number: int, seen: dict[int, int]) -> str:
    """`graph.node[3]`: the field below its owner, and which of several it is."""
    name = field.name if field is not None else f"unknown field {number}"
    if field is not None and field.is_repeated:
        name = f"{name}[{seen.setdefault(number, 0)}]"
        seen[number] += 1
    return f"{owner}.{name}" if owner else name
