"""Kills and leftovers: the old or the new one is always there, and nothing stays beside it."""

from __future__ import annotations

import os
import random
import time
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from calicache.graph_passes.common.disk import replacing
from calicache.graph_passes.common.disk.files import Target, atomic_path, foreign_folder
from calicache.graph_passes.common.disk.replacing import put, scratch_folder, settle, standing
from calicache.graph_passes.common.errors import PlanError

NAMES = {"one", "two"}
FOLDER = Target("a folder of tests", PlanError, lambda at: foreign_folder(at, lambda _: NAMES))


def make(folder: Path, text: str) -> None:
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_text(text)


def read(path: Path) -> str:
    """What both files of a folder hold."""
    (text,) = {(standing(path) / name).read_text() for name in NAMES}
    return text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save_for_ever(target: Path, first: int, ready: Connection) -> None:
    ready.send_bytes(b"ready")
    for number in count(first):
        with atomic_path(target, FOLDER) as folder:
            make(folder, f"{number};" * 5000)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["exchange", "steps"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "steps":
        monkeypatch.setattr(replacing, "_exchange", lambda *_: False)
    target, chance = tmp_path / "a", random.Random(0)
    make(target, "first")
    fork, saves = get_context("fork"), set[str]()
    for turn in range(60):
        ready, child = fork.Pipe(duplex=False)
        process = fork.Process(target=save_for_ever, args=(target, 100 * turn, child))
        process.start()
        assert ready.recv_bytes() == b"ready"
        time.sleep(chance.uniform(0, 0.1))  # in which some saves are done
        process.kill()
        process.join()
        text = read(target)
        assert text == "first" or text == f"{text.partition(';')[0]};" * 5000
        saves.add(text)
    assert len(saves) > 20  # the kills came at different moments
    with atomic_path(target, FOLDER) as folder:
        make(folder, "last")
    assert (read(target), names(tmp_path)) == ("last", ["a"])


def test_two_folders_are_exchanged_in_one_step(tmp_path: Path) -> None:
    make(tmp_path / "new", "new")
    make(tmp_path / "a", "old")
    if not replacing._exchange(tmp_path / "new", tmp_path / "a"):
        pytest.skip("this file system exchanges no folders")
    assert (read(tmp_path / "a"), read(tmp_path / "new")) == ("new", "old")


def test_without_an_exchange_the_old_one_is_found_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, seen = tmp_path / "a", list[str]()
    make(target, "old")
    make(tmp_path / "new", "new")
    rename = os.rename

    def watched(one: Path, other: Path) -> None:
        seen.append(read(target))
        rename(one, other)
        seen.append(read(target))

    monkeypatch.setattr(replacing, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", watched)
    put(tmp_path / "new", target)
    assert seen == ["old", "old", "old", "new"]
    assert names(tmp_path) == ["a"]


def test_a_rename_that_fails_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a"
    make(target, "old")
    make(tmp_path / "new", "new")
    rename = os.rename

    def failing(one: Path, other: Path) -> None:
        if one.name == "new":
            raise OSError("no")
        rename(one, other)

    monkeypatch.setattr(replacing, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"):
        put(tmp_path / "new", target)
    assert (read(target), names(tmp_path)) == ("old", ["a", "new"])


def test_what_a_kill_between_two_renames_put_aside_is_found_and_settled(tmp_path: Path) -> None:
    target = tmp_path / "a"
    make(tmp_path / ".a.aside", "old")
    assert read(target) == "old"
    assert standing(Path(".")) == Path(".")
    settle(target)
    assert (read(target), names(tmp_path)) == ("old", ["a"])
    make(tmp_path / ".a.aside", "older")  # killed while it was removed
    assert read(target) == "old"
    settle(target)
    assert (read(target), names(tmp_path)) == ("old", ["a"])


def test_leftovers_of_killed_saves_are_removed_and_running_ones_left(tmp_path: Path) -> None:
    target = tmp_path / "a"
    left = tmp_path / ".a.abcd1234.calicache"
    make(left, "half")
    for other in (".a.notes", ".b.abcd1234.calicache"):
        (tmp_path / other).mkdir()
    with scratch_folder(target) as running:
        settle(target)
        assert running.is_dir()
        assert not left.exists()
    assert names(tmp_path) == [".a.notes", ".b.abcd1234.calicache"]


def test_an_old_file_is_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "new").write_text("new")
    put(tmp_path / "new", tmp_path / "a")
    assert ((tmp_path / "a").read_text(), names(tmp_path)) == ("new", ["a"])
