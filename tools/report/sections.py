"""The sections of a report, in the order in which they are read: each answers one question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from calicache.graph_passes.settings.schedule import count_modes
from calicache.tools.compare.view import STEP_COLUMNS, step_rows
from calicache.tools.inspect.artifact_facts import ArtifactFacts
from calicache.tools.inspect.artifact_view import COST_COLUMNS, cost_rows
from calicache.tools.inspect.facts import ModeFacts
from calicache.tools.inspect.plan_facts import PlanFacts
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


@dataclass(frozen=True, slots=True)
class Card:
    """One number at the top of the page."""

    name: str
    value: str
    note: str = ""


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


def report_cards(data: ReportData) -> tuple[Card, ...]:
    """The numbers that are asked for first."""
    return tuple(_cards(data))


def report_sections(data: ReportData) -> tuple[Section, ...]:
    """All sections with charts and tables; graphs and pictures are the page's own."""
    return (
        _schedule(data),
        _sites(data),
        _steps(data),
        _energy(data),
        _cost(data),
        _operators(data),
        _front(data),
        _belonging(data),
    )


def _cards(data: ReportData) -> Iterator[Card]:
    facts, comparison = data.facts, data.comparison
    modes = facts.schedule.modes
    yield Card("steps", str(len(modes)), count_modes(modes))
    if isinstance(facts, ArtifactFacts):
        yield Card("MACs", f"{facts.run_share:.3f}", "of the full run")
        yield Card("caches", format_count(facts.cache_bytes, "B"), f"{facts.history} refreshes")
    if comparison is not None:
        error = comparison.final
        yield Card("error", f"{error.mean:.3g}", f"relative L2, {error.samples} samples")
        if comparison.speedup is not None:
            yield Card("time", f"{1 / comparison.speedup:.3f}", "of the full run, measured")
        if comparison.measures is not None:
            yield Card("PSNR", f"{comparison.measures.psnr_mean:.1f} dB", "against the full run")
    elif data.errors is not None and data.errors.result is not None:
        yield Card("error", f"{data.errors.result:.3g}", "relative L2 of the result")
    if data.front is not None and data.front.held_out is not None:
        held_out = data.front.held_out
        yield Card("held-out error", f"{held_out.mean:.3g}", f"{held_out.samples} samples")
    yield Card("warnings", str(len(facts.warnings)), "listed below")


def _schedule(data: ReportData) -> Section:
    facts = data.facts
    modes: Sequence[ModeFacts] = facts.modes if isinstance(facts, ArtifactFacts) else ()
    rows = tuple((str(k), mode.name) for k, mode in enumerate(facts.schedule.modes))
    return Section(
        "schedule",
        "What does every step do?",
        "REFRESH runs the whole model and keeps values; the other steps work with them.",
        (schedule_chart(facts.schedule.modes, modes),),
        (DataTable(("step", "mode"), rows),),
    )


def _sites(data: ReportData) -> Section:
    title = "Where does the error come from?"
    if data.errors is None:
        return Section("errors", title, missing=data.missing["errors"])
    errors = data.errors
    columns = ("site", *(str(k) for k in range(len(errors.schedule))))
    rows = tuple(
        (site, *("" if v is None else f"{v:.2g}" for v in row))
        for site, row in zip(errors.sites, errors.errors, strict=True)
    )
    lead = (
        "Relative error of the residual stream after every branch against the full run's, by step. "
        "A step that does not compute a branch leaves a gap."
    )
    return Section("errors", title, lead, (site_error_chart(errors),), (DataTable(columns, rows),))


def _steps(data: ReportData) -> Section:
    title = "How does the error grow along the run?"
    comparison = data.comparison
    if comparison is None:
        return Section("steps", title, missing=data.missing["comparison"])
    if comparison.no_steps is not None:
        return Section("steps", title, missing=comparison.no_steps)
    lead = (
        "Relative error of the latent after every step; it falls where a step takes back what "
        "earlier ones did wrong."
    )
    charts = (step_error_chart(comparison), time_chart(comparison))
    table = DataTable(STEP_COLUMNS, tuple(step_rows(comparison)))
    return Section("steps", title, lead, charts, (table,))


