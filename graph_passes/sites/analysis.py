"""A model looked at once: its graph, its sites, its calibration targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from calicache.graph_passes.common.errors import CaptureError
from calicache.graph_passes.common.hashing import digest
from calicache.graph_passes.graph.capture import CapturedGraph, capture
from calicache.graph_passes.graph.checks import verify_captured
from calicache.graph_passes.graph.dependence import classify_nodes
from calicache.graph_passes.graph.pointwise import pointwise_to_linear
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.settings.choices import StepMode, Weighting
from calicache.graph_passes.settings.recipe import PlanSettings
from calicache.graph_passes.sites.sites import Sites, find_sites
from calicache.graph_passes.sites.targets import CalibrationTarget, assign


def fixed_values(
    captured: CapturedGraph, recording: Recording, dependence: Mapping[str, Dependence]
) -> dict[str, tuple[str, ...]]:
    """Digests of the recorded values of the inputs that are built into the graph.

    Raises:
        CaptureError: one of them changes inside a run.
    """
    for name in captured.fixed:
        if dependence[name] > Dependence.RUN:
            raise CaptureError(
                name,
                expected="control flow and sizes that stay the same over a run",
                got=f"some that depend on {name}, which changes from step to step",
                fix="A graph cannot follow such a decision; compute both sides, or mask.",
            )
    firsts = [run[0] for run in recording.runs]
    return {
        name: tuple(dict.fromkeys(digest(call[name]) for call in firsts)) for name in captured.fixed
    }


def analyse(
    model: nn.Module, settings: PlanSettings
) -> tuple[CapturedGraph, Sites, tuple[CalibrationTarget, ...]]:
    """Capture a model, find its sites, choose what CALIBRATE steps correct.

    Raises:
        CalicacheError: whatever stage refuses names itself.
    """
    captured = capture(model, settings.signature, settings.reads)
    captured = verify_captured(pointwise_to_linear(captured))
    classes = classify_nodes(captured, settings.dependence)
    needed = not {StepMode.CALIBRATE, StepMode.REUSE}.isdisjoint(settings.schedule)
    sites = find_sites(captured, classes, settings.include, settings.exclude, some=needed)
    targets, unfit = assign(
        captured,
        sites,
        rank=settings.rank,
        granularity=settings.granularity,
        rules=settings.rules,
        joint=settings.weighting is Weighting.COVARIANCE,
        ranks=settings.ranks,
    )
    return captured, replace(sites, rejections=(*sites.rejections, *unfit)), targets
