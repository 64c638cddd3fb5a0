"""From the JSON of `calicache bench` to docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from calicache.graph_passes.common.files import atomic_path
from calicache.tools.terminal.options import import_library

Result = Mapping[str, Any]
NOTES, TEMPLATE = "performance-notes.md", "performance.md.jinja"
SHOWN_OPERATORS = 8


def write_report(results: Mapping[str, Any], docs: Path) -> None:
    """Write performance.json and performance.md; `performance-notes.md` is added at the end.

    Args:
        results: `machine`, `versions` and `models`, one result of `run_bench` each.
        docs: the folder.
    """
    docs.mkdir(parents=True, exist_ok=True)
    with atomic_path(docs / "performance.json") as path:
        path.write_text(json.dumps(results, indent=1) + "\n")
    notes = docs / NOTES
    jinja = import_library("jinja2", "jinja2", "fills the page in")
    environment = jinja.Environment(undefined=jinja.StrictUndefined, keep_trailing_newline=True)
    template = (files("calicache.tools.bench") / TEMPLATE).read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        **results,
        modes_of=_modes,
        efficiency=efficiency,
        targets=targets,
        operator_columns=_operator_columns,
        notes=notes.read_text().strip() if notes.exists() else "",
    )
    with atomic_path(docs / "performance.md") as path:
        path.write_text(page)


def efficiency(row: Mapping[str, Any]) -> float:
    """Measured speedup over what the MACs alone would give."""
    return float(row["plain_seconds"] / row["run_seconds"] * row["macs_share"])


def _modes(result: Result) -> list[str]:
    """Modes that the steps of any row were timed in."""
    return list(dict.fromkeys(m for row in result["rows"] for m in row["step_seconds"] or ()))


def targets(result: Result) -> Iterator[tuple[str, str, bool]]:
    """What was aimed at, what was measured, and whether that is enough."""
    rows = {row["name"]: row for row in result["rows"] if not row["refused"]}
    plain = result["rows"][0]
    step = rows.get("calicache CALIBRATE, step")
    sampler = rows.get("calicache CALIBRATE, sampler")
    eager = rows.get("calicache CALIBRATE, PyTorch eager")
    if step:
        share = step["step_seconds"]["REFRESH"] / plain["step_seconds"]["REFRESH"]
        yield "REFRESH at most 1.05 of a plain step", f"{share:.2f}", share <= 1.05
    if sampler:
        measured = efficiency(sampler)
        least = 0.85 if result["width"] < 512 else 0.90
        yield f"efficiency at least {least:.2f} (sampler)", f"{measured:.2f}", measured >= least
    if sampler and step:
        ratio = _share(sampler) / _share(step)
        yield "sampler no slower than step by step", f"{ratio:.2f}", ratio <= 1.0
    if sampler and eager:
        gain = _share(eager) / _share(sampler)
        yield "twice as fast as the same schedule in eager PyTorch", f"{gain:.2f}", gain >= 2
    kept = result["cache_values_per_channel"]
    if result["order"] == 0:
        yield "cache per token and block at most 10 C", f"{kept:.1f} C", kept <= 10
    spent = result["export_seconds"]
    seconds = spent["optimize"] + max(time for name, time in spent.items() if name != "optimize")
    yield "`optimize` and export in under 60 s", f"{seconds:.0f} s", seconds < 60
    peak = 1 + result["export_peak_bytes"] / result["weight_bytes"]
    yield "their memory, model included, under 2 x the weights", f"{peak:.2f}", peak < 2


def _share(row: Mapping[str, Any]) -> float:
    """Time of a run against the plain one beside it."""
    return float(row["run_seconds"] / row["plain_seconds"])


def _operator_columns(
    profiles: Mapping[str, Sequence[Mapping[str, Any]]],
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Milliseconds by operator in every column of the table, and the operators it shows."""
    columns = {
        title: {e["operator"]: e["milliseconds"] for e in profiles[name] if e["mode"] == mode}
        for title, name, mode in (
            ("plain", "plain", "REFRESH"),
            ("REFRESH", "step", "REFRESH"),
            ("CALIBRATE", "step", "CALIBRATE"),
            ("CALIBRATE, sampler", "sampler", "CALIBRATE"),
            ("run, sampler", "sampler", "run"),
        )
    }
    shown = (name for column in columns.values() for name in list(column)[:SHOWN_OPERATORS])
    return columns, list(dict.fromkeys(shown))
