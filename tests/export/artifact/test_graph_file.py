"""graphs.json.gz: what is written is read back, and what is damaged is refused."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
from support.small.graphs import small_model
from support.small.subjects import small_folder

from calicache.export.artifact import graph_file
from calicache.export.artifact.graph_file import read_graphs, write_graphs
from calicache.export.artifact.manifest import GRAPHS_FILE, FileRecord
from calicache.graph_passes import view_graphs
from calicache.graph_passes.common.disk.documents import sum_of
from calicache.graph_passes.common.disk.hashing import sha256_of
from calicache.graph_passes.common.errors import ArtifactError

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact to break."""
    return Path(shutil.copytree(small_folder() / "dit.onnx.d", tmp_path / "copy.onnx.d"))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the manifest says of the file: damage with a right digest has to be seen too."""

    def accept(folder: Path, record: FileRecord) -> None:
        assert (folder / record.name).is_file()

    monkeypatch.setattr(graph_file, "check_file", accept)


@pytest.mark.slow
@pytest.mark.parametrize("order", [0, 2])
def test_graphs_are_read_back_as_they_were_written(
    order: int, folder: Path, unchecked: None
) -> None:
    optimized = small_model(order).compiled
    graphs = view_graphs(optimized.captured, optimized.variant_set)
    write_graphs(graphs, folder)
    content = (folder / GRAPHS_FILE).read_bytes()
    assert read_graphs(folder) == graphs
    write_graphs(graphs, folder)
    assert (folder / GRAPHS_FILE).read_bytes() == content


def test_a_changed_file_is_refused_by_its_digest(folder: Path) -> None:
    content = (folder / GRAPHS_FILE).read_bytes()
    (folder / GRAPHS_FILE).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"graphs\.json\.gz: expected SHA-256"):
        read_graphs(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"\x1f\x8b", *(gzip.compress(t, mtime=0) for t in (b"", b"[]", b"{}", b"{"))],
)
def test_what_holds_no_graphs_is_refused(content: bytes, folder: Path, unchecked: None) -> None:
    (folder / GRAPHS_FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"graphs\.json\.gz: expected graphs written by"):
        read_graphs(folder)


def test_graphs_that_grow_without_end_are_refused(
    folder: Path, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_file, "_UNPACKED", 10_000)
    (folder / GRAPHS_FILE).write_bytes(gzip.compress(bytes(10**8), mtime=0))
    with pytest.raises(ArtifactError, match="cut short, or larger than any graphs"):
        read_graphs(folder)


def test_an_artifact_that_does_not_list_its_graphs_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = [file for file in manifest["files"] if file["name"] != GRAPHS_FILE]
    manifest["sha256"] = sum_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="the manifest does not list them"):
        read_graphs(folder)


def test_the_file_is_small(folder: Path) -> None:
    plain = gzip.decompress((folder / GRAPHS_FILE).read_bytes())
    assert (folder / GRAPHS_FILE).stat().st_size < len(plain) / 5
    assert sha256_of(folder / GRAPHS_FILE) in (folder / "manifest.json").read_text()
