"""`calicache take`: the plan of another point of a front."""

from __future__ import annotations

from pathlib import Path

from calicache.graph_passes.api.plan import Plan
from calicache.tools.make.plans import check_plan_output, show_saved


def take(plan: Path, point: int, output: Path) -> None:
    """Take a point, save and show it."""
    check_plan_output(output)
    taken = Plan.load(plan).one(str(plan)).take(point)
    taken.save(output)
    show_saved(taken, output, searched=False)
