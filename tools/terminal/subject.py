"""What a path given to a tool is: a plan, an artifact, a recording, or a bare ONNX file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # of onnx
from safetensors import SafetensorError, safe_open

from calicache.export.artifact.manifest import MANIFEST_FILE, Manifest, load_artifact
from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.plan_file import PLAN_FILE, STATISTICS_FILE
from calicache.graph_passes.common.errors import TargetError, reason_of
from calicache.graph_passes.recording.recording import Recording
from calicache.tools.terminal.looks_like import (
    SAFETENSORS,
    file_looks_like,
    folder_looks_like,
    is_safetensors,
)
from calicache.tools.terminal.onnx_damage import where_damaged

KINDS = (
    "a plan (the folder of Plan.save), an artifact (the folder of export_onnx), "
    "a recording (the file of Recording.save) or an ONNX file"
)
ONNX_SUFFIX = ".onnx"
_HEAD = 4096  # bytes of a file that are looked at
_ONNX_START = b"\x08"  # the tag of ir_version, the first field of an ONNX model


@dataclass(frozen=True, slots=True)
class PlanTarget:
    """The folder of a plan."""

    path: Path
    plan: Plan


@dataclass(frozen=True, slots=True)
class ArtifactTarget:
    """The folder of an artifact, every file checked against the manifest."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class RecordingTarget:
    """The file of a recording."""

    path: Path
    recording: Recording


@dataclass(frozen=True, slots=True)
class OnnxTarget:
    """An ONNX file; external weights are named in the model and not read."""

    path: Path
    model: ir.Model


Target = PlanTarget | ArtifactTarget | RecordingTarget | OnnxTarget


def read_target(path: Path | str) -> Target:
    """Recognise what a path is by what lies there, and read it.

    Raises:
        TargetError: it is none of the four kinds, or a damaged ONNX file.
        PlanError, ArtifactError, RecordError: a damaged plan, artifact or recording.
    """
    place = Path(path)
    try:
        if place.is_dir():
            return _read_folder(place)
        if place.is_file():
            return _read_file(place)
    except OSError as error:
        raise _none_of_them(place, reason_of(error)) from error
    raise _none_of_them(place, "no plain file" if place.exists() else "no such path")


def read_onnx(path: Path) -> ir.Model:
    """An ONNX file, without the weights that lie outside of it.

    Raises:
        TargetError: it is damaged; the message says where.
    """
    try:
        model = ir.load(path, format="protobuf")
        if not model.ir_version:
            raise ValueError("it names no IR version")
    except (DecodeError, ir.serde.SerdeError, ValueError, TypeError, KeyError) as error:
        place = where_damaged(path)
        raise TargetError(
            str(path),
            expected="an ONNX model",
            got=f"{reason_of(error)}{f'; {place}' if place else ''}",
            fix="Copy the file again, or export again.",
        ) from error
    return model


def _read_folder(folder: Path) -> PlanTarget | ArtifactTarget:
    names = sorted(path.name for path in folder.iterdir())
    if PLAN_FILE in names and MANIFEST_FILE in names:
        raise _none_of_them(folder, f"a folder with both {PLAN_FILE} and {MANIFEST_FILE}")
    if MANIFEST_FILE in names:
        return ArtifactTarget(folder, load_artifact(folder))
    # With the statistics alone it is a plan that lost a file; Plan.load says which.
    if PLAN_FILE in names or STATISTICS_FILE in names:
        return PlanTarget(folder, Plan.load(folder))
    models = [name for name in names if name.endswith(ONNX_SUFFIX)]
    fix = f"Give one of its files, such as {folder / models[0]}." if models else None
    raise _none_of_them(folder, folder_looks_like(names), fix)


def _read_file(path: Path) -> RecordingTarget | OnnxTarget:
    with path.open("rb") as file:
        head = file.read(_HEAD)
    known = file_looks_like(head)
    if is_safetensors(head) or (path.suffix == SAFETENSORS and known is None):
        return _read_safetensors(path)
    named = path.suffix == ONNX_SUFFIX
    if known is None and (named or head.startswith(_ONNX_START)):
        try:
            return OnnxTarget(path, read_onnx(path))
        except TargetError:
            if named:
                raise
    raise _none_of_them(path, known or "a file of bytes that no tool here knows", _folder_of(path))


def _read_safetensors(path: Path) -> RecordingTarget:
    try:
        with safe_open(path, framework="pt") as file:
            owner = (file.metadata() or {}).get("calicache")
            names = sorted(file.keys())
    except SafetensorError:
        owner, names = "recording", []  # damaged: Recording.load says how
    if owner != "recording":
        such = f" such as {names[0]}" if names else ""
        got = f"safetensors without calicache's metadata: {len(names)} tensors{such}"
        raise _none_of_them(path, got, _folder_of(path))
    return RecordingTarget(path, Recording.load(path))


def _folder_of(path: Path) -> str | None:
    """What to do with a file that is a part of a plan or an artifact."""
    parts = {PLAN_FILE: "plan", STATISTICS_FILE: "plan", MANIFEST_FILE: "artifact"}
    return f"Give the folder of the {parts[path.name]}." if path.name in parts else None


def _none_of_them(path: Path, got: str, fix: str | None = None) -> TargetError:
    return TargetError(
        str(path), expected=KINDS, got=got, fix=fix or "Give the path of one of these."
    )
