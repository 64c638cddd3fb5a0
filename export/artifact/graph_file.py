"""graphs.json.gz of an artifact: the graphs of all modes, to be looked at without the model."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from pydantic import TypeAdapter

from calicache.export.artifact.manifest import GRAPHS_FILE, check_file, read_manifest
from calicache.graph_passes.common.errors import ArtifactError, reason_of
from calicache.graph_passes.describe.graphs import ModelGraphs

_GRAPHS = TypeAdapter(ModelGraphs)


def write_graphs(graphs: ModelGraphs, folder: Path) -> None:
    """Write graphs.json.gz into an artifact's folder; the same graphs give the same bytes."""
    content = gzip.compress(_GRAPHS.dump_json(graphs, exclude_defaults=True), mtime=0)
    (folder / GRAPHS_FILE).write_bytes(content)


def read_graphs(path: Path | str) -> ModelGraphs:
    """The graphs of an artifact.

    Args:
        path: its folder.

    Raises:
        ArtifactError: it is no artifact, or its graphs are missing or damaged.
    """
    file = Path(path) / GRAPHS_FILE
    record = next((r for r in read_manifest(path).files if r.name == GRAPHS_FILE), None)
    try:
        if record is None:
            raise ValueError("the manifest does not list them")
        check_file(Path(path), record)
        return _GRAPHS.validate_json(gzip.decompress(file.read_bytes()))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ArtifactError(
            str(file),
            expected="graphs written by export_onnx",
            got=reason_of(error),
            fix="Export the model again.",
        ) from error
