"""Writing that is never seen half-done, and digests of what was written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Give a temporary file or folder name beside `target`; rename it there on success.

    The caller makes a file or a folder under the name given. On an error nothing of
    `target` changes and the temporary is removed. An existing target is replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    temporary = scratch / target.name
    old = scratch / f"{target.name}.old"
    try:
        yield temporary
        # A folder can be renamed neither over a folder nor over a file.
        if target.is_dir() or (target.exists() and temporary.is_dir()):
            os.replace(target, old)
        try:
            os.replace(temporary, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
