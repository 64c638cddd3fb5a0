"""A compiler pass that makes diffusion transformers cheap to run.

    from calicache import speed_up

    print(speed_up(pipe, {"prompt": "A lighthouse", "num_inference_steps": 30}, budget=0.4))

or step by step:

    from calicache import Plan, optimize, record

    with record(model) as recording:
        sampler(model)
    fast = optimize(model, Plan.from_trajectory(model, recording))

What is named here is loaded when it is first asked for: the import itself loads no torch.
"""

from __future__ import annotations

import importlib

_HOMES = {
    "speed_up": "calicache.graph_passes.api.speed.speed_up",
    "restore": "calicache.graph_passes.api.speed.subject",
    "record": "calicache.graph_passes.recording.recorder",
    "Recording": "calicache.graph_passes.recording.recording",
    "Plan": "calicache.graph_passes.api.plan",
    "Front": "calicache.graph_passes.settings.front",
    "optimize": "calicache.graph_passes.api.optimize",
    "OptimizedModel": "calicache.graph_passes.api.runtime",
    "StepMode": "calicache.graph_passes.settings.choices",
    "SiteMode": "calicache.graph_passes.settings.choices",
    "SiteRule": "calicache.graph_passes.settings.choices",
    "LatencyTable": "calicache.graph_passes.settings.latency",
    "export_onnx": "calicache.export.export",
    "Session": "calicache.export.session.session",
    "CalicacheError": "calicache.graph_passes.common.errors",
}

__all__ = [*_HOMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    """The public object of that name (PEP 562)."""
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("calicache")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
