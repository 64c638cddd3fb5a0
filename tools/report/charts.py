"""The charts of a report, drawn by Plotly; colours are those of the step modes everywhere."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.front import Front
from calicache.tools.compare.comparison import Comparison
from calicache.tools.compare.operators import OperatorTime
from calicache.tools.inspect.artifact import ArtifactFacts, ModeFacts
from calicache.tools.report.data import EnergyCurve, PlanPoint, ReportData

COLOURS = {
    StepMode.REFRESH: "#d1495b",
    StepMode.CALIBRATE: "#e0a030",
    StepMode.REUSE: "#3a9e5c",
    StepMode.FORECAST: "#2e86ab",
}
_FAINTEST = 1e-8  # below this an error is rounding
_MOST_OPERATORS = 8

_LOGARITHMS = {"type": "log", "exponentformat": "power"}  # of an axis

Chart = dict[str, Any]


def report_charts(data: ReportData) -> dict[str, tuple[Chart, ...]]:
    """The charts of every section that shows something, by its name."""
    facts, comparison = data.facts, data.comparison
    modes: Sequence[ModeFacts] = facts.modes if isinstance(facts, ArtifactFacts) else ()
    charts: dict[str, tuple[Chart, ...]]
    charts = {"schedule": (schedule_chart(facts.schedule.modes, modes),)}
    if data.front is not None or data.points:
        charts["tradeoff"] = (tradeoff_chart(data.front, data.points),)
    if comparison is not None and comparison.no_steps is None:
        charts["steps"] = (step_error_chart(comparison), time_chart(comparison))
    if data.curves:
        charts["energy"] = (energy_chart(data.curves),)
    if isinstance(facts, ArtifactFacts):
        charts["cost"] = (cost_chart(facts),)
    if data.operators is not None:
        charts["operators"] = (operator_chart(data.operators),)
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
    chart = _chart(bars, "step", "MACs, share of the plain step", barmode="overlay", height=260)
    chart["layout"]["xaxis"]["range"] = [-0.6, len(schedule) - 0.4]
    return chart


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
    return _chart(bars, "ms of one step", "", barmode="stack", height=420)


def cost_chart(facts: ArtifactFacts) -> Chart:
    """MACs of one step by mode beside the plain step's."""
    names = ["plain", *(mode.mode.name for mode in facts.modes)]
    macs = [facts.manifest.plain_macs, *(mode.macs for mode in facts.modes)]
    colours = ["#888", *(COLOURS[mode.mode] for mode in facts.modes)]
    bar = _trace("bar", "MACs", names, macs, "%{x}<br>%{y:.3s} MACs", marker={"color": colours})
    return _chart([bar], "", "MACs of one call", {"exponentformat": "SI"})


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


def tradeoff_chart(front: Front | None, measured: Sequence[PlanPoint]) -> Chart:
    """Error against cost: what a search found, and this plan, searched and measured."""
    traces = []
    if front is not None:
        points, taken = front.points, front.points[front.choice]
        found = _trace(
            "scatter",
            "found by the search",
            [point.cost for point in points],
            [max(point.error.mean, _FAINTEST) for point in points],
            f"%{{text}}<br>cost %{{x:.3f}} in {front.unit}, error %{{y:.3g}}",
            mode="lines+markers",
            line={"color": "#888"},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [max(0.0, point.error.worst - point.error.mean) for point in points],
                "arrayminus": [0.0 for _ in points],
            },
            marker={"size": 9},
            text=[f"point {k}: {point.label}" for k, point in enumerate(points)],
        )
        traces += [found, _place("this plan in the search", taken.cost, taken.error.mean, "circle")]
    symbols = ("diamond", "star")
    traces += [
        _place(point.name, point.share, point.error, symbol)
        for point, symbol in zip(measured, symbols, strict=False)
    ]
    full = {"type": "line", "x0": 1, "x1": 1, "yref": "paper", "y0": 0, "y1": 1}
    dotted = {**full, "line": {"dash": "dot", "color": "#888"}}
    chart = _chart(traces, "cost, share of the full run", "error", _LOGARITHMS, shapes=[dotted])
    costs = [cost for trace in traces for cost in trace["x"]]
    chart["layout"]["xaxis"]["range"] = [0, 1.05 * max(1.0, *costs)]
    return chart


def _place(name: str, share: float, error: float, symbol: str) -> Chart:
    """Where this plan is, as a marker of its own."""
    hover = f"{name}<br>cost %{{x:.3f}}, error %{{y:.3g}}"
    marker = {"size": 16, "symbol": symbol}
    errors = [max(error, _FAINTEST)]
    return _trace("scatter", name, [share], errors, hover, mode="markers", marker=marker)


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
        "xaxis": {"title": {"text": x}, "automargin": True},
        "yaxis": {"title": {"text": y}, "automargin": True, **(axis or {})},
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "height": 360,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        **more,
    }
    chart = {"data": list(data), "layout": layout}
    json.dumps(chart, allow_nan=False)  # what no browser could read is a defect here
    return chart
