"""How something new takes the place of something old so that one of them is always there."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SUFFIX = ".calicache"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP)
_TRIES = 100


def standing(path: Path) -> Path:
    """Where the newest whole one of `path` lies: there, or where a killed save put it aside."""
    if os.path.lexists(path):
        return path
    aside = _aside(path)
    return aside if os.path.isdir(aside) else path  # is_dir raises where a name is too long


def settle(path: Path) -> None:
    """Finish what killed saves of `path` began, and remove what they left."""
    aside = _aside(path)
    if os.path.lexists(aside):
        if os.path.lexists(path):
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, path)
    for left in path.parent.iterdir():
        if left.name.startswith(f".{path.name}.") and left.name.endswith(_SUFFIX):
            _remove_unheld(left)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` for what is to take its place, held until the block ends."""
    folder, held = _held_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


def put(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`, whatever is there; both are on the disk afterwards.

    A kill at any moment leaves the old or the new one where `standing` finds it.
    """
    _sync(new)
    if not new.is_dir() or not os.path.lexists(path):
        os.replace(new, path)
    elif not _exchange(new, path):
        _swap_by_steps(new, path)
    _sync_one(path.parent)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.aside")


def _swap_by_steps(new: Path, path: Path) -> None:
    """Where a file system cannot exchange two folders, the old one is put where it is found."""
    aside = _aside(path)
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _held_folder(path: Path) -> tuple[Path, int | None]:
    """A new folder that no other process takes for a leftover; unheld where nothing can hold."""
    for _ in range(_TRIES):
        folder = tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent)
        held = hold(Path(folder))
        if held is None:
            return Path(folder), None
        if os.path.exists(folder):  # else another save took it for a leftover just before
            return Path(folder), held
        os.close(held)
    raise OSError(errno.EBUSY, "other saves are in the way", str(path))


def hold(folder: Path) -> int | None:
    """Hold a folder until its descriptor is closed, or the process dies; None where held."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return descriptor
    return None


def _remove_unheld(folder: Path) -> None:
    held = hold(folder)
    if held is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _sync(path: Path) -> None:
    """Put a file, or a folder with all that is in it, on the disk."""
    for folder, _, files in os.walk(path):
        for name in files:
            _sync_one(Path(folder) / name)
        _sync_one(Path(folder))
    if not path.is_dir():
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems sync no folders
            raise
    finally:
        os.close(descriptor)
