"""graphs.json.gz of an artifact: the graphs of all modes, to be looked at without the model."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from pydantic import TypeAdapter

from calicache.export.artifact.folder import check_file, read_manifest
from calicache.export.artifact.manifest import GRAPHS_FILE
from calicache.graph_passes.common.arguments import path_of
from calicache.graph_passes.common.disk.documents import DocumentKind
from calicache.graph_passes.common.disk.files import read_bounded
from calicache.graph_passes.common.disk.replacing import standing
from calicache.graph_passes.common.errors import ArtifactError
from calicache.graph_passes.describe.graphs import ModelGraphs

_PACKED, _UNPACKED = 2**25, 2**27  # bytes; those of 10,000 nodes in four modes are a tenth
_GRAPHS = DocumentKind(
    "graphs",
    1,
    TypeAdapter(ModelGraphs),
    ArtifactError,
    "graphs written by export_onnx",
    "Export the model again.",
    max_bytes=_UNPACKED,
    max_values=2**22,
)


def write_graphs(graphs: ModelGraphs, folder: Path) -> None:
    """Write graphs.json.gz into an artifact's folder; the same graphs give the same bytes."""
    content = gzip.compress(_GRAPHS.dumps(graphs).encode(), mtime=0)
    (folder / GRAPHS_FILE).write_bytes(content)


def read_graphs(path: Path | str) -> ModelGraphs:
    """The graphs of an artifact.

    Args:
        path: its folder.

    Raises:
        ArtifactError: it is no artifact, or its graphs are missing or damaged.
    """
    folder = standing(path_of(path, ArtifactError))
    file = folder / GRAPHS_FILE
    record = next((r for r in read_manifest(path).files if r.name == GRAPHS_FILE), None)
    try:
        if record is None:
            raise ValueError("the manifest does not list them")
        check_file(folder, record)
        return _GRAPHS.loads(_unpacked(read_bounded(file, _PACKED)))
    except (OSError, zlib.error, ValueError) as error:
        raise _GRAPHS.refused(file, error) from error


def _unpacked(content: bytes) -> bytes:
    """What is packed, up to a size that no graphs have."""
    unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    text = unpacker.decompress(content, _UNPACKED)
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("cut short, or larger than any graphs")
    return text
