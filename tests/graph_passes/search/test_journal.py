"""What an interrupted search has kept: read back as it was, and nothing else taken for it."""

from __future__ import annotations

import json
import math
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from pydantic_core import PydanticSerializationError
from safetensors.torch import load_file
from torch import Tensor

from calicache.graph_passes import StepMode
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.search.journal import KEY_FILE, EntryKind, Journal

FIT: EntryKind[Any] = EntryKind("fit", TypeAdapter(Any))
ERRORS = EntryKind("errors", TypeAdapter(dict[StepMode, tuple[float, ...]]))
FIX = "Name another folder, or delete this one."


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(act: Callable[[], object], path: Path) -> str:
    """What was said to be found at a path."""
    expected = "what an interrupted search of the same kind has kept"
    with pytest.raises(PlanError) as caught:
        act()
    message = str(caught.value)
    start = f"plan: {path}: expected {expected}, got "
    assert message.startswith(start)
    assert message.endswith(FIX)
    return message.removeprefix(start).removesuffix(FIX)


def no_work() -> Any:
    raise AssertionError("made again")


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """The same names, dtypes and bits; NaN equals NaN."""
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name]
        .contiguous()
        .view(-1)
        .view(torch.uint8)
        .equal(other[name].contiguous().view(-1).view(torch.uint8))
        for name in one
    )


# --- keeping and reading back -------------------------------------------------------------------

NUMBERS = {
    "number": 0.1 + 0.2,
    "smallest": 5e-324,
    "text": 'Größe \u2028 "x"',
    "list": [1, 2.5, None, True, [], {}],
    "nested": {"a.b": [[1.0, 2.0], [3.0]], "": {"x": -0.0}},
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_are_made_once_and_read_back(tmp_path: Path, case: str) -> None:
    value, calls = NUMBERS[case], list[int]()

    def make() -> Any:
        calls.append(1)
        return value

    first = Journal.open(tmp_path / "kept", "key")
    assert first.result(FIT, "", make) == value
    assert first.result(FIT, "", make) == value
    again = Journal.open(str(tmp_path / "kept"), "key").result(FIT, "", make)
    assert again == value
    assert repr(again) == repr(value)  # -0.0, True and 1.0 stay what they are
    assert calls == [1]


def test_results_are_read_back_as_what_they_were(tmp_path: Path) -> None:
    value = {StepMode.REUSE: (0.1, math.inf, -math.inf), StepMode.CALIBRATE: (5e-324,)}
    Journal.open(tmp_path, "key").result(ERRORS, "reuse", lambda: value)
    again = Journal.open(tmp_path, "key").result(ERRORS, "reuse", no_work)
    assert again == value
    assert all(isinstance(mode, StepMode) for mode in again)


@pytest.mark.parametrize("value", [[1.0], {"9": [1.0]}, {"1": ["x"]}, {"1": None}])
def test_results_of_another_form_are_refused(tmp_path: Path, value: Any) -> None:
    journal, path = Journal.open(tmp_path, "key"), tmp_path / "errors-reuse.json"
    journal.result(EntryKind("errors", TypeAdapter(Any)), "reuse", lambda: value)
    content = path.read_bytes()
    got = refusal(lambda: journal.result(ERRORS, "reuse", no_work), path)
    assert got.startswith("ValidationError: ")
    assert path.read_bytes() == content


@pytest.mark.parametrize("kind", ["numbers", "tensors"])
def test_a_result_under_another_name_or_of_another_search_is_refused(
    tmp_path: Path, kind: str
) -> None:
    one, other = Journal.open(tmp_path / "one", "a"), Journal.open(tmp_path / "other", "b")
    suffix = "safetensors" if kind == "tensors" else "json"
    value: Any = {"x": torch.ones(2)} if kind == "tensors" else {"x": 1}
    for journal in (one, other):
        kept(journal, kind, lambda: value)
    path = tmp_path / "other" / f"fit.{suffix}"
    shutil.copy(tmp_path / "one" / path.name, path)
    assert refusal(lambda: kept(other, kind, no_work), path) == "a result of another search. "
    path = path.rename(path.with_name(f"fit-b.{suffix}"))
    shutil.copy(tmp_path / "one" / f"fit.{suffix}", tmp_path / "one" / path.name)
    act = {
        "tensors": lambda: one.tensors("fit-b", no_work),
        "numbers": lambda: one.result(FIT, "b", no_work),
    }[kind]
    got = refusal(act, tmp_path / "one" / path.name)
    assert got == "the result fit under another name. "


@pytest.mark.parametrize("kind", ["numbers", "tensors"])
def test_a_flipped_bit_is_refused_or_makes_no_difference(tmp_path: Path, kind: str) -> None:
    journal = Journal.open(tmp_path, "key")
    value: Any = {"x": torch.ones(20)} if kind == "tensors" else {"x": [1.5, 2.5]}
    kept(journal, kind, lambda: value)
    path = tmp_path / ("fit.safetensors" if kind == "tensors" else "fit.json")
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            again = kept(journal, kind, no_work)
        except PlanError:
            refused += 1
            continue
        assert equal(again, value) if kind == "tensors" else again == value
    assert refused > len(whole) // 4  # all but spaces


def test_a_kill_while_the_folder_was_begun_is_gone_on_from(tmp_path: Path) -> None:
    (tmp_path / f".{KEY_FILE}.abcd1234.calicache").mkdir()
    (tmp_path / f".{KEY_FILE}.abcd1234.calicache" / KEY_FILE).write_text("{")
    Journal.open(tmp_path, "key")
    assert names(tmp_path) == [KEY_FILE]


def test_tensors_are_made_once_and_read_back(tmp_path: Path) -> None:
    calls: list[int] = []
    tensors = {
        "blocks.0.attn.q+k+v.output": torch.randn(3, 4),
        "turned": torch.randn(4, 3).T,
        "part": torch.randn(8, 8)[1:3, ::2],
        "half": torch.tensor([1.0, math.nan, -math.inf]).bfloat16(),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 5),
        "whole": torch.arange(6),
    }

    def make() -> Mapping[str, Tensor]:
        calls.append(1)
        return tensors

    first = Journal.open(tmp_path, "key")
    assert equal(first.tensors("moments", make), tensors)
    assert equal(Journal.open(tmp_path, "key").tensors("moments", make), tensors)
    assert equal(Journal.open(tmp_path, "key").tensors("none", dict), {})
    assert Journal.open(tmp_path, "key").tensors("none", no_work) == {}
    assert calls == [1]


