"""What a path given to a tool is: a plan, an artifact or a recording."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from calicache.export.artifact.folder import load_artifact
from calicache.export.artifact.manifest import MANIFEST_FILE, Manifest
from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.plan_file import (
    PLAN_FILE,
    PLANS_FILE,
    SAMPLER_FILE,
    STATISTICS_FILE,
)
from calicache.graph_passes.common.disk.replacing import standing
from calicache.graph_passes.common.errors import SubjectError, reason_of
from calicache.graph_passes.recording.recording import Recording
from calicache.tools.terminal.options import KINDS
from calicache.tools.terminal.text import some_names

_ONNX, _SAFETENSORS = ".onnx", ".safetensors"
_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_FOLDERS = {
    **dict.fromkeys((PLANS_FILE, PLAN_FILE, STATISTICS_FILE, SAMPLER_FILE), "plan"),
    MANIFEST_FILE: "artifact",
}
_MOST_NAMES = 3

Subject = Plan | Manifest | Recording


def kind_in_words(subject: Subject) -> str:
    """`a plan`, `an artifact` or `a recording`."""
    kinds = {Plan: "a plan", Manifest: "an artifact", Recording: "a recording"}
    return kinds[type(subject)]


def read_subject(path: Path | str) -> Subject:
    """Recognise what a path is by what lies there, and read it.

    Returns:
        A plan, the manifest of an artifact whose files were checked, or a recording.

    Raises:
        SubjectError: it is none of the three kinds.
        PlanError, ArtifactError, RecordError: a damaged plan, artifact or recording, or a plan of
            several recipes, each of which is a plan in a folder of its own.
    """
    place = Path(path)
    try:
        if standing(place).is_dir():
            return _read_folder(place)
        if place.is_file():
            return _read_file(place)
    except OSError as error:
        raise _none_of_them(place, reason_of(error)) from error
    raise _none_of_them(place, "no plain file" if place.exists() else "no such path")


def _read_folder(folder: Path) -> Plan | Manifest:
    names = sorted(path.name for path in standing(folder).iterdir())
    if PLAN_FILE in names and MANIFEST_FILE in names:
        raise _none_of_them(folder, f"a folder with both {PLAN_FILE} and {MANIFEST_FILE}")
    if MANIFEST_FILE in names:
        return load_artifact(folder)
    # With the statistics alone it is a plan that lost a file; Plan.load says which.
    if {PLANS_FILE, PLAN_FILE, STATISTICS_FILE} & set(names):
        return Plan.load(folder).one(str(folder))
    shown = f"a folder with {some_names(names, _MOST_NAMES)}" if names else "an empty folder"
    raise _none_of_them(folder, shown)


def _read_file(path: Path) -> Recording:
    folder = _FOLDERS.get(path.name)
    fix = f"Give the folder of the {folder}." if folder else None
    try:
        with safe_open(path, framework="pt") as file:
            owner = (file.metadata() or {}).get("calicache")
            names = sorted(file.keys())
    except SafetensorError as error:
        if path.suffix == _SAFETENSORS:  # damaged: the message says how
            return Recording.load(path)
        raise _none_of_them(path, *_file_in_words(path, fix)) from error
    if owner != "recording":
        such = f" such as {names[0]}" if names else ""
        got = f"safetensors without calicache's metadata: {len(names)} tensors{such}"
        raise _none_of_them(path, got, fix)
    return Recording.load(path)


def _file_in_words(path: Path, fix: str | None) -> tuple[str, str | None]:
    """What a file looks like, and what to do with it."""
    if path.suffix == _ONNX:
        own = "Give the folder of the artifact that it is a part of."
        return "a bare ONNX file", f"{own} Netron (netron.app) shows any ONNX file."
    with path.open("rb") as file:
        if file.read(len(_GIT_LFS)) == _GIT_LFS:
            return "a Git LFS pointer", "Fetch the file it stands for: git lfs pull."
    return "another file", fix


def _none_of_them(path: Path, got: str, fix: str | None = None) -> SubjectError:
    fix = fix or "Give the path of one of these."
    return SubjectError(str(path), expected=KINDS, got=got, fix=fix)
