"""From an optimised model to an ONNX artifact, and from an artifact to a running session."""

if __name__ == "export":
    raise ImportError("import calicache.export: the bare name makes a second copy of every class")

from calicache.lazy_names import lazy_names

_HOMES = {
    "export_onnx": "calicache.export.export",
    "measure_latency": "calicache.export.latency",
    "Layout": "calicache.export.artifact.manifest",
    "Attention": "calicache.export.artifact.manifest",
    "Precision": "calicache.export.artifact.manifest",
    "SamplerTables": "calicache.graph_passes.sampler.tables",
    "read_sampler": "calicache.export.samplers",
    "Session": "calicache.export.session.session",
    "Manifest": "calicache.export.artifact.manifest",
    "load_artifact": "calicache.export.artifact.folder",
    "read_manifest": "calicache.export.artifact.folder",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
