"""The charts of a report, drawn by Plotly; colours are those of the step modes everywhere."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.front import Front
from calicache.tools.compare.comparison import Comparison
from calicache.tools.compare.operators import OperatorTime
from calicache.tools.compare.site_errors import SiteErrors
from calicache.tools.inspect.artifact import ArtifactFacts, ModeFacts
from calicache.tools.report.data import EnergyCurve, ReportData
from calicache.tools.terminal.options import import_library

COLOURS = {
    StepMode.REFRESH: "#d1495b",
    StepMode.CALIBRATE: "#e0a030",
    StepMode.REUSE: "#3a9e5c",
    StepMode.FORECAST: "#2e86ab",
}
_FAINTEST = 1e-8  # below this an error is rounding
_MOST_OPERATORS = 8
_ROW, _AROUND = 22, 140  # pixels

_LOGARITHMS = {"type": "log", "exponentformat": "power"}  # of an axis

Chart = dict[str, Any]


def plotly_script() -> str:
    """Plotly's own JavaScript, for a page that works offline.

    Raises:
        LibraryError: plotly is missing.
    """
    offline = import_library("plotly.offline", "plotly", "draws the charts")
    return str(offline.get_plotlyjs())


def report_charts(data: ReportData) -> dict[str, tuple[Chart, ...]]:
    """The charts of every section that shows something, by its name."""
    facts, comparison = data.facts, data.comparison
    modes: Sequence[ModeFacts] = facts.modes if isinstance(facts, ArtifactFacts) else ()
    charts: dict[str, tuple[Chart, ...]]
    charts = {"schedule": (schedule_chart(facts.schedule.modes, modes),)}
    if data.errors is not None:
        charts["errors"] = (site_error_chart(data.errors),)
    if comparison is not None and comparison.no_steps is None:
        charts["steps"] = (step_error_chart(comparison), time_chart(comparison))
    if data.curves:
        charts["energy"] = (energy_chart(data.curves),)
    if isinstance(facts, ArtifactFacts):
        charts["cost"] = (cost_chart(facts),)
    if data.operators is not None:
        charts["operators"] = (operator_chart(data.operators),)
    if data.front is not None:
        charts["front"] = (front_chart(data.front),)
    return charts


def schedule_chart(schedule: Sequence[StepMode], modes: Sequence[ModeFacts]) -> Chart:
    """What every step does: its height is its share of the plain model's MACs, where known."""
    shares = {facts.mode: facts.share for facts in modes}
    places = {mode: [k for k, other in enumerate(schedule) if other is mode] for mode in StepMode}
    bars = [
        _trace(
            "bar",
            mode.name,
            steps,
            [shares.get(mode, 1.0)] * len(steps),
            f"step %{{x}}: {mode.name}<br>%{{y:.3f}} of the plain MACs",
            width=0.9,  # by itself a bar is as wide as its own mode's steps are apart
            marker={"color": COLOURS[mode]},
        )
        for mode, steps in places.items()
        if steps
    ]
    return _chart(bars, "step", "MACs, share of the plain step", barmode="overlay", height=260)


def site_error_chart(errors: SiteErrors) -> Chart:
    """Relative error by site and step, on a logarithmic colour scale."""
    steps = list(range(len(errors.schedule)))
    values = [
        [None if v is None else math.log10(max(v, _FAINTEST)) for v in row] for row in errors.errors
    ]
    texts = [
        [
            f"{site}<br>step {k}: {errors.schedule[k].name}<br>"
            + ("not computed" if value is None else f"relative error {value:.3g}")
            for k, value in zip(steps, row, strict=True)
        ]
        for site, row in zip(errors.sites, errors.errors, strict=True)
    ]
    known = [v for row in values for v in row if v is not None]
    ticks = list(range(math.floor(min(known)), math.ceil(max(known)) + 1))
    heat = {
        "type": "heatmap",
        "x": steps,
        "y": list(errors.sites),
        "z": values,
        "text": texts,
        "hovertemplate": "%{text}<extra></extra>",
        "hoverongaps": False,
        "colorscale": "Viridis",
        "colorbar": {"tickvals": ticks, "ticktext": [f"1e{tick}" for tick in ticks]},
    }
    axis = {"autorange": "reversed", "automargin": True}
    return _chart([heat], "step", "", axis, height=_AROUND + _ROW * len(errors.sites))


def step_error_chart(comparison: Comparison) -> Chart:
    """Error of the latent after every step: mean over samples, and the worst sample."""
    seen = [step for step in comparison.steps if step.error is not None]
    lines = [
        _trace(
            "scatter",
            name,
            [step.step for step in seen],
            [getattr(step.error, field) for step in seen],
            f"after step %{{x}}, %{{text}}<br>{name} %{{y:.3g}}",
            mode="lines+markers",
            marker={"color": [COLOURS[step.mode] for step in seen], "size": 8},
            line={"color": "#888", "dash": dash},
            text=[step.mode.name for step in seen],
        )
        for name, field, dash in (("mean", "mean", "solid"), ("worst sample", "worst", "dot"))
    ]
    return _chart(lines, "step", "relative error of the latent", _LOGARITHMS)


