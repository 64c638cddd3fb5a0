"""A comparison as text for a terminal, and as plain data for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict

from pydantic import TypeAdapter
from pydantic_core import to_json
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from calicache.graph_passes.settings.choices import STEP_LETTERS, StepMode
from calicache.graph_passes.settings.schedule import count_modes
from calicache.tools.compare.comparison import Comparison
from calicache.tools.compare.pictures import ImageGrid, ImageMeasures
from calicache.tools.terminal.error_chart import ErrorChart
from calicache.tools.terminal.text import fact_grid, plain_table, title

_CHART_HEIGHT, _MOST_TICKS = 16, 10
_TENSORS = {"full", "cached", "pictures"}
_COMPARISON = TypeAdapter(Comparison)

STEP_COLUMNS = ("step", "mode", "error", "worst", "full ms", "cached ms")


def describe_comparison(comparison: Comparison, grid: ImageGrid | None = None) -> RenderableType:
    """Everything `calicache compare` prints, top to bottom."""
    parts: list[RenderableType] = [
        Text("Full and optimised runs side by side", style="bold"),
        _facts(comparison, grid),
    ]
    if comparison.no_steps is None:
        steps = plain_table(STEP_COLUMNS[:2], STEP_COLUMNS[2:], step_rows(comparison))
        parts += [title("Steps"), steps, title("Steps by mode"), _mode_table(comparison)]
    parts += [title("Whole run"), _total_table(comparison)]
    if comparison.no_steps is None:
        parts += [title("Error of the latent after every step"), error_chart(comparison)]
    return Group(*parts)


def comparison_json(comparison: Comparison, grid: ImageGrid | None = None) -> str:
    """Everything but the results themselves; numbers that are not finite are null."""
    content = _COMPARISON.dump_python(comparison, mode="json", exclude=_TENSORS)
    shown = None if grid is None else {**asdict(grid), "path": str(grid.path)}
    return to_json({**content, "grid": shown}, indent=2, inf_nan_mode="null").decode()


def _facts(comparison: Comparison, grid: ImageGrid | None) -> Table:
    error = f"mean {comparison.final.mean:.3g}, worst {comparison.final.worst:.3g}"
    runs = f"{comparison.runs}, {comparison.samples} samples"
    facts = [
        ("runs", f"{runs}, {count_modes(comparison.schedule)}"),
        ("artifact", f"layout {comparison.layout}, {comparison.provider}"),
        ("MACs", f"{comparison.macs_share:.3f} of the full run"),
        ("time", f"{1 / comparison.speedup:.3f} of the full run"),
        ("final error", f"{error}, relative L2 of the recorded result"),
        *_measures(comparison.measures, comparison.no_measures),
    ]
    if comparison.no_steps is not None:
        facts.append(("not shown", comparison.no_steps))
    if grid is not None:
        shown = f"first {grid.columns} samples; rows full, cached, difference x {grid.factor}"
        facts.append(("image grid", f"{grid.path}: {shown}"))
    return fact_grid(facts)


def _measures(measures: ImageMeasures | None, reason: str | None) -> Iterator[tuple[str, str]]:
    if measures is None:
        yield "PSNR, SSIM", f"none: {reason}"
        return
    of = f"of {measures.kind}, data range {measures.data_range:g} ({measures.scale})"
    yield "PSNR", f"mean {measures.psnr_mean:.2f} dB, worst {measures.psnr_worst:.2f} dB, {of}"
    if measures.ssim_mean is None:
        yield "SSIM", "none: its window of 11 pixels does not fit into them"
    else:
        yield "SSIM", f"mean {measures.ssim_mean:.4f}, worst {measures.ssim_worst:.4f}"


def step_rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    """The cells below `STEP_COLUMNS`."""
    for row in comparison.steps:
        errors = () if row.error is None else (row.error.mean, row.error.worst)
        yield (
            str(row.step),
            row.mode.name,
            *([f"{error:.3g}" for error in errors] or ("-", "-")),
            _milliseconds(row.full_seconds),
            _milliseconds(row.cached_seconds),
        )


def _mode_table(comparison: Comparison) -> Table:
    rows = (
        (
            row.mode.name,
            str(row.steps),
            _milliseconds(row.full_seconds),
            _milliseconds(row.cached_seconds),
            _share(row.cached_seconds, row.full_seconds),
        )
        for row in comparison.modes
    )
    return plain_table(("mode",), ("steps", "full ms", "cached ms", "of full"), rows)


def _total_table(comparison: Comparison) -> Table:
    full, cached = comparison.full_seconds, comparison.cached_seconds
    names = ("full, ONNX Runtime", "optimised, ONNX Runtime")
    rows = [
        (name, _milliseconds(seconds), _share(seconds, full))
        for name, seconds in zip(names, (full, cached), strict=True)
    ]
    return plain_table(("model",), ("ms a run", "of full"), rows)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.4g}"


def _share(part: float | None, whole: float | None) -> str:
    return "-" if part is None or not whole else f"{part / whole:.3f}"


def error_chart(comparison: Comparison) -> ErrorChart:
    """Mean error after every step on a logarithmic axis, each with the letter of its mode."""
    last = len(comparison.steps) - 1
    apart = max(1, math.ceil(last / _MOST_TICKS))
    places = range(0, max(1, apart * math.ceil(last / apart)) + 1, apart)
    series = [
        (
            STEP_LETTERS[mode],
            [(s.step, s.error.mean) for s in comparison.steps if s.mode is mode and s.error],
        )
        for mode in StepMode
    ]
    legend = ", ".join(f"{STEP_LETTERS[mode]} {mode.name.lower()}" for mode in StepMode)
    return ErrorChart(series, places, _CHART_HEIGHT, legend, "step")
