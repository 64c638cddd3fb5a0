"""From the JSON of `calicache bench` to docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from calicache.graph_passes.common.disk.files import atomic_path
from calicache.graph_passes.common.environment import environment
from calicache.tools.bench.compile_time import STAGES
from calicache.tools.terminal.options import import_library

Result = Mapping[str, Any]
NOTES, TEMPLATE = "performance-notes.md", "performance.md.jinja"
CHART = "fidelity.png"  # what `make fidelity` draws beside it
SHOWN_OPERATORS = 8


def write_report(results: Mapping[str, Any], docs: Path) -> None:
    """Write performance.json and performance.md; `performance-notes.md` is added at the end.

    Args:
        results: `machine`, `versions` and `models`, one result of `run_bench` each, and
            `start`, from `measure_start`; or `compile`,
            which holds machine, versions and results of `measure_compile`. What is not given
            stays as it was.
        docs: the folder.
    """
    docs.mkdir(parents=True, exist_ok=True)
    file = docs / "performance.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    empty: dict[str, Any] = {"models": [], "compile": None, "start": {}}
    results = {**environment(), **empty, **known, **results}
    with atomic_path(file) as path:
        path.write_text(json.dumps(results, indent=1) + "\n")
    notes = docs / NOTES
    jinja = import_library("jinja2", "jinja2", "fills the page in")
    templates = jinja.Environment(undefined=jinja.StrictUndefined, keep_trailing_newline=True)
    template = (files("calicache.tools.bench") / TEMPLATE).read_text(encoding="utf-8")
    page = templates.from_string(template).render(
        **results,
        chart=CHART if (docs / CHART).exists() else "",
        modes_of=_modes,
        speedups_of=_speedups,
        efficiency=efficiency,
        operator_columns=_operator_columns,
        stages=STAGES,
        notes=notes.read_text().strip() if notes.exists() else "",
    )
    with atomic_path(docs / "performance.md") as path:
        path.write_text(page)


def efficiency(row: Mapping[str, Any]) -> float:
    """Measured speedup over what the MACs alone would give."""
    return float(row["plain_seconds"] / row["run_seconds"] * row["macs_share"])


def _speedups(results: Sequence[Result]) -> dict[str, list[float | None]]:
    """Speedups of every row that ran, model by model."""
    known = [
        {
            row["name"]: row["plain_seconds"] / row["run_seconds"]
            for row in result["rows"]
            if not row.get("refused")
        }
        for result in results
    ]
    names = dict.fromkeys(name for speedups in known for name in speedups)
    return {name: [speedups.get(name) for speedups in known] for name in names}


def _modes(result: Result) -> list[str]:
    """Modes that the steps of any row were timed in."""
    return list(dict.fromkeys(m for row in result["rows"] for m in row["step_seconds"] or ()))


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
