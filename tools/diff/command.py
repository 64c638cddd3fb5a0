"""`calicache diff`: what differs between two plans, or between two artifacts."""

from __future__ import annotations

from pathlib import Path

import typer

from calicache.export.artifact.manifest import Manifest
from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.common.errors import SubjectError
from calicache.tools.diff.difference import Difference
from calicache.tools.diff.subjects import diff_artifacts, diff_plans
from calicache.tools.diff.view import describe_difference
from calicache.tools.inspect.artifact import artifact_facts
from calicache.tools.inspect.plan import plan_facts
from calicache.tools.terminal.subject import kind_in_words, read_subject
from calicache.tools.terminal.text import show_value

DIFFERENT = 3  # exit code; 1 is for what is refused


def diff(a: Path, b: Path, json: bool) -> None:
    """Print the difference of two."""
    difference = diff_subjects(a, b)
    show_value(difference, describe_difference, json=json)
    if not difference.equal:
        raise typer.Exit(DIFFERENT)


def diff_subjects(a: Path | str, b: Path | str) -> Difference:
    """What differs between two plans, or between two artifacts.

    Args:
        a: the folder of the one.
        b: the folder of the other.

    Raises:
        SubjectError: they are of two kinds, or recordings.
        PlanError, ArtifactError: one is damaged.
    """
    first, second = read_subject(a), read_subject(b)
    if isinstance(first, Plan) and isinstance(second, Plan):
        return diff_plans(plan_facts(Path(a), first), plan_facts(Path(b), second))
    if isinstance(first, Manifest) and isinstance(second, Manifest):
        return diff_artifacts(artifact_facts(Path(a), first), artifact_facts(Path(b), second))
    raise SubjectError(
        f"{a} and {b}",
        expected="two plans or two artifacts",
        got=f"{kind_in_words(first)} and {kind_in_words(second)}",
        fix="Give two of one kind; `calicache inspect` shows one of any kind.",
    )
