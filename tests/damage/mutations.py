"""What may happen to files: bytes that change, and JSON that somebody else wrote.

A mutation is a function of a number: the same number does the same.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from calicache.graph_passes.common.disk.documents import sum_of

Json = Any

# In the place of any value: of other types, out of range, without end, nested, empty.
VALUES: tuple[Json, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2,
    10**9,
    2**62,
    10**400,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../etc/passwd",
    "/dev/zero",
    "0" * 64,
    "a" * 10**6,
    [],
    {},
    [[]],
    [0] * 10**5,
    {"kind": "calicache plan"},
)


def files_of(path: Path) -> list[Path]:
    """All files of a file or a folder."""
    return [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())


def flip(path: Path, draw: Random) -> None:
    """Change some bits of a file."""
    file = draw.choice(files_of(path))
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut(path: Path, draw: Random) -> None:
    """Cut a file short, anywhere."""
    file = draw.choice(files_of(path))
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content))])


def extend(path: Path, draw: Random) -> None:
    """Write something behind the end of a file."""
    with draw.choice(files_of(path)).open("ab") as file:
        file.write(draw.randbytes(draw.choice((1, 8, 5000))))


def swap(path: Path, draw: Random) -> None:
    """Exchange two regions of a file."""
    file = draw.choice(files_of(path))
    content = bytearray(file.read_bytes())
    length = draw.randrange(1, max(2, min(len(content) // 2, 200)))
    one, other = (draw.randrange(len(content) - length + 1) for _ in range(2))
    content[one : one + length], content[other : other + length] = (
        content[other : other + length],
        content[one : one + length],
    )
    file.write_bytes(content)


def blank(path: Path, draw: Random) -> None:
    """Fill a region of a file with one byte."""
    file = draw.choice(files_of(path))
    content = bytearray(file.read_bytes())
    begin = draw.randrange(len(content))
    end = min(len(content), begin + draw.choice((1, 16, 512, 4096)))
    content[begin:end] = draw.choice((b"\0", b" ", b"9", b"\xff")) * (end - begin)
    file.write_bytes(content)


def replace(path: Path, draw: Random) -> None:
    """Another content: nothing, noise, or that of another file of the folder."""
    files = files_of(path)
    file = draw.choice(files)
    others = (b"", draw.randbytes(1000), draw.choice(files).read_bytes())
    file.write_bytes(draw.choice(others))


def drop(path: Path, draw: Random) -> None:
    """Delete a file."""
    draw.choice(files_of(path)).unlink()


def edit(path: Path, draw: Random) -> None:
    """Change a value of the JSON of a file, and make the sum right again."""
    kinds = (".json", ".safetensors", "")
    file = draw.choice([one for one in files_of(path) if one.suffix in kinds])
    content = file.read_bytes()
    if content.startswith(b"{"):
        file.write_text(_signed(_edited(json.loads(content), draw)))
        return
    (length,) = struct.unpack("<Q", content[:8])
    head, tensors = json.loads(content[8 : 8 + length]), content[8 + length :]
    document = head.get("__metadata__", {}).get("content")
    if document and draw.random() < 0.7:
        head["__metadata__"]["content"] = _signed(_edited(json.loads(document), draw))
    else:
        head = _edited(head, draw)
    written = json.dumps(head).encode()
    file.write_bytes(struct.pack("<Q", len(written)) + written + tensors)


def _signed(document: Json) -> str:
    if isinstance(document, dict):
        document = {**document, "sha256": sum_of(document)}
    return json.dumps(document)


def _edited(document: Json, draw: Random) -> Json:
    """A document with one value changed, left out, doubled, or exchanged with another one's."""
    document = json.loads(json.dumps(document))
    places = list(_places(document))
    if not places:
        return draw.choice(VALUES)
    holder, key = draw.choice(places)
    match draw.randrange(4):
        case 0:
            holder[key] = draw.choice(VALUES)
        case 1:
            del holder[key]
        case 2:
            other, other_key = draw.choice(places)
            holder[key] = json.loads(json.dumps(other[other_key]))
        case _ if isinstance(holder, list):
            holder.append(holder[key])
        case _ if isinstance(holder[key], int | float):
            holder[key] = -holder[key] + draw.choice((-1, 0, 1, 7))
        case _:
            holder[f"{key}x"] = holder[key]
    return document


def _places(value: Json) -> Any:
    """Every place of a document: what holds it, and its key or index there."""
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


Mutation = Callable[[Path, Random], None]
DAMAGES: tuple[Mutation, ...] = (flip, cut, extend, swap, blank, replace, drop)
