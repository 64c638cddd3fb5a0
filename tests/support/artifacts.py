"""Looking into ONNX graphs and running sessions."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnxruntime as ort

from calicache.export import Session


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all graphs inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


def kept_refreshes(session: Session, call: int = 0) -> list[dict[str, ort.OrtValue]]:
    """What a session keeps on its device, newest refresh first."""
    kept, caches = session._kept[call], session.manifest.caches
    return [
        {cache.name: kept.read(cache, back) for cache in caches if back < kept.depths[cache.name]}
        for back in range(min(kept.count, session.manifest.history))
    ]
