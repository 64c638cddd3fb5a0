"""From an optimised model to an ONNX artifact, and from an artifact to a running session."""

if __name__ == "export":
    raise ImportError("import calicache.export: the bare name makes a second copy of every class")

from calicache.export.artifact.folder import load_artifact, read_manifest
from calicache.export.artifact.manifest import Attention, Layout, Manifest
from calicache.export.export import export_onnx
from calicache.export.latency import measure_latency
from calicache.export.samplers import read_sampler
from calicache.export.session.session import Session
from calicache.graph_passes.sampler.tables import SamplerTables

__all__ = [
    "export_onnx",
    "measure_latency",
    "Layout",
    "Attention",
    "SamplerTables",
    "read_sampler",
    "Session",
    "Manifest",
    "load_artifact",
    "read_manifest",
]