def test_results_are_kept_apart_by_name_and_by_kind(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, "key")
    results = [journal.result(FIT, "a", lambda: 1), journal.result(FIT, "b", lambda: 2)]
    journal.tensors("a", lambda: {"x": torch.ones(2)})
    again = Journal.open(tmp_path, "key")
    assert [again.result(FIT, "a", no_work), again.result(FIT, "b", no_work)] == results == [1, 2]
    assert torch.equal(again.tensors("a", no_work)["x"], torch.ones(2))
    assert names(tmp_path) == ["a.safetensors", "fit-a.json", "fit-b.json", KEY_FILE]


def test_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "für search"
    assert Journal.open(folder, "key").folder == folder
    assert names(folder) == [KEY_FILE]
    assert Journal.open(folder, "key").folder == folder  # and again


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    journal, calls = Journal.open(None, "key"), list[int]()

    def make() -> dict[str, Tensor]:
        calls.append(1)
        return {"x": torch.ones(2)}

    for _ in range(2):
        assert journal.result(FIT, "a", lambda: len(calls)) == len(calls)
        assert torch.equal(journal.tensors("a", make)["x"], torch.ones(2))
    assert calls == [1, 1]
    assert names(tmp_path) == []


# --- interruptions ------------------------------------------------------------------------------


def fail() -> Any:
    raise KeyboardInterrupt


def kept(journal: Journal, kind: str, compute: Callable[[], Any]) -> Any:
    """One result named `fit`, of numbers or of tensors."""
    if kind == "tensors":
        return journal.tensors("fit", compute)
    return journal.result(FIT, "", compute)


