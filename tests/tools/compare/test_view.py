"""A comparison as text and as JSON: every number, on terminals of all kinds."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from support.comparisons import FORECAST, C, R, U, comparison_of
from support.golden import assert_golden

from calicache.export import Layout
from calicache.tools.compare.pictures import ImageGrid
from calicache.tools.compare.view import comparison_json, describe_comparison, error_chart

SCHEDULE = (R, C, U, R, FORECAST, C)
ERRORS = (1e-7, 0.002, 0.011, 0.004, 0.05, 0.03)


def printed(shown: object, width: int = 80, encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=file, width=width, highlight=False).print(shown)
    file.flush()
    return [line.rstrip() for line in raw.getvalue().decode(encoding).splitlines()]


def text(shown: object, width: int = 80) -> str:
    return " ".join(" ".join(printed(shown, width)).split())


def marks(lines: list[str]) -> list[tuple[int, int, str]]:
    """Column, row and letter of every mark inside the frame."""
    rows = [re.split("[│┤]", line) for line in lines]
    inside = [row[1] for row in rows if len(row) == 3]
    points = ((x, y, c) for y, line in enumerate(inside) for x, c in enumerate(line) if c in "RCUF")
    return sorted(points)


def test_whole_text_is_the_golden_one() -> None:
    grid = ImageGrid(Path("out/a grid.png"), 4, 20)
    got = "\n".join(printed(describe_comparison(comparison_of(ERRORS, SCHEDULE), grid))) + "\n"
    assert_golden("compare.txt", got)


def test_steps_and_modes_have_their_rows() -> None:
    lines = printed(describe_comparison(comparison_of(ERRORS, SCHEDULE)))
    rows = [line.split() for line in lines]
    assert ["2", "REUSE", "0.0138", "0.0165", "10", "2"] in rows  # mean and worst of 0.011, 0.0165
    assert ["REFRESH", "2", "10", "10", "1.000"] in rows
    assert ["FORECAST", "1", "10", "1", "0.100"] in rows
    assert ["optimised,", "ONNX", "Runtime", "33", "0.550"] in rows


def test_layout_without_steps_says_why() -> None:
    shown = text(describe_comparison(comparison_of(ERRORS, SCHEDULE, layout=Layout.SAMPLER)))
    assert "not shown no steps are seen" in shown
    assert "optimised, ONNX Runtime 33 0.550" in shown
    assert "Steps by mode" not in shown
    assert "Error of the latent" not in shown


def test_missing_measures_say_why() -> None:
    small = text(describe_comparison(comparison_of(ERRORS, SCHEDULE, ssim=None)))
    assert "SSIM none: its window of 11 pixels does not fit into them" in small
    none = replace(comparison_of(ERRORS, SCHEDULE), measures=None, no_measures="no [pictures]")
    assert "PSNR, SSIM none: no [pictures]" in text(describe_comparison(none))


@pytest.mark.parametrize("width", [80, 120])
def test_everything_fits_the_terminal(width: int) -> None:
    steps = 210
    errors = [math.exp(-k / 20) for k in range(steps)]
    grid = ImageGrid(Path("a long folder with spaces/" * 5 + "g.png"), 8, 50000)
    lines = printed(describe_comparison(comparison_of(errors, (R, C, U) * 70), grid), width)
    assert max(map(len, lines)) == width  # the chart's frame
    assert not any("…" in line for line in lines)


def test_chart_has_the_letter_of_every_step_in_order() -> None:
    lines = printed(error_chart(comparison_of(ERRORS, SCHEDULE)))
    points = marks(lines)
    assert [letter for *_, letter in points] == [*"RCURFC"]
    heights = [-y for _, y, _ in points]
    assert heights[0] == min(heights)
    assert heights[4] == max(heights)
    places = [x for x, *_ in points]
    gaps = [b - a for a, b in pairwise(places)]
    assert max(gaps) - min(gaps) <= 1
    assert lines[-1] == "R refresh, C calibrate, U reuse, F forecast"


def test_chart_is_logarithmic() -> None:
    points = marks(printed(error_chart(comparison_of((1e-4, 1e-2, 1.0), (R, C, U)))))
    rows = [y for _, y, _ in points]
    assert abs((rows[1] - rows[0]) - (rows[2] - rows[1])) <= 1
    assert rows[0] > rows[1] > rows[2]


def test_chart_leaves_out_what_has_no_place_and_says_so() -> None:
    lines = printed(error_chart(comparison_of((0.0, 0.1, math.inf, 0.2), (R, C, U, FORECAST))))
    assert [letter for *_, letter in marks(lines)] == ["C", "F"]
    assert lines[-1].endswith("; steps without error are left out")
    assert printed(error_chart(comparison_of((0.0,), (R,)))) == ["no step has an error"]


def test_chart_of_one_step() -> None:
    assert len(marks(printed(error_chart(comparison_of((0.01,), (R,)))))) == 1


def test_chart_prints_where_box_characters_do_not() -> None:
    lines = printed(describe_comparison(comparison_of(ERRORS, SCHEDULE)), encoding="latin-1")
    assert any("+----" in line for line in lines)


def test_chart_is_the_same_after_another() -> None:
    first = printed(error_chart(comparison_of(ERRORS, SCHEDULE)))
    printed(error_chart(comparison_of((1.0, 2.0), (R, C))), width=50)
    assert printed(error_chart(comparison_of(ERRORS, SCHEDULE))) == first


def test_data_has_every_field_but_the_results() -> None:
    data = json.loads(
        comparison_json(comparison_of(ERRORS, SCHEDULE), ImageGrid(Path("g.png"), 4, 20))
    )
    assert sorted(data) == [
        "cached_seconds",
        "environment",
        "final",
        "full_seconds",
        "grid",
        "layout",
        "macs_share",
        "measures",
        "modes",
        "no_measures",
        "no_steps",
        "provider",
        "runs",
        "samples",
        "schedule",
        "speedup",
        "steps",
    ]
    assert data["schedule"] == ["REFRESH", "CALIBRATE", "REUSE", "REFRESH", "FORECAST", "CALIBRATE"]
    assert data["steps"][2]["mode"] == "REUSE"
    assert data["steps"][2]["error"]["worst"] == 1.5 * 0.011
    assert data["grid"] == {"path": "g.png", "columns": 4, "factor": 20}
    assert data["measures"]["kind"] == "images"
    assert data["speedup"] == pytest.approx(60 / 33)


def test_numbers_that_are_not_finite_are_none_in_data() -> None:
    comparison = comparison_of((0.1, math.inf), (R, C))
    data = json.loads(comparison_json(comparison))
    assert data["final"]["mean"] is None
    assert data["steps"][1]["error"]["worst"] is None
    assert data["grid"] is None
