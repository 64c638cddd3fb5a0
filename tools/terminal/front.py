"""The front of a plan search as text for a terminal: table, schedules, chart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.front import CONFIDENCE, ErrorSummary, Front, FrontPoint
from calicache.tools.terminal.error_chart import ErrorChart
from calicache.tools.terminal.text import fact_grid, schedule_strip, title

_POINT, _CHOICE = "*", "O"
_PERCENT = f"{100 * CONFIDENCE:g} %"
_LETTERS = next(schedule_strip(tuple(StepMode))).plain.split()[1]
_CHART_HEIGHT = 18


def front_lines(front: Front) -> Iterator[RenderableType]:
    """The front that a plan was searched with: what was asked for, and all points."""
    yield title("Front of the search that made it")
    yield fact_grid(
        [
            ("asked for", front.request),
            ("cost", f"share of the full run, {_unit(front)}"),
            ("error", "relative L2 of the final latents against the full run's"),
            ("taken", f"point {front.choice}"),
            *_held_out(front, " at the point that the search took"),
        ]
    )
    yield front_table(front)


def front_shapes(front: Front) -> Iterator[RenderableType]:
    """The schedules of all points, and a chart of them."""
    yield title("Schedules of its points")
    yield from _schedules(front.points)
    yield title("Error against cost")
    yield front_chart(front)


def describe_point(front: Front, *, searched: bool) -> RenderableType:
    """The point that a plan has taken: its schedule, cost and errors.

    Args:
        front: with the point.
        searched: the search itself took it, so that the held-out error is its own.
    """
    point = front.points[front.choice]
    return Group(
        Text("Schedule", style="bold"),
        *schedule_strip(point.schedule),
        Text(""),
        fact_grid(
            [
                ("asked for", front.request),
                ("steps", f"{point.label}, order {point.order}"),
                ("cost", f"{point.cost:.3f} of the full run, {_unit(front)}"),
                ("error", _in_words(point.error)),
                *(_held_out(front) if searched else ()),
                ("point", f"{front.choice} of 0 .. {len(front.points) - 1} on the front"),
            ]
        ),
    )


def _held_out(front: Front, where: str = "") -> Iterator[tuple[str, str]]:
    """Name and value of the held-out error, where there is one."""
    if front.held_out is not None:
        yield "held-out error", _in_words(front.held_out) + where


def _unit(front: Front) -> str:
    return "in MACs" if front.unit == "MACs" else f"in seconds of {front.unit}"


def _in_words(error: ErrorSummary) -> str:
    if error.samples == 1:
        return f"{error.mean:.3g} (1 sample; what new ones stay below is unknown)"
    return (
        f"{error.mean:.3g} ± {error.deviation:.2g}, {_PERCENT} of new samples below "
        f"{error.bound:.3g} ({error.samples} samples, worst {error.worst:.3g})"
    )


def front_table(front: Front) -> Table:
    """Cost, error, order and steps by mode of every point; the one that is taken is marked."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for column in ("point", "cost", "error ± deviation", f"{_PERCENT} bound", "order", *_LETTERS):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for place, point in enumerate(front.points):
        error, chosen = point.error, place == front.choice
        table.add_row(
            str(place),
            f"{point.cost:.3f}",
            f"{error.mean:.3g} ± {error.deviation:.2g}",
            f"{error.bound:.3g}" if error.samples > 1 else "unknown",
            str(point.order),
            *(str(point.schedule.count(mode) or "-") for mode in StepMode),
            "< taken" if chosen else "",
            style="bold" if chosen else None,
        )
    return table


def _schedules(points: Sequence[FrontPoint]) -> Iterator[RenderableType]:
    legend = Text()
    for place, point in enumerate(points):
        *lines, legend = schedule_strip(point.schedule)
        yield Text(f"point {place}, cost {point.cost:.3f}, error {point.error.mean:.3g}")
        yield from lines
    yield legend


def front_chart(front: Front) -> ErrorChart:
    """Error on a logarithmic axis against cost."""
    points = [(point.cost, point.error.mean) for point in front.points]
    costs = [cost for cost, error in points if error > 0] or [0.0]
    left = math.floor(round(10 * min(costs), 6))
    right = math.ceil(round(10 * max(costs), 6))
    tenths = [place / 10 for place in range(left, max(right, left + 1) + 1)]
    series = [(_POINT, points), (_CHOICE, [points[front.choice]])]
    legend = f"{_CHOICE} taken, {_POINT} the others"
    return ErrorChart(series, tenths, _CHART_HEIGHT, legend, "point")
