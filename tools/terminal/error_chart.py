"""Errors on a logarithmic axis, drawn with characters for a terminal or a file."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotext
from rich.text import Text

Points = Sequence[tuple[float, float]]

_MOST_TICKS = 8
# For terminals and files that cannot take the box characters of the chart.
_PLAIN = str.maketrans("┌┐└┘├┤┬┴┼─│", "+++++++++-|")


def draw_errors(
    series: Sequence[tuple[str, Points]], across: Sequence[float], width: int, height: int
) -> str:
    """Draw points of (place, error) over ticks at places; later series cover earlier ones.

    Args:
        series: a marker and its points, whose errors are above 0; some may be empty, not all.
        across: ticks of the axis of places, from its start to its end.
        width: in characters.
        height: in lines.
    """
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


def chart_text(chart: str, *, ascii_only: bool) -> Text:
    """The chart in characters that the console can show."""
    return Text(chart.translate(_PLAIN) if ascii_only else chart, no_wrap=True)


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
