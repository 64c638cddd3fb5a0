"""One damaged or crafted copy, read by a process of its own: what became of it."""

from __future__ import annotations

import hashlib
import resource
import shutil
import time
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from calicache.graph_passes.common.errors import CalicacheError
from damage.formats import FORMATS
from damage.mutations import DAMAGES, edit

SECONDS, BYTES = 2.0, 200 * 2**20  # of processor time and memory that a reader may take
PATIENCE = 60.0  # wall seconds: a process that takes longer hangs


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a reader did.

    Attributes:
        words: equal, other, refused, or what was raised else.
        change: name of the mutation.
        seconds: of processor time.
        peak: bytes of memory above those at its start.
    """

    words: str
    change: str
    seconds: float = 0.0
    peak: int = 0

    @property
    def right(self) -> bool:
        """Refused in words or equal; JSON that is signed anew may be another valid one."""
        fine = {"equal", "refused"} | ({"other"} if self.change == edit.__name__ else set())
        return self.words in fine and self.peak <= BYTES


@dataclass(frozen=True, slots=True)
class Original:
    """A whole one of a format.

    Attributes:
        format: its name.
        path: where it lies; nobody changes it.
        content: hash of all that its reader makes of it.
    """

    format: str
    path: Path
    content: str


def make_original(name: str, folder: Path) -> Original:
    """Write one of a format into a folder of its own, and read it."""
    path = folder / name / "original"
    path.parent.mkdir(parents=True)
    FORMATS[name].make(path)
    reading = read_apart(name, path)
    assert reading.content, reading.words
    return Original(name, path, reading.content)


def outcome_of(original: Original, seed: int) -> Outcome:
    """Change a copy in the way of a seed, and read it: an odd one edits JSON, others bytes."""
    draw = Random(seed)
    mutation = edit if seed % 2 else draw.choice(DAMAGES)
    copy = original.path.with_name("copy")
    if original.path.is_dir():
        shutil.copytree(original.path, copy)
    else:
        shutil.copy(original.path, copy)
    try:
        mutation(copy, draw)
        reading = read_apart(original.format, copy)
    finally:
        shutil.rmtree(copy, ignore_errors=True)
        copy.unlink(missing_ok=True)
    words = reading.words
    if reading.content:
        words = "equal" if reading.content == original.content else "other"
    return Outcome(words, mutation.__name__, reading.seconds, reading.peak)


@dataclass(frozen=True, slots=True)
class _Reading:
    """What a reader did: a hash of all that it made, or words of what it raised."""

    content: str
    words: str
    seconds: float = 0.0
    peak: int = 0


def read_apart(name: str, path: Path) -> _Reading:
    """Read in a process of its own, which may die."""
    fork = get_context("fork")
    result, child = fork.Pipe(duplex=False)
    process = fork.Process(target=_read, args=(name, path, child))
    process.start()
    child.close()
    try:
        return result.recv() if result.poll(PATIENCE) else _Reading("", "it hangs", PATIENCE)
    except EOFError:
        process.join()
        return _Reading("", f"the process died: {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _read(name: str, path: Path, result: Connection) -> None:
    warnings.simplefilter("ignore")
    start, before = time.process_time(), _resident()
    content = words = ""
    try:
        content = hashlib.sha256(FORMATS[name].read(path).encode()).hexdigest()
    except CalicacheError:
        words = "refused"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__} in {place.filename}:{place.lineno}: {error}"[:1000]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    result.send(_Reading(content, words, time.process_time() - start, peak))


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
