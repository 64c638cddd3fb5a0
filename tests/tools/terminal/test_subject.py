"""What a path is: each of the four kinds, and everything that is none of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.small_subjects import small_folder

from calicache.graph_passes.common.errors import ArtifactError, PlanError, RecordError, SubjectError
from calicache.tools.terminal.looks_like import file_looks_like, is_safetensors
from calicache.tools.terminal.subject import (
    ArtifactSubject,
    OnnxSubject,
    PlanSubject,
    RecordingSubject,
    read_subject,
)

KINDS = (
    "a plan (the folder of Plan.save), an artifact (the folder of export_onnx), "
    "a recording (the file of Recording.save) or an ONNX file"
)
ANY = "Give the path of one of these."


@pytest.fixture(scope="module")
def home() -> Path:
    return small_folder()


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    """To break."""
    return Path(shutil.copytree(home, tmp_path / "copy"))


def refusal(path: Path | str) -> SubjectError:
    with pytest.raises(SubjectError) as caught:
        read_subject(path)
    return caught.value


def assert_none_of_them(path: Path, got: str, fix: str = ANY) -> None:
    error = refusal(path)
    assert str(error) == f"subject: {path}: expected {KINDS}, got {got}. {fix}"


def test_a_plan(home: Path) -> None:
    target = read_subject(home / "plan")
    assert isinstance(target, PlanSubject)
    assert (target.path, target.plan.settings.rank) == (home / "plan", 4)


def test_an_artifact(home: Path) -> None:
    target = read_subject(str(home / "dit.onnx.d"))
    assert isinstance(target, ArtifactSubject)
    assert target.path == home / "dit.onnx.d"
    assert [record.name for record in target.manifest.files][-1] == "weights.bin"


@pytest.mark.parametrize("name", ["runs.safetensors", "runs", "runs.onnx"])
def test_a_recording_under_any_name(home: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(home / "runs.safetensors", tmp_path / name)
    target = read_subject(tmp_path / name)
    assert isinstance(target, RecordingSubject)
    assert len(target.recording.calls) == 6


@pytest.mark.parametrize("name", ["small.onnx", "small", "small.safetensors"])
def test_an_onnx_file_under_any_name_but_that_of_something_else(
    home: Path, tmp_path: Path, name: str
) -> None:
    shutil.copy(home / "small.onnx", tmp_path / name)
    if name.endswith(".safetensors"):
        with pytest.raises(RecordError):
            read_subject(tmp_path / name)
    else:
        target = read_subject(tmp_path / name)
        assert isinstance(target, OnnxSubject)
        assert [node.op_type for node in target.model.graph] == ["Conv", "Flatten", "Gemm", "If"]


def test_an_onnx_file_is_read_without_the_weights_outside_of_it(copy: Path) -> None:
    (copy / "dit.onnx.d" / "weights.bin").unlink()
    target = read_subject(copy / "dit.onnx.d" / "model.onnx")
    assert isinstance(target, OnnxSubject)
    assert target.model.graph.initializers


def test_no_such_path(tmp_path: Path) -> None:
    assert_none_of_them(tmp_path / "nowhere", "no such path")


def test_a_device() -> None:
    assert_none_of_them(Path("/dev/null"), "no plain file")


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda path: path.write_bytes(b""), "an empty file"),
        (lambda path: Image.new("L", (3, 3)).save(path, "PNG"), "a PNG image"),
        (lambda path: Image.new("L", (3, 3)).save(path, "JPEG"), "a JPEG image"),
        (lambda path: path.write_text("hello ä\n"), "a text file"),
        (lambda path: path.write_text('{"a": 1}'), "a JSON file"),
        (lambda path: torch.save({}, path), "a zip archive, as torch.save writes it"),
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid x\n"),
            "a Git LFS pointer: `git lfs pull` fetches the file it stands for",
        ),
        (lambda path: path.write_bytes(b"\x08\x02 no"), "a file of bytes that no tool here knows"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "a file of bytes that no tool here knows"),
    ],
)
def test_files_that_are_something_else(
    tmp_path: Path, make: Callable[[Path], object], got: str
) -> None:
    path = tmp_path / "file"
    make(path)
    assert_none_of_them(path, got)


@pytest.mark.parametrize("name", ["picture.onnx", "picture.safetensors"])
def test_content_counts_more_than_the_name(tmp_path: Path, name: str) -> None:
    Image.new("L", (3, 3)).save(tmp_path / name, "PNG")
    assert_none_of_them(tmp_path / name, "a PNG image")


def test_safetensors_of_something_else(tmp_path: Path) -> None:
    save_file({"b": torch.zeros(2), "a": torch.zeros(2)}, tmp_path / "model.safetensors")
    got = "safetensors without calicache's metadata: 2 tensors such as a"
    assert_none_of_them(tmp_path / "model.safetensors", got)


@pytest.mark.parametrize(
    ("part", "got", "fix"),
    [
        ("plan/plan.json", "a JSON file", "Give the folder of the plan."),
        ("dit.onnx.d/manifest.json", "a JSON file", "Give the folder of the artifact."),
    ],
)
def test_a_part_of_a_folder_names_the_folder(home: Path, part: str, got: str, fix: str) -> None:
    assert_none_of_them(home / part, got, fix)


def test_the_statistics_of_a_plan_name_its_folder(home: Path) -> None:
    error = refusal(home / "plan" / "statistics.safetensors")
    assert error.got.startswith("safetensors without calicache's metadata: ")
    assert error.fix == "Give the folder of the plan."


def test_an_empty_folder(tmp_path: Path) -> None:
    assert_none_of_them(tmp_path, "an empty folder")


def test_a_folder_of_other_files(tmp_path: Path) -> None:
    for name in "edcba":
        (tmp_path / name).touch()
    assert_none_of_them(tmp_path, "a folder with a, b, c and 2 more")


def test_a_folder_of_diffusers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    got = "a model that save_pretrained wrote (there is config.json)"
    assert_none_of_them(tmp_path, got)


def test_a_folder_that_is_two_things(copy: Path) -> None:
    shutil.copy(copy / "plan" / "plan.json", copy / "dit.onnx.d")
    got = "a folder with both plan.json and manifest.json"
    assert_none_of_them(copy / "dit.onnx.d", got)


def test_an_artifact_without_its_manifest_names_the_model(copy: Path) -> None:
    folder = copy / "dit.onnx.d"
    (folder / "manifest.json").unlink()
    got = "a folder with graphs.json.gz, model.onnx, weights.bin"
    assert_none_of_them(folder, got, f"Give one of its files, such as {folder / 'model.onnx'}.")


def test_a_plan_without_a_file_is_told_by_plan_load(copy: Path) -> None:
    (copy / "plan" / "plan.json").unlink()
    with pytest.raises(PlanError, match=r"No such file .*plan\.json"):
        read_subject(copy / "plan")


def test_a_damaged_artifact_is_told_by_load_artifact(copy: Path) -> None:
    path = copy / "dit.onnx.d" / "weights.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"weights\.bin: expected \d+ bytes, got \d+ bytes"):
        read_subject(copy / "dit.onnx.d")


def test_a_recording_cut_short_is_told_by_recording_load(copy: Path) -> None:
    path = copy / "runs.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RecordError, match=r"runs\.safetensors: .*SafetensorError: "):
        read_subject(path)


def damaged_onnx(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    error = refusal(path)
    assert (error.where, error.expected) == (str(path), "an ONNX model")
    assert error.fix == "Copy the file again, or export again."
    assert error.got.startswith("DecodeError: Error parsing message with type 'onnx.ModelProto'")
    return error.got.partition("; ")[2]


def test_an_onnx_file_cut_short_says_in_which_field(home: Path, tmp_path: Path) -> None:
    content = (home / "small.onnx").read_bytes()
    cut = content[: len(content) // 2]
    start = content.index(b"hand") + 4  # the graph comes after the producer's name
    there = len(cut) - start - 3  # a tag, and a length of two bytes
    said = len(content) - start - 3 - 6  # the opset at the end takes six bytes
    assert damaged_onnx(tmp_path / "x.onnx", cut) == (
        f"graph, byte {start} of {len(cut)}: it says {said} bytes, {there} are there"
    )


def test_an_onnx_file_changed_inside_says_in_which_field(home: Path, tmp_path: Path) -> None:
    content = (home / "small.onnx").read_bytes()
    place = content.index(b"\x1a\x04flat")  # tag, length and name of the second node
    changed = content[: place + 1] + b"\x7f" + content[place + 2 :]
    found = damaged_onnx(tmp_path / "x.onnx", changed)
    assert found.startswith(
        f"graph.node[1].name, byte {place} of {len(content)}: it says 127 bytes"
    )


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"\x08", "ir_version, byte 1 of 1: it ends inside a number"),
        (b"\x08" + b"\xff" * 11, "ir_version, byte 1 of 12: a number of more than 10 bytes"),
        (b"\x08\x0a\x0f", "producer_name"),
        (b"\x08\x0a\x3b\x00", "graph, byte 2 of 4: there is no wire type 3"),
    ],
)
def test_short_onnx_files_say_what_is_wrong(tmp_path: Path, content: bytes, place: str) -> None:
    if place == "producer_name":
        content, place = b"\x08\x0a\x12\x09hand", "producer_name, byte 2 of 8: it says 9 bytes"
        place += ", 4 are there"
    assert damaged_onnx(tmp_path / "x.onnx", content) == place


def test_onnx_without_a_version(tmp_path: Path) -> None:
    onnx.save(onnx.ModelProto(producer_name="hand"), tmp_path / "x.onnx")
    error = refusal(tmp_path / "x.onnx")
    assert error.got == "ValueError: it names no IR version"


def test_text_cut_inside_of_a_letter_is_text() -> None:
    assert file_looks_like("aä".encode()[:-1]) == "a text file"


def test_a_long_header_is_no_safetensors() -> None:
    assert is_safetensors((100).to_bytes(8, "little") + b"{")
    assert not is_safetensors((10**9).to_bytes(8, "little") + b"{")
    assert not is_safetensors(b"{")
