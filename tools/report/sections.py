"""The sections of a report, in the order in which they are read: each answers one question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from calicache.graph_passes.settings.front import CONFIDENCE
from calicache.graph_passes.settings.schedule import count_modes
from calicache.tools.compare.view import STEP_COLUMNS, step_rows
from calicache.tools.inspect.artifact import COST_COLUMNS, ArtifactFacts, ModeFacts, cost_rows
from calicache.tools.report.charts import (
    Chart,
    cost_chart,
    energy_chart,
    front_chart,
    operator_chart,
    schedule_chart,
    site_error_chart,
    step_error_chart,
    time_chart,
)
from calicache.tools.report.data import ReportData
from calicache.tools.terminal.text import format_count

_MOST_ROWS = 400

# One sentence about how to read it, and what it shows.
Shown = tuple[str, tuple[Chart, ...], tuple["DataTable", ...]]


@dataclass(frozen=True, slots=True)
class DataTable:
    """What a chart shows, as text.

    Attributes:
        columns, rows: the cells.
        layers: one of every row, which the page shows in the graph; empty for other tables.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    layers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the page.

    Attributes:
        name: for links, such as `errors`.
        title: a question, or what is shown.
        lead: one sentence about how to read it.
        charts, tables: what it shows.
        missing: why it shows nothing, where it does.
    """

    name: str
    title: str
    lead: str = ""
    charts: tuple[Chart, ...] = ()
    tables: tuple[DataTable, ...] = ()
    missing: str = ""


def report_cards(data: ReportData) -> Iterator[tuple[str, str, str]]:
    """The numbers that are asked for first: name, value, note."""
    facts, comparison = data.facts, data.comparison
    modes = facts.schedule.modes
    yield ("steps", str(len(modes)), count_modes(modes))
    if isinstance(facts, ArtifactFacts):
        yield ("MACs", f"{facts.run_share:.3f}", "of the full run")
        yield ("caches", format_count(facts.cache_bytes, "B"), f"{facts.manifest.history} kept")
    if comparison is not None:
        error = comparison.final
        yield ("error", f"{error.mean:.3g}", f"relative L2, {error.samples} samples")
        if comparison.speedup is not None:
            yield ("time", f"{1 / comparison.speedup:.3f}", "of the full run, measured")
        if comparison.measures is not None:
            yield ("PSNR", f"{comparison.measures.psnr_mean:.1f} dB", "against the full run")
    elif data.errors is not None and data.errors.result is not None:
        yield ("error", f"{data.errors.result:.3g}", "relative L2 of the result")
    if data.front is not None and data.front.held_out is not None:
        held_out = data.front.held_out
        yield ("held-out error", f"{held_out.mean:.3g}", f"{held_out.samples} samples")
    yield ("warnings", str(len(facts.warnings)), "listed below")


def report_sections(data: ReportData) -> tuple[Section, ...]:
    """All sections with charts and tables; graphs and pictures are the page's own."""
    return tuple(_section(data, *entry) for entry in _SECTIONS)


def _section(
    data: ReportData, name: str, title: str, show: Callable[[ReportData], Shown | str]
) -> Section:
    shown = show(data)
    if isinstance(shown, str):
        return Section(name, title, missing=shown)
    return Section(name, title, *shown)


def _schedule(data: ReportData) -> Shown:
    facts = data.facts
    modes: Sequence[ModeFacts] = facts.modes if isinstance(facts, ArtifactFacts) else ()
    rows = tuple((str(k), mode.name) for k, mode in enumerate(facts.schedule.modes))
    lead = "REFRESH runs the whole model and keeps values; the other steps work with them."
    chart = schedule_chart(facts.schedule.modes, modes)
    return lead, (chart,), (DataTable(("step", "mode"), rows),)


def _sites(data: ReportData) -> Shown | str:
    errors = data.errors
    if errors is None:
        return data.missing["errors"]
    columns = ("site", *(str(k) for k in range(len(errors.schedule))))
    rows = tuple(
        (site, *("" if v is None else f"{v:.2g}" for v in row))
        for site, row in zip(errors.sites, errors.errors, strict=True)
    )
    lead = (
        "Relative error of the residual stream after every branch against the full run's, by step. "
        "A step that does not compute a branch leaves a gap."
    )
    return lead, (site_error_chart(errors),), (DataTable(columns, rows),)


