"""Plans and optimised models as small tables for a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from calicache.graph_passes.describe.text import in_sample_words
from calicache.graph_passes.recording.binding import Binding
from calicache.graph_passes.rewriting.compile import Compiled
from calicache.graph_passes.settings.choices import STEP_LETTERS, StepMode
from calicache.graph_passes.settings.front import ErrorSummary, Front
from calicache.graph_passes.settings.recipe import Recipe


def plan_html(
    binding: Binding,
    recipe: Recipe,
    statistics: int,
    front: Front | None,
    in_sample: ErrorSummary | None,
) -> str:
    """Schedule, recipe, error, cost where a search counted it, and the front.

    Args:
        binding: what the plan is tied to.
        recipe: what it does.
        statistics: how many calibration targets it has statistics of.
        front: of the search that made it.
        in_sample: error of the recorded samples that it was made from.
    """
    facts = [
        *_schedule_facts(recipe.schedule),
        ("settings", _recipe_line(recipe)),
        ("statistics", f"of {statistics} targets"),
        ("output weights", recipe.correction),
        ("weights", binding.weights_hash[:16]),
    ]
    if front is not None:
        point = front.points[front.choice]
        facts.insert(2, ("cost", f"{point.cost:.3f} of the full run, in {front.unit}"))
        facts.insert(3, ("error", f"{point.error.mean:.3g} ± {point.error.deviation:.2g}"))
    else:
        facts.insert(2, ("error", in_sample_words(in_sample)))
    parts = ["<b>calicache plan</b>", _rows(facts)]
    if front is not None:
        parts.append(_front_table(front))
    return f"<div>{''.join(parts)}</div>"


def model_html(name: str, compiled: Compiled) -> str:
    """Schedule, sites, share of the full run, cost by mode and caches.

    Args:
        name: of the model's class.
        compiled: what was made of it.
    """
    recipe, cost, sites = compiled.recipe, compiled.cost, compiled.analysis.sites
    places = f"{len(sites.linears)} in {len(sites.branches)} residual branches"
    caches, history = len(compiled.variant_set.caches), compiled.variant_set.history
    kept = f"{history} refresh{'es' if history > 1 else ''}"
    facts = [
        *_schedule_facts(recipe.schedule),
        ("cost", f"{cost.run_share(recipe.schedule):.3f} of the full run, in MACs"),
        ("sites", f"{places}, {len(compiled.rejections)} left alone"),
        ("calibration branches", f"{len(compiled.factors)}; {_recipe_line(recipe)}"),
        ("caches", f"{caches} values, {kept} of each at most, {cost.cache_bytes:,} bytes"),
    ]
    head = ("mode", "steps", "MACs of a call", "of plain")
    rows = [
        (
            mode.name,
            str(recipe.schedule.count(mode)),
            f"{macs:,}",
            f"{macs / cost.plain_macs:.3f}",
        )
        for mode, macs in sorted(cost.modes.items())
    ]
    title = f"<b>{escape(name)} optimised by calicache</b>"
    return f"<div>{title}{_rows(facts)}{_table(head, rows)}</div>"


def _schedule_facts(schedule: Sequence[StepMode]) -> list[tuple[str, str]]:
    counts = ", ".join(
        f"{schedule.count(mode)} {mode.name} ({STEP_LETTERS[mode]})"
        for mode in StepMode
        if mode in schedule
    )
    strip = "".join(STEP_LETTERS[mode] for mode in schedule)
    return [("schedule", strip), ("steps", f"{len(schedule)}: {counts}")]


def _recipe_line(recipe: Recipe) -> str:
    return (
        f"{recipe.branch_words}, {len(recipe.rules)} rules, {len(recipe.ranks)} ranks of their own"
    )


def _front_table(front: Front) -> str:
    head = ("point", "cost", "error", "steps")
    rows = [
        (
            f"{place} (taken)" if place == front.choice else str(place),
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