def time_chart(comparison: Comparison) -> Chart:
    """Milliseconds of every step, full and optimised."""
    timed = [step for step in comparison.steps if step.cached_seconds is not None]
    steps = [step.step for step in timed]
    bars = _trace(
        "bar",
        "optimised",
        steps,
        [1e3 * (step.cached_seconds or 0.0) for step in timed],
        "step %{x}, %{text}<br>%{y:.1f} ms",
        marker={"color": [COLOURS[step.mode] for step in timed]},
        text=[step.mode.name for step in timed],
        textposition="none",
    )
    line = _trace(
        "scatter",
        "full model",
        steps,
        [1e3 * (step.full_seconds or 0.0) for step in timed],
        "step %{x}, full model<br>%{y:.1f} ms",
        mode="lines",
        line={"color": "#888"},
    )
    return _chart([bars, line], "step", "ms")


def operator_chart(operators: Sequence[OperatorTime]) -> Chart:
    """Milliseconds of one step by mode and operator, the slowest ones by name."""
    totals: dict[str, float] = defaultdict(float)
    for entry in operators:
        totals[entry.operator] += entry.milliseconds
    named = sorted(totals, key=lambda name: -totals[name])[:_MOST_OPERATORS]
    spent: dict[str, dict[str, float]] = {name: {} for name in (*named, "others")}
    for entry in operators:
        by_mode = spent[entry.operator if entry.operator in named else "others"]
        by_mode[entry.mode] = by_mode.get(entry.mode, 0.0) + entry.milliseconds
    bars = [
        _trace(
            "bar",
            name,
            list(by_mode.values()),
            list(by_mode),
            f"{name}<br>%{{y}}: %{{x:.2f}} ms",
            orientation="h",
        )
        for name, by_mode in spent.items()
    ]
    return _chart(bars, "ms of one step", "", {"automargin": True}, barmode="stack")


def cost_chart(facts: ArtifactFacts) -> Chart:
    """MACs of one step by mode beside the plain step's."""
    names = ["plain", *(mode.mode.name for mode in facts.modes)]
    macs = [facts.manifest.plain_macs, *(mode.macs for mode in facts.modes)]
    colours = ["#888", *(COLOURS[mode.mode] for mode in facts.modes)]
    bar = _trace("bar", "MACs", names, macs, "%{x}<br>%{y:.3s} MACs", marker={"color": colours})
    return _chart([bar], "", "MACs of one call")


def energy_chart(curves: Sequence[EnergyCurve]) -> Chart:
    """Energy that is left out by rank, one line a target, a marker at the plan's rank."""
    lines = [
        _trace(
            "scatter",
            curve.target,
            list(curve.kept),
            [max(1.0 - kept, _FAINTEST) for kept in curve.kept.values()],
            f"{curve.target}<br>rank %{{x}}: %{{y:.3g}} left out",
            mode="lines+markers",
            marker={"size": [10 if rank == curve.rank else 0 for rank in curve.kept]},
        )
        for curve in curves
    ]
    return _chart(lines, "rank", "share of the energy left out", _LOGARITHMS)


def front_chart(front: Front) -> Chart:
    """Error against cost of a search's points, the taken one larger."""
    points, chosen = front.points, front.points[front.choice]
    dots = _trace(
        "scatter",
        "points",
        [point.cost for point in points],
        [max(point.error.mean, _FAINTEST) for point in points],
        "%{text}<br>cost %{x:.3f}, error %{y:.3g}",
        mode="lines+markers",
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [max(0.0, point.error.worst - point.error.mean) for point in points],
            "arrayminus": [0.0 for _ in points],
        },
        marker={"size": [16 if point is chosen else 9 for point in points]},
        text=[f"point {k}: {point.label}" for k, point in enumerate(points)],
    )
    return _chart([dots], f"cost, share of the full run ({front.unit})", "error", _LOGARITHMS)


def _trace(
    kind: str, name: str, x: Sequence[Any], y: Sequence[Any], hover: str, **more: Any
) -> Chart:
    """One trace of a chart; `hover` is what pointing at it shows."""
    hover = f"{hover}<extra></extra>"
    return {"type": kind, "name": name, "x": x, "y": y, "hovertemplate": hover, **more}


def _chart(
    data: Sequence[Chart], x: str, y: str, axis: Mapping[str, Any] | None = None, **more: Any
) -> Chart:
    """A chart of traces; `axis` is what is said of that of y, `more` of the layout."""
    layout = {
        "xaxis": {"title": {"text": x}},
        "yaxis": {"title": {"text": y}, **(axis or {})},
        "margin": {"l": 70, "r": 20, "t": 20, "b": 50},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "height": 360,
        "legend": {"orientation": "h", "y": -0.25},
        **more,
    }
    chart = {"data": list(data), "layout": layout}
    json.dumps(chart, allow_nan=False)  # what no browser could read is a defect here
    return chart
