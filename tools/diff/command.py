"""`calicache diff`: what differs between two plans, or between two artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calicache.graph_passes.common.errors import SubjectError
from calicache.tools.diff.artifacts import diff_artifacts
from calicache.tools.diff.difference import Difference, difference_json
from calicache.tools.diff.plans import diff_plans
from calicache.tools.diff.view import describe_difference
from calicache.tools.terminal.options import Json, show
from calicache.tools.terminal.subject import ArtifactSubject, PlanSubject, read_subject

DIFFERENT = 3  # exit code; 1 is for what is refused


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="The folder of a plan or an artifact.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another of the same kind.")],
    json: Json = False,
) -> None:
    """Print what differs between two plans, or between two artifacts, in cost and structure.

    Example: calicache diff out/plan out/other-plan

    Exit codes: 0 where they are equal, 3 where they differ, 1 for what cannot be compared.
    """
    difference = diff_subjects(a, b)
    if json:
        typer.echo(difference_json(difference))
    else:
        show(describe_difference(difference))
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
    if isinstance(first, PlanSubject) and isinstance(second, PlanSubject):
        return diff_plans(first, second)
    if isinstance(first, ArtifactSubject) and isinstance(second, ArtifactSubject):
        return diff_artifacts(first, second)
    raise SubjectError(
        f"{a} and {b}",
        expected="two plans or two artifacts",
        got=f"{first.kind} and {second.kind}",
        fix="Give two of one kind; `calicache inspect` shows one of any kind.",
    )
