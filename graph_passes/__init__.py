"""Capture a diffusion transformer, find what changes little, rewrite it step by step.

Record what a sampler does, make a plan, optimise:

    with record(model) as recording:
        sampler(model)
    fast = optimize(model, Plan.from_trajectory(model, recording))
"""

if __name__ == "graph_passes":
    raise ImportError("import calicache.graph_passes: the bare name makes a second copy")

from calicache.lazy_names import lazy_names

_HOMES = {
    "speed_up": "calicache.graph_passes.api.speed.speed_up",
    "restore": "calicache.graph_passes.api.speed.subject",
    "Summary": "calicache.graph_passes.api.speed.summary",
    "PartSummary": "calicache.graph_passes.api.speed.summary",
    "measure_eager": "calicache.graph_passes.api.speed.eager",
    "record": "calicache.graph_passes.recording.recorder",
    "Recording": "calicache.graph_passes.recording.recording",
    "Plan": "calicache.graph_passes.api.plan",
    "Recipe": "calicache.graph_passes.settings.recipe",
    "Binding": "calicache.graph_passes.recording.binding",
    "Progress": "calicache.graph_passes.common.progress",
    "Front": "calicache.graph_passes.settings.front",
    "FrontPoint": "calicache.graph_passes.settings.front",
    "ErrorSummary": "calicache.graph_passes.settings.front",
    "LatencyTable": "calicache.graph_passes.settings.latency",
    "StepMode": "calicache.graph_passes.settings.choices",
    "Weighting": "calicache.graph_passes.settings.choices",
    "Granularity": "calicache.graph_passes.settings.choices",
    "BranchKind": "calicache.graph_passes.settings.choices",
    "SiteMode": "calicache.graph_passes.settings.choices",
    "SiteRule": "calicache.graph_passes.settings.choices",
    "uniform_schedule": "calicache.graph_passes.settings.schedule",
    "spread_schedule": "calicache.graph_passes.settings.schedule",
    "optimize": "calicache.graph_passes.api.optimize",
    "OptimizedModel": "calicache.graph_passes.api.runtime",
    "bind": "calicache.graph_passes.recording.binding",
    "analyse": "calicache.graph_passes.sites.analysis",
    "Analysis": "calicache.graph_passes.sites.analysis",
    "Compiled": "calicache.graph_passes.rewriting.compile",
    "capture": "calicache.graph_passes.graph.capture",
    "CapturedGraph": "calicache.graph_passes.graph.capture",
    "Dependence": "calicache.graph_passes.recording.input_classes",
    "classify_nodes": "calicache.graph_passes.graph.dependence",
    "find_sites": "calicache.graph_passes.sites.sites",
    "Sites": "calicache.graph_passes.sites.sites",
    "Rejection": "calicache.graph_passes.common.rejection",
    "assign": "calicache.graph_passes.sites.targets",
    "CalibrationTarget": "calicache.graph_passes.sites.targets",
    "observe": "calicache.graph_passes.factors.observe",
    "model_cost": "calicache.graph_passes.rewriting.cost",
    "ModelCost": "calicache.graph_passes.rewriting.cost",
    "TargetCost": "calicache.graph_passes.rewriting.cost",
    "view_graphs": "calicache.graph_passes.describe.graphs",
    "ModelGraphs": "calicache.graph_passes.describe.graphs",
    "view_block": "calicache.graph_passes.describe.blocks",
    "BlockView": "calicache.graph_passes.describe.blocks",
    "fold_blocks": "calicache.graph_passes.describe.blocks",
    "FoldedView": "calicache.graph_passes.describe.blocks",
    "CalicacheError": "calicache.graph_passes.common.errors",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
