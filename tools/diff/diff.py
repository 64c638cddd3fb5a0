"""What differs between two plans, or between two artifacts."""

from __future__ import annotations

from pathlib import Path

from calicache.graph_passes.common.errors import SubjectError
from calicache.tools.diff.artifacts import diff_artifacts
from calicache.tools.diff.difference import Difference
from calicache.tools.diff.plans import diff_plans
from calicache.tools.terminal.subject import (
    ArtifactSubject,
    OnnxSubject,
    PlanSubject,
    Target,
    read_subject,
)


def diff_subjects(a: Path | str, b: Path | str) -> Difference:
    """What differs between two plans, or between two artifacts.

    Args:
        a: the folder of the one.
        b: the folder of the other.

    Raises:
        SubjectError: they are of two kinds, or of one that cannot be compared.
        PlanError, ArtifactError: one is damaged.
    """
    first, second = read_subject(a), read_subject(b)
    if isinstance(first, PlanSubject) and isinstance(second, PlanSubject):
        return diff_plans(first, second)
    if isinstance(first, ArtifactSubject) and isinstance(second, ArtifactSubject):
        return diff_artifacts(first, second)
    raise SubjectError(
        f"{a} and {b}",
        expected="two plans or two artifacts",
        got=f"{_kind(first)} and {_kind(second)}",
        fix="Give two of one kind; `calicache inspect` shows one of any kind.",
    )


def _kind(target: Target) -> str:
    if isinstance(target, PlanSubject):
        return "a plan"
    if isinstance(target, ArtifactSubject):
        return "an artifact"
    return "an ONNX file" if isinstance(target, OnnxSubject) else "a recording"
