"""Writing that is never seen half-done and replaces only what is ours, and reading in bounds."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from calicache.graph_passes.common.disk.replacing import put, scratch_folder, settle
from calicache.graph_passes.common.errors import CalicacheError, FileError, reason_of


@dataclass(frozen=True, slots=True)
class Target:
    """What is written, and what it may take the place of.

    Attributes:
        words: what it is, such as `a plan`.
        error: what is raised where it may not, or cannot.
        foreign: says what is at a path that is not of this kind; None where it is.
    """

    words: str
    error: type[CalicacheError]
    foreign: Callable[[Path], str | None]

    def check(self, path: Path) -> None:
        """Refuse a path where something else is.

        Raises:
            CalicacheError: of the kind `error`.
        """
        got = self.foreign(path) if os.path.lexists(path) else None
        if got is not None:
            raise self.error(
                str(path),
                expected=f"nothing, or {self.words}: nothing else is replaced",
                got=got,
                fix="Choose another path, or delete what is there yourself.",
            )


def _no_file(path: Path) -> str | None:
    return None if path.is_file() else "something that is no file"


PLAIN_FILE = Target("a file", FileError, _no_file)


def foreign_folder(path: Path, own: Callable[[Path], set[str]]) -> str | None:
    """What is in the place of a folder of ours; None where it is one, or empty.

    Args:
        path: of what is there.
        own: names of the files that belong to such a folder.

    Returns:
        A folder with a file that is not ours is not ours: replacing it would delete the file.
    """
    if not path.is_dir():
        return "a file" if path.is_file() else "something that is no folder"
    names = {entry.name for entry in path.iterdir()}
    others = sorted(names - own(path)) if names else []
    return f"a folder with {others[0]}" if others else None


@contextmanager
def atomic_path(path: Path, target: Target = PLAIN_FILE) -> Iterator[Path]:
    """Give a temporary file or folder name; on success it takes the place of `path`.

    The caller makes a file or a folder under the name given. On an error nothing of `path`
    changes and the temporary is removed; a kill at any moment leaves the old or the new one,
    see `standing`. What killed saves of the same path left is removed.

    Args:
        path: where it is to be.
        target: what it is; something of the same kind is replaced.

    Raises:
        CalicacheError: of the target's kind: something else is there, or it cannot be written.
    """
    path = Path(os.path.abspath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target.check(path)
        settle(path)
        with scratch_folder(path) as scratch:
            yield scratch / path.name
            target.check(path)
            put(scratch / path.name, path)
    except (OSError, SafetensorError) as error:
        raise target.error(
            str(path),
            expected=f"a place where {target.words} can be written",
            got=reason_of(error),
            fix="Make room, or choose another path; what was there before is unchanged.",
        ) from error


def check_regular(path: Path) -> int:
    """The size of a file that can be read to its end, in bytes.

    Raises:
        OSError: there is none, or it is a folder, a pipe or a device.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"{path.name} is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path.name} is no regular file")
    return status.st_size


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file.

    Args:
        path: of the file.
        limit: bytes that it may have.

    Raises:
        OSError: there is none, it is no regular file, or larger.
    """
    size = check_regular(path)
    if size > limit:
        raise OSError(f"{path.name} has {size} bytes, more than the {limit} of any such file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(f"{path.name} has more than {limit} bytes")
    return content
