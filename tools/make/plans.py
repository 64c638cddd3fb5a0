"""What the commands that write a plan have in common."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.plan_file import PLAN_FILE, PLANS_FILE
from calicache.tools.terminal.front import describe_point
from calicache.tools.terminal.options import check_output
from calicache.tools.terminal.text import show, title


def check_plan_output(output: Path) -> None:
    """Refuse to replace anything but a plan.

    Raises:
        SubjectError: something else is there.
    """
    empty = output.is_dir() and not any(output.iterdir())
    plan = any((output / name).is_file() for name in (PLAN_FILE, PLANS_FILE))
    fits = not output.exists() or empty or plan
    check_output(output, fits, "a new folder, or a plan to replace")


def show_saved(plan: Plan, output: Path, *, searched: bool) -> None:
    """Print the points that a plan has taken, and what can be done with the plan."""
    several = len(plan.plans) > 1
    for name, one in zip(plan.names, plan.plans, strict=True):
        assert one.front is not None
        if several:
            show(title(f"{name} steps"))
        show(describe_point(one.front, searched=searched))
    typer.echo(f"\nPlan written: {output}")
    if several:
        typer.echo(f"It has a recipe for each of {', '.join(plan.names)} steps, a plan by itself:")
    named = shlex.quote(str(output / plan.names[0] if several else output))
    typer.echo(f"The whole front: calicache inspect {named}")
    typer.echo(f"Another point of it: calicache take {named} NUMBER -o OTHER")
    typer.echo(f"For ONNX Runtime: calicache export MODEL {named} -o ARTIFACT")
