"""Saves that are killed: at any moment, and at every one of their system calls.

python -m damage.kills        # 200 moments of every save, and every system call of one
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random

import torch

from damage.formats import SAVES
from damage.trial import read_apart

_FORK = get_context("fork")


@dataclass(frozen=True, slots=True)
class Versions:
    """What two saves of one format write.

    Attributes:
        format: its name.
        old, new: hashes of all that is read back.
    """

    format: str
    old: str
    new: str

    def state(self, path: Path) -> str:
        """Which of both is at a path: old, new, or what is wrong."""
        reading = read_apart(self.format, path)
        return {self.old: "old", self.new: "new"}.get(reading.content, reading.words or "neither")


def versions_of(name: str, folder: Path) -> Versions:
    """Save both, each for itself, and read them."""
    contents = []
    for number, save in enumerate(SAVES[name]):
        save(folder / f"{name} {number}")
        contents.append(read_apart(name, folder / f"{name} {number}").content)
    assert all(contents)
    assert contents[0] != contents[1]
    return Versions(name, *contents)


def kill_at_moments(name: str, folder: Path, kills: int) -> Counter[str]:
    """Kill processes that save both versions in turn; returns what was there afterwards."""
    versions, states, chance = versions_of(name, folder), Counter[str](), Random(0)
    target = folder / f"{name} target"
    SAVES[name][0](target)
    start = time.perf_counter()
    SAVES[name][1](target)
    longest = 2 * (time.perf_counter() - start)
    for _ in range(kills):
        with _waiting(lambda: _save_for_ever(name, target)) as (process, go):
            go()
            time.sleep(chance.uniform(0, longest))
            process.kill()
        states[versions.state(target)] += 1
    _check_left(name, target)
    return states


def kill_at_calls(name: str, folder: Path, calls: str = "all") -> Counter[str]:
    """Kill a save of the new version over the old one at its first, second, ... system call.

    Args:
        name: of the format.
        folder: for it.
        calls: which are counted, as strace names sets of them.
    """
    versions, states = versions_of(name, folder), Counter[str]()
    target, old = folder / f"{name} target", folder / f"{name} 0"
    for number in count(1):
        _copy(old, target)
        rule = f"inject={calls}:signal=KILL:when={number}"
        with _waiting(lambda: SAVES[name][1](target)) as (process, go):
            command = ["strace", "-qq", "-f", "-e", rule, "-o", os.devnull, "-p", str(process.pid)]
            with subprocess.Popen(command, stderr=subprocess.DEVNULL) as tracer:
                _await_tracer(process)
                go()
                process.join()
                tracer.wait()
        state = versions.state(target)
        if process.exitcode == 0:  # it ended before that call
            assert state == "new"
            _check_left(name, target)
            return states
        states[state] += 1
    raise AssertionError("it never ends")


def _save_for_ever(name: str, target: Path) -> None:
    while True:
        for save in SAVES[name]:
            save(target)


@contextmanager
def _waiting(act: Callable[[], object]) -> Iterator[tuple[BaseProcess, Callable[[], None]]]:
    """A process that waits, and a function that lets it act."""
    word, child = _FORK.Pipe()
    process = _FORK.Process(target=_act, args=(act, child))
    process.start()
    child.close()
    assert word.recv() == "ready"
    try:
        yield process, lambda: word.send("go")
    finally:
        process.kill()
        process.join()
        word.close()


def _act(act: Callable[[], object], word: Connection) -> None:
    word.send("ready")
    word.recv()
    act()
    os._exit(0)


def _await_tracer(process: BaseProcess) -> None:
    status = Path(f"/proc/{process.pid}/status")
    while "TracerPid:\t0\n" in status.read_text():
        time.sleep(0.001)


def _copy(old: Path, target: Path) -> None:
    """The old version, and nothing beside it that a killed save left."""
    for left in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(left)
    if target.is_dir():
        shutil.rmtree(target)
    if old.is_dir():
        shutil.copytree(old, target)
    else:
        shutil.copy(old, target)


def _check_left(name: str, target: Path) -> None:
    """A last save leaves nothing beside it of those that were killed."""
    SAVES[name][1](target)
    left = [path.name for path in target.parent.iterdir() if path.name.startswith(".")]
    assert not left, left


def main() -> None:
    """All of it once."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in SAVES:
            path = Path(folder) / "moments" / name
            path.mkdir(parents=True)
            print(f"{name}: at moments: {dict(kill_at_moments(name, path, 200))}", flush=True)
        for name in sys.argv[1:] or SAVES:
            path = Path(folder) / "calls" / name
            path.mkdir(parents=True)
            print(f"{name}: at calls: {dict(kill_at_calls(name, path))}", flush=True)


if __name__ == "__main__":
    main()
