"""Plans and optimised models as small tables for a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from calicache.graph_passes.settings.choices import StepMode

if TYPE_CHECKING:
    from calicache.graph_passes.api.plan import Plan
    from calicache.graph_passes.api.runtime import OptimizedModel
    from calicache.graph_passes.settings.front import Front
    from calicache.graph_passes.settings.recipe import PlanSettings

STEP_LETTERS = {
    StepMode.REFRESH: "R",
    StepMode.CALIBRATE: "C",
    StepMode.REUSE: "U",
    StepMode.FORECAST: "F",
}


def plan_html(plan: Plan) -> str:
    """Schedule, settings, cost where a search counted it, and the front."""
    settings, front = plan.settings, plan.front
    facts = [
        *_schedule_facts(plan.schedule),
        ("settings", _settings_line(settings)),
        ("statistics", f"of {len(plan.statistics)} targets"),
        ("output weights", settings.correction),
        ("weights", settings.weights_hash[:16]),
    ]
    if front is not None:
        taken = front.points[front.taken]
        facts.insert(2, ("cost", f"{taken.cost:.3f} of the full run, in {front.unit}"))
        facts.insert(3, ("error", f"{taken.error.mean:.3g} ± {taken.error.deviation:.2g}"))
    parts = ["<b>calicache plan</b>", _rows(facts)]
    if front is not None:
        parts.append(_front_table(front))
    return f"<div>{''.join(parts)}</div>"


def model_html(optimized: OptimizedModel) -> str:
    """Schedule, sites, share of the full run, cost by mode and caches."""
    plan, cost = optimized.plan, optimized.cost
    sites = f"{len(optimized.sites.linears)} in {len(optimized.sites.branches)} residual branches"
    caches, history = len(optimized.variant_set.caches), optimized.variant_set.history
    kept = f"{history} refresh{'es' if history > 1 else ''}"
    facts = [
        *_schedule_facts(plan.schedule),
        ("cost", f"{cost.run_share(plan.schedule):.3f} of the full run, in MACs"),
        ("sites", f"{sites}, {len(optimized.sites.rejections)} left alone"),
        ("calibration branches", f"{len(optimized.factors)}; {_settings_line(plan.settings)}"),
        ("caches", f"{caches} values, {kept} of each at most, {cost.cache_bytes:,} bytes"),
    ]
    head = ("mode", "steps", "MACs of a call", "of plain")
    rows = [
        (
            mode.name,
            str(plan.schedule.count(mode)),
            f"{macs:,}",
            f"{macs / cost.plain_macs:.3f}",
        )
        for mode, macs in sorted(cost.modes.items())
    ]
    name = escape(type(optimized.original).__name__)
    return f"<div><b>{name} optimised by calicache</b>{_rows(facts)}{_table(head, rows)}</div>"


def _schedule_facts(schedule: Sequence[StepMode]) -> list[tuple[str, str]]:
    counts = ", ".join(
        f"{schedule.count(mode)} {mode.name} ({STEP_LETTERS[mode]})"
        for mode in StepMode
        if mode in schedule
    )
    strip = "".join(STEP_LETTERS[mode] for mode in schedule)
    return [("schedule", strip), ("steps", f"{len(schedule)}: {counts}")]


def _settings_line(settings: PlanSettings) -> str:
    return (
        f"rank {settings.rank}, order {settings.order}, weighting {settings.weighting}, "
        f"granularity {settings.granularity}, {len(settings.rules)} rules, "
        f"{len(settings.ranks)} ranks of their own"
    )


def _front_table(front: Front) -> str:
    head = ("point", "cost", "error", "steps")
    rows = [
        (
            f"{place} (taken)" if place == front.taken else str(place),
            f"{point.cost:.3f}",
            f"{point.error.mean:.3g}",
            point.label,
        )
        for place, point in enumerate(front.points)
    ]
    return f"<p>Front of a search, {escape(front.request)}</p>{_table(head, rows)}"


def _rows(facts: Iterable[tuple[str, str]]) -> str:
    lines = (
        f'<tr><th style="text-align:left">{escape(name)}</th>'
        f'<td style="text-align:left;overflow-wrap:anywhere">{escape(value)}</td></tr>'
        for name, value in facts
    )
    return f"<table>{''.join(lines)}</table>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"
