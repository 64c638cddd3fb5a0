"""What differs between two plans, or between two artifacts."""

from __future__ import annotations

from pathlib import Path

from calicache.graph_passes.common.errors import TargetError
from calicache.tools.diff.artifacts import diff_artifacts
from calicache.tools.diff.difference import Difference
from calicache.tools.diff.plans import diff_plans
from calicache.tools.terminal.subject import (
    ArtifactTarget,
    OnnxTarget,
    PlanTarget,
    Target,
    read_target,
)


def diff_targets(a: Path | str, b: Path | str) -> Difference:
    """What differs between two plans, or between two artifacts.

    Args:
        a: the folder of the one.
        b: the folder of the other.

    Raises:
        TargetError: they are of two kinds, or of one that cannot be compared.
        PlanError, ArtifactError: one is damaged.
    """
    first, second = read_target(a), read_target(b)
    if isinstance(first, PlanTarget) and isinstance(second, PlanTarget):
        return diff_plans(first, second)
    if isinstance(first, ArtifactTarget) and isinstance(second, ArtifactTarget):
        return diff_artifacts(first, second)
    raise TargetError(
        f"{a} and {b}",
        expected="two plans or two artifacts",
        got=f"{_kind(first)} and {_kind(second)}",
        fix="Give two of one kind; `calicache inspect` shows one of any kind.",
    )


def _kind(target: Target) -> str:
    if isinstance(target, PlanTarget):
        return "a plan"
    if isinstance(target, ArtifactTarget):
        return "an artifact"
    return "an ONNX file" if isinstance(target, OnnxTarget) else "a recording"
