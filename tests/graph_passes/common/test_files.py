"""Atomic writing: all of the new content or all of the old, and nothing left beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calicache.graph_passes.common.files import atomic_path
from calicache.graph_passes.common.hashing import sha256_of


def make_folder(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "inner").write_text(text)


def write_half(target: Path, write: Callable[[Path, str], object]) -> None:
    with atomic_path(target) as temporary:
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
        write_half(target, Path.write_text)
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
    with pytest.raises(FileNotFoundError), atomic_path(target):
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
    with atomic_path(target) as temporary:
        make_folder(temporary, "new")
    assert names(target) == ["inner"]
    assert ((target / "inner").read_text(), names(tmp_path)) == ("new", [name])


def test_folder_is_replaced_by_a_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    make_folder(target, "old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert (target.read_text(), names(tmp_path)) == ("new", ["a"])


def test_file_is_replaced_by_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    with atomic_path(target) as temporary:
        make_folder(temporary, "new")
    assert ((target / "inner").read_text(), names(tmp_path)) == ("new", ["a"])


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