@pytest.mark.parametrize("kind", ["numbers", "tensors"])
def test_interrupted_work_leaves_nothing_and_is_done_again(tmp_path: Path, kind: str) -> None:
    journal = Journal.open(tmp_path, "key")
    with pytest.raises(KeyboardInterrupt):
        kept(journal, kind, fail)
    assert names(tmp_path) == [KEY_FILE]
    value = {"x": torch.ones(2)} if kind == "tensors" else {"x": 1}
    assert kept(Journal.open(tmp_path, "key"), kind, lambda: value) == value


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, "key")
    with pytest.raises(PydanticSerializationError, match="Unable to serialize"):
        journal.result(FIT, "", lambda: [1.0, object()])
    shared = torch.ones(4)
    with pytest.raises(RuntimeError, match="share memory"):
        journal.tensors("fit", lambda: {"a": shared, "b": shared})
    assert names(tmp_path) == [KEY_FILE]


# --- what is not of this search -----------------------------------------------------------------


def test_another_search_is_refused(tmp_path: Path) -> None:
    Journal.open(tmp_path, "model a, recording b").result(FIT, "", lambda: 1)
    before = names(tmp_path)
    got = refusal(lambda: Journal.open(tmp_path, "model a, recording c"), tmp_path)
    assert got == "a search of another model, recording or request. "
    assert names(tmp_path) == before
    assert Journal.open(tmp_path, "model a, recording b").result(FIT, "", no_work) == 1


def test_key_is_not_written_out(tmp_path: Path) -> None:
    # It may be as long as the recording is.
    Journal.open(tmp_path, "x" * 100_000)
    assert (tmp_path / KEY_FILE).stat().st_size < 300
    assert Journal.open(tmp_path, "x" * 100_000).folder == tmp_path
    refusal(lambda: Journal.open(tmp_path, "x" * 99_999), tmp_path)


def test_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    got = refusal(lambda: Journal.open(tmp_path, "key"), tmp_path)
    assert got.startswith("FileNotFoundError: ")
    assert names(tmp_path) == ["letter.txt"]


def test_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("dear")
    got = refusal(lambda: Journal.open(tmp_path / "kept", "key"), tmp_path / "kept")
    assert got.startswith("FileExistsError: ")
    assert (tmp_path / "kept").read_text() == "dear"


KEYS = {
    "half the json": b'{"calicache": "sea',
    "not text": b"\x80\x81",
    "a list": b"[]",
    "of something else": b'{"calicache": "plan", "key": "0"}',
    "empty": b"",
}


@pytest.mark.parametrize("damage", KEYS)
def test_damaged_key_is_refused(tmp_path: Path, damage: str) -> None:
    Journal.open(tmp_path, "key")
    (tmp_path / KEY_FILE).write_bytes(KEYS[damage])
    assert refusal(lambda: Journal.open(tmp_path, "key"), tmp_path)
    assert (tmp_path / KEY_FILE).read_bytes() == KEYS[damage]


@pytest.mark.parametrize("damage", ["truncated", "not text", "empty", "a folder"])
@pytest.mark.parametrize("kind", ["numbers", "tensors"])
def test_damaged_results_are_refused_with_their_path(
    tmp_path: Path, kind: str, damage: str
) -> None:
    journal = Journal.open(tmp_path, "key")
    value: Any = {"x": torch.ones(2)} if kind == "tensors" else {"x": 1}
    kept(journal, kind, lambda: value)
    path = tmp_path / ("fit.safetensors" if kind == "tensors" else "fit.json")
    whole = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    else:
        spoiled = {"truncated": whole[:-4], "not text": b"\xff" * 40, "empty": b""}
        path.write_bytes(spoiled[damage])
    got = refusal(lambda: kept(journal, kind, no_work), path)
    assert re.match(r"\w+Error: ", got)


def test_files_are_plain_json_and_safetensors(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, "key")
    journal.result(FIT, "", lambda: {"weights": [[1.0, 0.0]]})
    journal.tensors("moments", lambda: {"x": torch.ones(2)})
    value = json.loads((tmp_path / "fit.json").read_text())["value"]
    assert json.loads(value) == {"weights": [[1.0, 0.0]]}
    assert torch.equal(load_file(tmp_path / "moments.safetensors")["x"], torch.ones(2))
    assert stat.S_ISREG((tmp_path / "fit.json").stat().st_mode)
