"""What a path is: each of the three kinds, and everything that is none of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.small.subjects import small_folder

from calicache.export import Manifest
from calicache.graph_passes import Plan, Recording
from calicache.graph_passes.common.errors import ArtifactError, PlanError, RecordError, SubjectError
from calicache.tools.terminal.subject import read_subject

KINDS = (
    "a plan (the folder of Plan.save), an artifact (the folder of export_onnx) "
    "or a recording (the file of Recording.save)"
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
    subject = read_subject(home / "plan")
    assert isinstance(subject, Plan)
    assert subject.recipe.rank == 4


def test_a_plan_of_several_recipes_is_refused_and_each_of_them_is_a_plan(
    home: Path, tmp_path: Path
) -> None:
    plan = Plan.load(home / "plan")
    grid = replace(plan.binding.grid, timesteps=tuple(t / 2 for t in plan.binding.grid.timesteps))
    Plan.join(plan, replace(plan, binding=replace(plan.binding, grid=grid))).save(tmp_path / "both")
    with pytest.raises(PlanError, match=f"{tmp_path}.*got one for 6, 6-2 steps.* its folder, 6,"):
        read_subject(tmp_path / "both")
    for name in ("6", "6-2"):
        subject = read_subject(tmp_path / "both" / name)
        assert isinstance(subject, Plan)
        assert subject.recipe == plan.recipe
    assert_none_of_them(
        tmp_path / "both" / "plans.json", "another file", "Give the folder of the plan."
    )


def test_an_artifact(home: Path) -> None:
    subject = read_subject(str(home / "dit.onnx.d"))
    assert isinstance(subject, Manifest)
    assert [record.name for record in subject.files][-1] == "weights.bin"


@pytest.mark.parametrize("name", ["runs.safetensors", "runs", "runs.onnx"])
def test_a_recording_under_any_name(home: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(home / "runs.safetensors", tmp_path / name)
    subject = read_subject(tmp_path / name)
    assert isinstance(subject, Recording)
    assert len(subject.calls) == 6


def test_a_bare_onnx_file_is_refused_with_what_shows_it(home: Path) -> None:
    path = home / "dit.onnx.d" / "model.onnx"
    fix = "Give the folder of the artifact that it is a part of. Netron (netron.app) shows any "
    assert_none_of_them(path, "a bare ONNX file", fix + "ONNX file.")


def test_no_such_path(tmp_path: Path) -> None:
    assert_none_of_them(tmp_path / "nowhere", "no such path")


def test_a_device() -> None:
    assert_none_of_them(Path("/dev/null"), "no plain file")


@pytest.mark.parametrize("content", [b"", b"\x89PNG", b"hello", b"\xff\xfe\x00"])
def test_files_that_are_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert_none_of_them(tmp_path / "file", "another file")


def test_a_git_lfs_pointer_says_how_to_fetch(tmp_path: Path) -> None:
    path = tmp_path / "pointer"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    fix = "Fetch the file it stands for: git lfs pull."
    assert_none_of_them(path, "a Git LFS pointer", fix)


def test_safetensors_of_something_else(tmp_path: Path) -> None:
    save_file({"b": torch.zeros(2), "a": torch.zeros(2)}, tmp_path / "model.safetensors")
    got = "safetensors without calicache's metadata: 2 tensors such as a"
    assert_none_of_them(tmp_path / "model.safetensors", got)


@pytest.mark.parametrize(
    ("part", "folder"), [("plan/plan.json", "plan"), ("dit.onnx.d/manifest.json", "artifact")]
)
def test_a_part_of_a_folder_names_the_folder(home: Path, part: str, folder: str) -> None:
    assert_none_of_them(home / part, "another file", f"Give the folder of the {folder}.")


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


def test_a_folder_that_is_two_things(copy: Path) -> None:
    shutil.copy(copy / "plan" / "plan.json", copy / "dit.onnx.d")
    got = "a folder with both plan.json and manifest.json"
    assert_none_of_them(copy / "dit.onnx.d", got)


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
