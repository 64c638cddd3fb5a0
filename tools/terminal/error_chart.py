"""Errors on a logarithmic axis, drawn with characters for a terminal or a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotext
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

Points = Sequence[tuple[float, float]]

_MOST_TICKS = 8
# For terminals and files that cannot take the box characters of the chart.
_PLAIN = str.maketrans("┌┐└┘├┤┬┴┼─│", "+++++++++-|")


@dataclass(frozen=True, slots=True)
class ErrorChart:
    """Errors over places, as wide as the console, without its colours.

    Attributes:
        series: a marker and its points of (place, error); later series cover earlier ones. Points
            whose error is 0 or not finite have no place on the axis and are left out.
        across: ticks of the axis of places, from its start to its end.
        height: in lines.
        legend: what the markers are.
        what: of what there is a point each, such as `step`.
    """

    series: Sequence[tuple[str, Points]]
    across: Sequence[float]
    height: int
    legend: str
    what: str

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it for the width and encoding that the console has."""
        shown = [
            (marker, [point for point in points if 0 < point[1] < math.inf])
            for marker, points in self.series
        ]
        if not any(points for _, points in shown):
            yield Text(f"no {self.what} has an error")
            return
        chart = f"{_draw(shown, self.across, options.max_width, self.height)}\n{self.legend}"
        if any(
            len(some) < len(points)
            for (_, some), (_, points) in zip(shown, self.series, strict=True)
        ):
            chart += f"; {self.what}s without error are left out"
        yield Text(chart.translate(_PLAIN) if options.ascii_only else chart, no_wrap=True)


def _draw(
    series: Sequence[tuple[str, Points]], across: Sequence[float], width: int, height: int
) -> str:
    # The logarithms are taken here: plotext's own scale drops points where limits are given, and
    # fails on a single point where they are not.
    figure = plotext.figure
    figure.clear()  # the package has one figure for the whole process
    plotext.terminal.limit(False, False)
    figure.plot_size(width, height)
    for marker, points in series:
        shown = [(place, math.log10(error)) for place, error in points]
        if shown:
            figure.draw(figure.signal(*map(list, zip(*shown, strict=True)), marker=marker))
    _ruler("x", across, across)
    errors = [error for _, points in series for _, error in points]
    ticks = axis_ticks(min(errors), max(errors))
    _ruler("y", [math.log10(tick) for tick in ticks], ticks)
    lines = plotext.uncolorize(str(figure.build())).splitlines()
    return "\n".join(line.rstrip() for line in lines).rstrip()


def axis_ticks(smallest: float, largest: float) -> list[float]:
    """1, 2 and 5 times powers of ten around a range above 0; powers alone where it is wide."""
    decades = range(math.floor(math.log10(smallest)) - 1, math.ceil(math.log10(largest)) + 2)
    for mantissas in ((1, 2, 5), (1,)):
        marks = [float(f"{mantissa}e{decade}") for decade in decades for mantissa in mantissas]
        below = max(place for place, mark in enumerate(marks) if mark <= smallest)
        above = min(place for place, mark in enumerate(marks) if mark >= largest)
        above = max(above, below + 1)
        if above - below < _MOST_TICKS:
            break
    return marks[below : above + 1]


def _ruler(axis: str, places: Sequence[float], values: Sequence[float]) -> None:
    ruler = plotext.figure.ruler(axis)
    ruler.lim(places[0], places[-1])
    ruler.ticks(list(places), [f"{value:g}" for value in values])
