"""Capture a diffusion transformer, find what changes little, rewrite it step by step.

Record what a sampler does, make a plan, optimise:

    with record(model) as trajectory:
        sampler(model)
    fast = optimize(model, Plan.from_trajectory(model, trajectory))
"""

if __name__ == "graph_passes":
    raise ImportError("import calicache.graph_passes: the bare name makes a second copy")

from calicache.graph_passes.assign import CalibrationTarget, Granularity, SiteMode, SiteRule, assign
from calicache.graph_passes.block_view import BlockView, FoldedView, fold_blocks, view_block
from calicache.graph_passes.branches import SiteRejection
from calicache.graph_passes.capture import CapturedGraph, capture
from calicache.graph_passes.cost import ModelCost, TargetCost, model_cost
from calicache.graph_passes.decompose import Weighting
from calicache.graph_passes.dependence import Dependence, classify_inputs, classify_nodes
from calicache.graph_passes.errors import CalicacheError
from calicache.graph_passes.front import ErrorSummary, Front, FrontPoint
from calicache.graph_passes.graph_view import ModelGraphs, view_graphs
from calicache.graph_passes.latency import LatencyTable
from calicache.graph_passes.observe import observe
from calicache.graph_passes.pipeline import optimize
from calicache.graph_passes.plan import Plan
from calicache.graph_passes.record import Trajectory, record
from calicache.graph_passes.runtime import OptimizedModel
from calicache.graph_passes.schedule import StepMode, spread_schedule, uniform_schedule
from calicache.graph_passes.sites import Sites, find_sites

__all__ = [
    "record",
    "Trajectory",
    "Plan",
    "Front",
    "FrontPoint",
    "ErrorSummary",
    "LatencyTable",
    "StepMode",
    "Weighting",
    "Granularity",
    "SiteMode",
    "SiteRule",
    "uniform_schedule",
    "spread_schedule",
    "optimize",
    "OptimizedModel",
    "capture",
    "CapturedGraph",
    "Dependence",
    "classify_inputs",
    "classify_nodes",
    "find_sites",
    "Sites",
    "SiteRejection",
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
