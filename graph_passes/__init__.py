"""Capture a diffusion transformer, find what changes little, rewrite it step by step.

Record what a sampler does, make a plan, optimise:

    with record(model) as recording:
        sampler(model)
    fast = optimize(model, Plan.from_trajectory(model, recording))
"""

if __name__ == "graph_passes":
    raise ImportError("import calicache.graph_passes: the bare name makes a second copy")

from calicache.graph_passes.api.optimize import optimize
from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.api.speed.eager import measure_eager
from calicache.graph_passes.api.speed.speed_up import speed_up
from calicache.graph_passes.api.speed.subject import restore
from calicache.graph_passes.api.speed.summary import PartSummary, Summary
from calicache.graph_passes.common.errors import CalicacheError
from calicache.graph_passes.common.progress import Progress
from calicache.graph_passes.common.rejection import Rejection
from calicache.graph_passes.describe.blocks import BlockView, FoldedView, fold_blocks, view_block
from calicache.graph_passes.describe.graphs import ModelGraphs, view_graphs
from calicache.graph_passes.factors.observe import observe
from calicache.graph_passes.graph.capture import CapturedGraph, capture
from calicache.graph_passes.graph.dependence import classify_nodes
from calicache.graph_passes.recording.binding import Binding, bind
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.recorder import record
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.rewriting.compile import Compiled
from calicache.graph_passes.rewriting.cost import ModelCost, TargetCost, model_cost
from calicache.graph_passes.settings.choices import (
    BranchKind,
    Granularity,
    SiteMode,
    SiteRule,
    StepMode,
    Weighting,
)
from calicache.graph_passes.settings.front import ErrorSummary, Front, FrontPoint
from calicache.graph_passes.settings.latency import LatencyTable
from calicache.graph_passes.settings.recipe import Recipe
from calicache.graph_passes.settings.schedule import spread_schedule, uniform_schedule
from calicache.graph_passes.sites.analysis import Analysis, analyse
from calicache.graph_passes.sites.sites import Sites, find_sites
from calicache.graph_passes.sites.targets import CalibrationTarget, assign

__all__ = [
    "speed_up",
    "restore",
    "Summary",
    "PartSummary",
    "measure_eager",
    "record",
    "Recording",
    "Plan",
    "Recipe",
    "Binding",
    "Progress",
    "Front",
    "FrontPoint",
    "ErrorSummary",
    "LatencyTable",
    "StepMode",
    "Weighting",
    "Granularity",
    "BranchKind",
    "SiteMode",
    "SiteRule",
    "uniform_schedule",
    "spread_schedule",
    "optimize",
    "OptimizedModel",
    "bind",
    "analyse",
    "Analysis",
    "Compiled",
    "capture",
    "CapturedGraph",
    "Dependence",
    "classify_nodes",
    "find_sites",
    "Sites",
    "Rejection",
    "assign",
    "CalibrationTarget",
    "observe",
    "model_cost",
    "ModelCost",
    "TargetCost",
    "view_graphs",
    "ModelGraphs",
    "view_block",
    "BlockView",
    "fold_blocks",
    "FoldedView",
    "CalicacheError",
]
