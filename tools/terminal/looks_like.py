"""What a file or folder looks like that is none of the things calicache reads."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

SAFETENSORS = ".safetensors"
_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_STARTS = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF document",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF model",
    b"\x7fELF": "a program",
    b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "a zip archive, as torch.save writes it",
    b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    _GIT_LFS: "a Git LFS pointer: `git lfs pull` fetches the file it stands for",
}
_CONTROL = frozenset(range(32)) - frozenset(b"\t\n\r\f\x1b")
_FOLDERS = {
    "model_index.json": "a pipeline that diffusers' save_pretrained wrote",
    "config.json": "a model that save_pretrained wrote",
    "search.json": "what an unfinished plan search has kept",
}
_MOST_NAMES = 3
_MOST_HEADER = 100_000_000  # bytes, as safetensors itself allows


def is_safetensors(head: bytes) -> bool:
    """Whether a file starts like safetensors: eight bytes of length, then JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MOST_HEADER


def file_looks_like(head: bytes) -> str | None:
    """What the first bytes of a file say it is; None where they say nothing."""
    if not head:
        return "an empty file"
    for start, what in _STARTS.items():
        if head.startswith(start):
            return what
    if _CONTROL.intersection(head):
        return None
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # it may end inside a letter
    except UnicodeDecodeError:
        return None
    return "a JSON file" if text.lstrip()[:1] in ("{", "[") else "a text file"


def folder_looks_like(names: Sequence[str]) -> str:
    """What a folder says it is by the names in it, sorted."""
    if not names:
        return "an empty folder"
    for name, what in _FOLDERS.items():
        if name in names:
            return f"{what} (there is {name})"
    shown = ", ".join(names[:_MOST_NAMES])
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"a folder with {shown}{more}"
