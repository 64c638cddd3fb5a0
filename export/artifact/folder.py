"""The folder of an artifact: read without trust, and replaced only where it is one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calicache.export.artifact.manifest import MANIFEST, MANIFEST_FILE, FileRecord, Manifest
from calicache.export.artifact.validity import check_manifest, check_models
from calicache.graph_passes.common.arguments import path_of
from calicache.graph_passes.common.disk.files import Target, foreign_folder
from calicache.graph_passes.common.disk.hashing import sha256_of
from calicache.graph_passes.common.disk.replacing import standing
from calicache.graph_passes.common.errors import ArtifactError, ExportError, RecordError


def read_manifest(path: Path | str) -> Manifest:
    """Read the manifest of an artifact's folder alone, without looking at the other files.

    Raises:
        ArtifactError: there is none, it is damaged, of another version, or contradicts itself.
    """
    file = path_of(path, ArtifactError) / MANIFEST_FILE
    manifest = MANIFEST.read(file)
    try:
        check_manifest(manifest)
    except (ValueError, RecordError) as error:
        raise MANIFEST.refused(file, error) from error
    return manifest


def load_artifact(path: Path | str) -> Manifest:
    """Read the manifest of an artifact's folder and check every file against it.

    Raises:
        ArtifactError: a file is missing, cut short, changed, or outside the folder; or a model is
            not the one that the manifest describes.
    """
    path = path_of(path, ArtifactError)
    manifest, folder = read_manifest(path), standing(path)
    for record in manifest.files:
        check_file(folder, record)
    try:
        check_models(manifest, folder)
    except (ValueError, RecordError) as error:
        raise MANIFEST.refused(path / MANIFEST_FILE, error) from error
    return manifest


def check_file(folder: Path, record: FileRecord) -> None:
    """Check one file of an artifact against its record.

    Raises:
        ArtifactError: it is missing, cut short, or changed.
    """
    path = folder / record.name
    if not path.is_file():
        raise _damaged(path, f"a file of {record.size} bytes", "no file")
    if path.stat().st_size != record.size:
        raise _damaged(path, f"{record.size} bytes", f"{path.stat().st_size} bytes")
    if sha256_of(path) != record.sha256:
        raise _damaged(path, f"SHA-256 {record.sha256[:12]}", "another content")


def _damaged(path: Path, expected: str, got: str) -> ArtifactError:
    return ArtifactError(
        str(path), expected=expected, got=got, fix="Copy the whole folder again, or export again."
    )


def _own_files(folder: Path) -> set[str]:
    """Names of the files of an artifact; none where the folder is not one, of whatever format."""
    content = MANIFEST.head(folder / MANIFEST_FILE)
    return set() if content is None else {MANIFEST_FILE, *_names(content)}


def _names(content: Mapping[str, Any]) -> list[str]:
    records = content.get("files")
    names = [record.get("name") for record in records] if isinstance(records, list) else []
    return [name for name in names if isinstance(name, str)]


ARTIFACT = Target("an artifact", ExportError, lambda path: foreign_folder(path, _own_files))
