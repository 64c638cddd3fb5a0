"""Atomic writing: all of the new content or all of the old, and nothing left beside it."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calicache.graph_passes.common.disk.files import (
    PLAIN_FILE,
    Target,
    atomic_path,
    check_regular,
    foreign_folder,
    read_bounded,
)
from calicache.graph_passes.common.disk.hashing import sha256_of
from calicache.graph_passes.common.errors import FileError, PlanError

# A folder with these files and no others is one of ours.
FOLDER = Target("a folder of tests", PlanError, lambda at: foreign_folder(at, lambda _: OWN))
OWN = {"inner", "stale"}


def make_folder(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "inner").write_text(text)


def write_half(target: Path, write: Callable[[Path, str], object], kind: Target = FOLDER) -> None:
    with atomic_path(target, kind) as temporary:
        write(temporary, "half")
        raise ZeroDivisionError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "model.bin"
    with atomic_path(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"


def test_no_temporary_is_left_after_success(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("write", [Path.write_text, make_folder])
def test_failed_write_of_something_new_leaves_nothing(
    tmp_path: Path, write: Callable[[Path, str], object]
) -> None:
    with pytest.raises(ZeroDivisionError):
        write_half(tmp_path / "a", write)
    assert names(tmp_path) == []


def test_failed_write_keeps_the_existing_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError):
        write_half(target, Path.write_text, PLAIN_FILE)
    assert (target.read_text(), names(tmp_path)) == ("old", ["a"])


def test_failed_write_keeps_the_existing_folder(tmp_path: Path) -> None:
    target = tmp_path / "a"
    make_folder(target, "old")
    with pytest.raises(ZeroDivisionError):
        write_half(target, make_folder)
    assert ((target / "inner").read_text(), names(tmp_path)) == ("old", ["a"])


def test_block_that_writes_nothing_keeps_the_existing_folder(tmp_path: Path) -> None:
    target = tmp_path / "a"
    make_folder(target, "old")
    with pytest.raises(PlanError, match=r"FileNotFoundError.*before is unchanged"):  # noqa: SIM117
        with atomic_path(target, FOLDER):
            pass
    assert ((target / "inner").read_text(), names(tmp_path)) == ("old", ["a"])


def test_existing_file_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert (target.read_text(), names(tmp_path)) == ("new", ["a"])


# "old" and "new" are what an implementation is likely to call its own temporaries.
@pytest.mark.parametrize("name", ["artifact.d", "old", "new"])
def test_existing_folder_is_replaced_as_a_whole(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    make_folder(target, "old")
    (target / "stale").write_text("only in the old one")
    with atomic_path(target, FOLDER) as temporary:
        make_folder(temporary, "new")
    assert names(target) == ["inner"]
    assert ((target / "inner").read_text(), names(tmp_path)) == ("new", [name])


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    make_folder(target, "old")
    with pytest.raises(FileError) as caught, atomic_path(target):
        raise AssertionError("refused before the work is done")
    assert str(caught.value) == (
        f"file: {target}: expected nothing, or a file: nothing else is replaced, got something "
        "that is no file. Choose another path, or delete what is there yourself."
    )
    assert ((target / "inner").read_text(), names(tmp_path)) == ("old", ["a"])


@pytest.mark.parametrize("there", ["a file", "a folder with photo.jpg", "a pipe", "a lost link"])
def test_a_folder_replaces_nothing_that_is_not_ours(tmp_path: Path, there: str) -> None:
    target = tmp_path / "a"
    if there == "a file":
        target.write_text("dear")
    elif there == "a pipe":
        os.mkfifo(target)
    elif there == "a lost link":
        target.symlink_to("nowhere")
    else:
        make_folder(target, "old")
        (target / "photo.jpg").write_text("...")
    got = there if there.startswith(("a file", "a folder")) else "something that is no folder"
    with pytest.raises(PlanError, match=f"nothing else is replaced, got {got}"):
        write_half(target, make_folder)
    assert names(tmp_path) == ["a"]
    assert os.path.lexists(target)


def test_what_comes_while_the_new_one_is_made_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a"

    def make_both(temporary: Path) -> None:
        make_folder(temporary, "new")
        target.write_text("dear")

    with pytest.raises(PlanError, match="got a file"):  # noqa: SIM117
        with atomic_path(target, FOLDER) as temporary:
            make_both(temporary)
    assert (target.read_text(), names(tmp_path)) == ("dear", ["a"])


@pytest.mark.parametrize("path", ["/", "../inner", "."])
def test_folders_around_are_not_replaced(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "letter").write_text("dear")
    monkeypatch.chdir(inner)
    with pytest.raises(PlanError, match="nothing else is replaced, got a folder with"):
        write_half(Path(path), make_folder)
    assert (inner / "letter").read_text() == "dear"


def test_a_link_to_a_folder_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    make_folder(tmp_path / "first", "old")
    (tmp_path / "newest").symlink_to("first")
    with atomic_path(tmp_path / "newest", FOLDER) as temporary:
        make_folder(temporary, "new")
    assert (tmp_path / "first" / "inner").read_text() == "old"
    assert (tmp_path / "newest" / "inner").read_text() == "new"
    assert names(tmp_path) == ["first", "newest"]


@pytest.mark.slow
def test_a_full_disk_is_told_with_the_path_and_what_is_left(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    code = f"""
import resource
from pathlib import Path
from calicache.graph_passes.common.errors import FileError
from calicache.graph_passes.common.disk.files import atomic_path
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as if the disk ended there
try:
    with atomic_path(Path({str(target)!r})) as temporary:
        temporary.write_bytes(bytes(2000))
except FileError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"file: {target}: expected a place where a file can be written, got OSError: "
        f"[Errno {errno.EFBIG}] File too large. Make room, or choose another path; what was there "
        "before is unchanged.\n"
    )
    assert (target.read_text(), names(tmp_path)) == ("old", ["a"])


def test_missing_parents_and_spaces_in_the_path(tmp_path: Path) -> None:
    target = tmp_path / "my plans" / "first try" / "the plan.json"
    with atomic_path(target) as temporary:
        temporary.write_text("x")
    assert target.read_text() == "x"
    assert names(target.parent) == ["the plan.json"]


def test_relative_path_lands_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic_path(Path("here")) as temporary:
        temporary.write_text("x")
    assert names(tmp_path) == ["here"]


@settings(max_examples=20, deadline=None)
@given(st.binary(max_size=200))
def test_sha256_is_that_of_the_bytes(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "raw"
    path.write_bytes(raw)
    assert sha256_of(path) == hashlib.sha256(raw).hexdigest()


# --- reading --------------------------------------------------------------------------------------


def test_reading_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(OSError, match="a has 5 bytes, more than the 4 of any such file"):
        read_bounded(path, 4)


def test_pipes_devices_and_folders_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match=f"{path.name} is no regular file"):
            read_bounded(path, 100)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_regular(tmp_path)
    (tmp_path / "link").symlink_to("whole")
    (tmp_path / "whole").write_text("x")
    assert check_regular(tmp_path / "link") == 1  # as the cache of huggingface_hub has them
