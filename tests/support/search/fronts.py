"""Fronts made by hand, for tests of what is done with one."""

from __future__ import annotations

from collections.abc import Sequence

from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.front import ErrorSummary, Front, FrontPoint
from calicache.graph_passes.settings.schedule import output_table, spread_schedule


def front_of(costs: Sequence[float], errors: Sequence[float], choice: int, steps: int = 6) -> Front:
    """Points with more and more REFRESH steps, FORECAST and CALIBRATE in turn between them."""
    points = []
    for place, (cost, error) in enumerate(zip(costs, errors, strict=True)):
        mode = StepMode.FORECAST if place % 2 else StepMode.CALIBRATE
        schedule = spread_schedule(steps, min(place + 2, steps), mode=mode)
        order = place % 3
        summary = ErrorSummary.of([0.9 * error, error, 1.2 * error])
        table = tuple((*row, 0.0) for row in output_table(schedule, order))
        points.append(FrontPoint(cost, summary, schedule, order, (), {}, table))
    held_out = ErrorSummary.of([0.02, 0.03])
    return Front("MACs", "budget 0.5", "hidden_states", tuple(points), choice, held_out)
