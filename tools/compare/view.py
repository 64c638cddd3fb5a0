"""A comparison as text for a terminal, and as plain data for JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from calicache.graph_passes.settings.choices import STEP_LETTERS, StepMode
from calicache.graph_passes.settings.front import ErrorSummary
from calicache.tools.compare.comparison import Comparison
from calicache.tools.compare.image_grid import ImageGrid
from calicache.tools.compare.image_measures import ImageMeasures
from calicache.tools.terminal.error_chart import chart_text, draw_errors
from calicache.tools.terminal.text import fact_grid, plain_table

_CHART_HEIGHT, _MOST_TICKS = 16, 10
_TENSORS = ("full", "cached", "pictures")


def describe_comparison(comparison: Comparison, grid: ImageGrid | None = None) -> RenderableType:
    """Everything `calicache compare` prints, top to bottom."""
    parts: list[RenderableType] = [
        Text("Full and optimised runs side by side", style="bold"),
        _facts(comparison, grid),
    ]
    if comparison.no_steps is None:
        parts += [
            Text("\nSteps", style="bold"),
            _step_table(comparison),
            Text("\nSteps by mode", style="bold"),
            _mode_table(comparison),
        ]
    parts += [Text("\nWhole run", style="bold"), _total_table(comparison)]
    if comparison.no_steps is None:
        parts += [Text("\nError of the latent after every step", style="bold")]
        parts += [ErrorChart(comparison)]
    return Group(*parts)


def comparison_data(comparison: Comparison, grid: ImageGrid | None = None) -> dict[str, Any]:
    """Everything but the results themselves, for JSON; numbers that are not finite are None."""
    data: dict[str, Any] = {
        field.name: _plain(getattr(comparison, field.name))
        for field in dataclasses.fields(comparison)
        if field.name not in _TENSORS
    }
    return {**data, "speedup": _plain(comparison.speedup), "grid": _plain(grid)}


def _plain(value: Any) -> Any:
    if isinstance(value, StepMode):
        return value.name
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value)


def _facts(comparison: Comparison, grid: ImageGrid | None) -> Table:
    error = comparison.final
    facts = [
        ("runs", f"{comparison.runs}, {comparison.samples} samples, {_length(comparison)}"),
        ("artifact", f"layout {comparison.layout}, {comparison.provider}"),
        ("MACs", f"{comparison.macs_share:.3f} of the full run"),
        ("time", _time_in_words(comparison)),
        ("final error", f"{_in_words(error)}, relative L2 of the recorded result"),
        *_measures(comparison.measures, comparison.no_measures),
    ]
    if comparison.no_steps is not None:
        facts.append(("not shown", comparison.no_steps))
    if grid is not None:
        shown = f"first {grid.columns} samples; rows full, cached, difference x {grid.factor}"
        facts.append(("image grid", f"{grid.path}: {shown}"))
    return fact_grid(facts)


def _length(comparison: Comparison) -> str:
    counts = [(comparison.schedule.count(mode), mode.name) for mode in StepMode]
    return " + ".join(f"{count} {name}" for count, name in counts if count)


def _in_words(error: ErrorSummary) -> str:
    return f"mean {error.mean:.3g}, worst {error.worst:.3g}"


def _time_in_words(comparison: Comparison) -> str:
    if comparison.full_seconds is None:
        return f"{_milliseconds(comparison.cached_seconds)} ms a run"
    share = comparison.cached_seconds / comparison.full_seconds
    return f"{share:.3f} of the full run"


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


def _step_table(comparison: Comparison) -> Table:
    table = plain_table(("step", "mode"), ("error", "worst", "full ms", "cached ms"))
    for row in comparison.steps:
        assert row.error is not None
        table.add_row(
            str(row.step),
            row.mode.name,
            f"{row.error.mean:.3g}",
            f"{row.error.worst:.3g}",
            _milliseconds(row.full_seconds),
            _milliseconds(row.cached_seconds),
        )
    return table


def _mode_table(comparison: Comparison) -> Table:
    table = plain_table(("mode",), ("steps", "full ms", "cached ms", "of full"))
    for row in comparison.modes:
        times = (row.full_seconds, row.cached_seconds)
        table.add_row(
            row.mode.name, str(row.steps), *map(_milliseconds, times), _share(*reversed(times))
        )
    return table


def _total_table(comparison: Comparison) -> Table:
    table = plain_table(("model",), ("ms a run", "of full"))
    full = comparison.full_seconds
    if full is not None:
        table.add_row("full, ONNX Runtime", _milliseconds(full), "1.000")
    cached = comparison.cached_seconds
    table.add_row("optimised, ONNX Runtime", _milliseconds(cached), _share(cached, full))
    made = comparison.torch_seconds
    if made is not None:
        table.add_row("full, torch", _milliseconds(made), _share(made, full))
    return table


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.4g}"


def _share(part: float | None, whole: float | None) -> str:
    return "-" if part is None or not whole else f"{part / whole:.3f}"


class ErrorChart:
    """Mean error after every step on a logarithmic axis, each with the letter of its mode.

    Args:
        comparison: steps without an error, or with none that is finite, are left out.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it for the width and encoding that the console has."""
        seen = [
            (row.step, row.mode, row.error.mean)
            for row in self.comparison.steps
            if row.error is not None and 0 < row.error.mean < math.inf
        ]
        if not seen:
            yield Text("no step has an error")
            return
        chart = _chart(seen, len(self.comparison.steps), options.max_width)
        names = (f"{STEP_LETTERS[mode]} {mode.name.lower()}" for mode in StepMode)
        chart += f"\n{', '.join(names)}"
        if len(seen) < len(self.comparison.steps):
            chart += "; steps without error are left out"
        yield chart_text(chart, ascii_only=options.ascii_only)


def _chart(seen: Sequence[tuple[int, StepMode, float]], steps: int, width: int) -> str:
    apart = max(1, math.ceil((steps - 1) / _MOST_TICKS))
    last = max(1, apart * math.ceil((steps - 1) / apart))
    places = list(range(0, last + 1, apart))
    series = [
        (STEP_LETTERS[mode], [(step, error) for step, other, error in seen if other is mode])
        for mode in StepMode
    ]
    return draw_errors(series, places, width, _CHART_HEIGHT)
