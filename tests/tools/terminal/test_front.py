"""The chart and the table of a front: every point, on terminals of all kinds."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console, Group
from support.search.fronts import front_of

from calicache.graph_passes.settings.front import Front
from calicache.tools.terminal.error_chart import axis_ticks
from calicache.tools.terminal.front import describe_point, front_chart, front_lines, front_shapes

COSTS, ERRORS = (0.21, 0.4, 0.52, 0.93), (0.31, 0.042, 0.0071, 0.0002)


def whole(front: Front) -> Group:
    """What is printed of a front."""
    return Group(*front_lines(front), *front_shapes(front))


def printed(shown: object, width: int = 80, encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=file, width=width, highlight=False).print(shown)
    file.flush()
    return raw.getvalue().decode(encoding).splitlines()


def marks(lines: list[str], mark: str) -> list[tuple[int, int]]:
    """Column and row of every mark inside the frame."""
    rows = [re.split("[│┤]", line) for line in lines]
    inside = [row[1] for row in rows if len(row) == 3]
    points = ((x, y) for y, line in enumerate(inside) for x, c in enumerate(line) if c == mark)
    return sorted(points)


def test_chart_has_every_point_and_falls() -> None:
    lines = printed(front_chart(front_of(COSTS, ERRORS, choice=2)))
    others, choices = marks(lines, "*"), marks(lines, "O")
    assert len(choices) == 1
    places = sorted(others + choices)
    assert places.index(choices[0]) == 2
    rows = [y for _, y in places]
    assert rows == sorted(rows)
    assert "O taken, * the others" in lines


def test_chart_is_logarithmic() -> None:
    lines = printed(front_chart(front_of((0.2, 0.3, 0.4), (1.0, 0.01, 0.0001), choice=0)))
    rows = [y for _, y in sorted(marks(lines, "*") + marks(lines, "O"))]
    assert abs((rows[1] - rows[0]) - (rows[2] - rows[1])) <= 1


@pytest.mark.parametrize("width", [40, 80, 120])
def test_chart_is_as_wide_as_the_terminal(width: int) -> None:
    lines = printed(front_chart(front_of(COSTS, ERRORS, choice=0)), width)
    assert max(map(len, lines)) == width


@pytest.mark.parametrize(
    ("costs", "errors"),
    [((0.5,), (0.0123,)), ((0.5,), (0.01,)), ((0.31, 0.32), (0.0105, 0.0101)), ((1.0,), (1.0,))],
)
def test_chart_of_few_or_close_points(costs: tuple[float, ...], errors: tuple[float, ...]) -> None:
    lines = printed(front_chart(front_of(costs, errors, choice=0)))
    assert len(marks(lines, "O")) == 1


def test_point_without_error_is_left_out_of_the_chart() -> None:
    front = front_of((0.5, 1.0), (0.01, 0.0), choice=1)
    lines = printed(front_chart(front))
    assert len(marks(lines, "*")) == 1
    assert not marks(lines, "O")
    assert lines[-1].endswith("points without error are left out")
    only = front_of((1.0,), (0.0,), choice=0)
    assert printed(front_chart(only)) == ["no point has an error"]


def test_chart_is_drawn_anew_every_time() -> None:
    front = front_of(COSTS, ERRORS, choice=1)
    first = printed(front_chart(front))
    printed(front_chart(front_of((0.1, 0.9), (1.0, 1e-6), choice=0)), width=50)
    assert printed(front_chart(front)) == first


def test_everything_prints_where_box_characters_do_not() -> None:
    lines = printed(whole(front_of(COSTS, ERRORS, choice=2)), encoding="latin-1")
    assert any("+----" in line for line in lines)


def test_table_and_chart_fit_80_columns() -> None:
    costs = [0.02 * k for k in range(1, 51)]
    errors = [math.exp(-k / 3) for k in range(50)]
    front = front_of(costs, errors, choice=49, steps=210)
    assert max(map(len, printed(whole(front)))) <= 80
    assert max(map(len, printed(describe_point(front, searched=True)))) <= 80


def test_held_out_error_is_that_of_the_searched_point_alone() -> None:
    front = front_of(COSTS, ERRORS, choice=2)
    assert "held-out error" in "\n".join(printed(describe_point(front, searched=True)))
    assert "held-out error" not in "\n".join(printed(describe_point(front, searched=False)))


@pytest.mark.parametrize(
    ("smallest", "largest", "ticks"),
    [
        (0.011, 0.017, [0.01, 0.02]),
        (0.01, 0.01, [0.01, 0.02]),
        (0.0123, 0.0123, [0.01, 0.02]),
        (0.003, 0.3, [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]),
        (0.0002, 0.31, [0.0001, 0.001, 0.01, 0.1, 1.0]),
        (1.0, 1.0, [1.0, 2.0]),
    ],
)
def test_ticks_are_round_and_around_the_range(
    smallest: float, largest: float, ticks: list[float]
) -> None:
    assert axis_ticks(smallest, largest) == ticks