def _steps(data: ReportData) -> Shown | str:
    comparison = data.comparison
    if comparison is None:
        return data.missing["comparison"]
    if comparison.no_steps is not None:
        return comparison.no_steps
    lead = (
        "Relative error of the latent after every step; it falls where a step takes back what "
        "earlier ones did wrong."
    )
    charts = (step_error_chart(comparison), time_chart(comparison))
    return lead, charts, (DataTable(STEP_COLUMNS, tuple(step_rows(comparison))),)


def _energy(data: ReportData) -> Shown | str:
    if not data.curves:
        return data.missing.get("curves", "No layer is calibrated.")
    ranks = sorted({2**k for k in range(20)} & {r for c in data.curves for r in c.kept})
    rows = tuple(
        (
            curve.target,
            str(curve.rank),
            f"{curve.kept[curve.rank]:.4f}",
            *(f"{curve.kept[r]:.3f}" if r in curve.kept else "" for r in ranks),
        )
        for curve in data.curves
    )
    columns = ("target", "rank", "kept", *(f"at {rank}" for rank in ranks))
    lead = "Energy of the increments that a branch of a rank leaves out; dots are the plan's."
    table = DataTable(columns, rows, _layers(data) if data.graphs else ())
    return lead, (energy_chart(data.curves),), (table,)


def _layers(data: ReportData) -> tuple[str, ...]:
    """A layer of every calibration target; a plan alone knows targets by their names."""
    targets = data.facts.manifest.targets if isinstance(data.facts, ArtifactFacts) else ()
    first = {target.name: target.sites[0] for target in targets}
    return tuple(first.get(curve.target, curve.target) for curve in data.curves or ())


def _cost(data: ReportData) -> Shown | str:
    facts = data.facts
    if not isinstance(facts, ArtifactFacts):
        return "A plan alone has no costs: report on an artifact."
    lead = f"A whole run costs {facts.run_share:.3f} of the full run's MACs; one call:"
    return lead, (cost_chart(facts),), (DataTable(COST_COLUMNS, tuple(cost_rows(facts))),)


def _operators(data: ReportData) -> Shown | str:
    if data.operators is None:
        return data.missing["operators"]
    rows = tuple(
        (entry.mode, entry.operator, f"{entry.milliseconds:.3f}", f"{entry.calls:g}")
        for entry in data.operators
    )[:_MOST_ROWS]
    lead = "Measured time of one step by ONNX operator, from ONNX Runtime's own profile."
    table = DataTable(("mode", "operator", "ms of a step", "calls"), rows)
    return lead, (operator_chart(data.operators),), (table,)


def _front(data: ReportData) -> Shown | str:
    front = data.front
    if front is None:
        return data.missing["front"]
    rows = tuple(
        (
            f"{k}{' (taken)' if k == front.taken else ''}",
            f"{point.cost:.3f}",
            f"{point.error.mean:.3g}",
            f"{point.error.bound:.3g}",
            point.label,
        )
        for k, point in enumerate(front.points)
    )
    columns = ("point", "cost", "error", f"{100 * CONFIDENCE:g} % bound", "steps")
    lead = f"Points of the search that was asked for {front.request}."
    return lead, (front_chart(front),), (DataTable(columns, rows),)


def _belonging(data: ReportData) -> Shown:
    facts = data.facts
    owner = facts.manifest if isinstance(facts, ArtifactFacts) else facts.binding
    files = facts.manifest.files if isinstance(facts, ArtifactFacts) else facts.files
    rows = [("path", facts.path), ("kind", facts.kind), ("weights", owner.weights_hash)]
    rows += [(record.name, f"{record.size:,} B, {record.sha256}") for record in files]
    measured_on = {} if data.comparison is None else data.comparison.environment
    rows += [
        (f"{group}: {name}", str(value))
        for group, values in measured_on.items()
        for name, value in values.items()
    ]
    rejections = facts.manifest.rejections if isinstance(facts, ArtifactFacts) else ()
    tables = (
        DataTable(("what", "value"), tuple(rows)),
        DataTable(("left alone", "reason"), tuple((one.name, one.reason) for one in rejections)),
        DataTable(("warning", "what it says"), tuple((c.code, c.text) for c in facts.warnings)),
    )
    return "", (), tuple(table for table in tables if table.rows)


_SECTIONS: tuple[tuple[str, str, Callable[[ReportData], Shown | str]], ...] = (
    ("schedule", "What does every step do?", _schedule),
    ("errors", "Where does the error come from?", _sites),
    ("steps", "How does the error grow along the run?", _steps),
    ("energy", "How good are the ranks?", _energy),
    ("cost", "What does a step cost?", _cost),
    ("operators", "Why is it slow?", _operators),
    ("front", "What else could the plan have been?", _front),
    ("belonging", "Whose is this?", _belonging),
)
