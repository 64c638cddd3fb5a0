"""Artifacts that are exported once in a test run, and looking into graphs and sessions."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import onnxruntime as ort
from filelock import FileLock

from calicache.export import Layout, Session, export_onnx
from calicache.graph_passes import OptimizedModel
from calicache.graph_passes.common.hashing import hash_weights
from calicache.graph_passes.sampler.tables import SamplerTables

RUN_FOLDER = "CALICACHE_TEST_RUN"  # in the environment: of all processes of a test run


def shared_artifact(name: str, make: Callable[[Path], object]) -> Path:
    """What `make` writes to a path, made by the first process of a test run that asks for it.

    Nobody may change it.
    """
    path = Path(os.environ[RUN_FOLDER]) / name
    with FileLock(f"{path}.lock"):
        if not path.exists():
            partial = path.with_name(f"{name}.partial")
            make(partial)
            partial.rename(path)
    return path


def exported(
    fast: OptimizedModel, layout: Layout | str = Layout.STEP, sampler: SamplerTables | None = None
) -> Path:
    """The artifact of a model, exported once in a test run; for reading alone."""
    content = hashlib.sha256(repr((fast.plan, sampler)).encode())
    for variant in fast.compiled.variant_set.variants.values():
        content.update(f"{variant.module.graph} {hash_weights(variant.module)}".encode())
    name = f"{layout} {content.hexdigest()[:16]}.onnx.d"
    return shared_artifact(
        name, lambda path: export_onnx(fast, path, layout=layout, sampler=sampler)
    )


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all graphs inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


def kept_refreshes(session: Session, call: int = 0) -> list[dict[str, ort.OrtValue]]:
    """What a session keeps on its device, newest refresh first."""
    kept, caches = session._run.kept[call], session.manifest.caches
    return [
        {cache.name: kept.read(cache, back) for cache in caches if back < kept.depths[cache.name]}
        for back in range(min(kept.count, session.manifest.history))
    ]