def _energy(data: ReportData) -> Section:
    title = "How good are the ranks?"
    if data.curves:
        marked = sorted({2**k for k in range(20)} & {r for c in data.curves for r in c.kept})
        rows = tuple(
            (
                curve.target,
                str(curve.rank),
                f"{curve.kept[curve.rank]:.4f}",
                *(f"{curve.kept[r]:.3f}" if r in curve.kept else "" for r in marked),
            )
            for curve in data.curves
        )
        columns = ("target", "rank", "kept", *(f"at {rank}" for rank in marked))
        lead = "Energy of the increments that a branch of a rank leaves out; dots are the plan's."
        table = DataTable(columns, rows, _layers(data) if data.graphs else ())
        return Section("energy", title, lead, (energy_chart(data.curves),), (table,))
    return Section("energy", title, missing=data.missing.get("curves", "No layer is calibrated."))


def _layers(data: ReportData) -> tuple[str, ...]:
    """A layer of every calibration target; a plan alone knows targets by their names."""
    targets = data.facts.targets if isinstance(data.facts, ArtifactFacts) else ()
    first = {target.name: target.sites[0] for target in targets}
    return tuple(first.get(curve.target, curve.target) for curve in data.curves or ())


def _cost(data: ReportData) -> Section:
    title = "What does a step cost?"
    facts = data.facts
    if not isinstance(facts, ArtifactFacts):
        return Section("cost", title, missing="A plan alone has no costs: report on an artifact.")
    lead = f"A whole run costs {facts.run_share:.3f} of the full run's MACs; one call:"
    table = DataTable(COST_COLUMNS, tuple(cost_rows(facts)))
    return Section("cost", title, lead, (cost_chart(facts),), (table,))


def _operators(data: ReportData) -> Section:
    title = "Why is it slow?"
    if data.operators is None:
        return Section("operators", title, missing=data.missing["operators"])
    rows = tuple(
        (entry.mode, entry.operator, f"{entry.milliseconds:.3f}", f"{entry.calls:g}")
        for entry in data.operators
    )[:_MOST_ROWS]
    lead = "Measured time of one step by ONNX operator, from ONNX Runtime's own profile."
    table = DataTable(("mode", "operator", "ms of a step", "calls"), rows)
    return Section("operators", title, lead, (operator_chart(data.operators),), (table,))


def _front(data: ReportData) -> Section:
    title = "What else could the plan have been?"
    if data.front is None:
        return Section("front", title, missing=data.missing["front"])
    rows = tuple(
        (
            f"{k}{' (taken)' if k == data.front.taken else ''}",
            f"{point.cost:.3f}",
            f"{point.error.mean:.3g}",
            f"{point.error.bound:.3g}",
            point.label,
        )
        for k, point in enumerate(data.front.points)
    )
    columns = ("point", "cost", "error", "95 % bound", "steps")
    lead = f"Points of the search that was asked for {data.front.request}."
    return Section("front", title, lead, (front_chart(data.front),), (DataTable(columns, rows),))


def _belonging(data: ReportData) -> Section:
    facts = data.facts
    rows = [("path", facts.path), ("kind", facts.kind), ("weights", facts.weights_hash)]
    rows += [(record.name, f"{record.size:,} B, {record.sha256}") for record in facts.files]
    if data.comparison is not None:
        rows += [
            (f"{group}: {name}", str(value))
            for group, values in data.comparison.environment.items()
            for name, value in values.items()
        ]
    tables = [DataTable(("what", "value"), tuple(rows))]
    if isinstance(facts, ArtifactFacts) and facts.rejections:
        left = tuple((rejection.name, rejection.reason) for rejection in facts.rejections)
        tables.append(DataTable(("left alone", "reason"), left))
    if facts.warnings:
        cautions = tuple((caution.code, caution.text) for caution in facts.warnings)
        tables.append(DataTable(("warning", "what it says"), cautions))
    kind = "plan" if isinstance(facts, PlanFacts) else "artifact"
    return Section("belonging", f"Whose is this {kind}?", tables=tuple(tables))
