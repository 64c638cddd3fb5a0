"""From the JSON of `calicache bench` to docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calicache.graph_passes.common.files import atomic_path

Result = Mapping[str, Any]
NOTES = "performance-notes.md"
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
    parts = [_heading(results)]
    for result in results["models"]:
        parts += [_facts(result), _table(result), _targets(result), _operators(result)]
    notes = docs / NOTES
    if notes.exists():
        parts.append(notes.read_text().strip())
    with atomic_path(docs / "performance.md") as path:
        path.write_text("\n\n".join(parts) + "\n")


def efficiency(row: Mapping[str, Any]) -> float:
    """Measured speedup over what the MACs alone would give."""
    return float(row["plain_seconds"] / row["run_seconds"] * row["macs_share"])


def _heading(results: Mapping[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"""# Performance

Written by `calicache bench`; do not edit. {machine["threads"]} threads of {machine["processor"]};
{listed}.

- Every row runs in a process of its own; the rows take turns, the figures are medians. Where memory
  does not hold all rows at once they run in groups, the plain row in every one.
- Speedup is against the plain model in ONNX Runtime, of a whole run; MACs the same from counted
  multiply-accumulates; efficiency is the first over the second.
- Memory is the resident memory that a row's process adds, loading and running."""


def _facts(result: Result) -> str:
    weights, peak = result["weight_bytes"], result["export_peak_bytes"]
    seconds = ", ".join(f"{k} {v:.1f} s" for k, v in result["export_seconds"].items())
    files = ", ".join(f"{name} {_megabytes(size)}" for name, size in result["files"].items())
    return f"""## {result["model"]}

Interval {result["interval"]}, rank {result["rank"]} (width {result["width"]}), order \
{result["order"]}, {result["steps"]} steps, {result["repeats"]} runs of every row, \
{result["provider"]}.

- caches {_megabytes(result["cache_bytes"])}; weights {_megabytes(weights)}; files: {files}
- `optimize` and the exports: {seconds}; {_megabytes(peak)} of memory on top of the loaded model \
({peak / weights:.2f} of the weights)"""


def _table(result: Result) -> str:
    modes = list(dict.fromkeys(m for row in result["rows"] for m in row["step_seconds"] or ()))
    columns = ["row", *(f"{mode} ms" for mode in modes), "run s", "speedup", "MACs"]
    columns += ["efficiency", "memory"]
    return _markdown(columns, (_cells(row, modes, len(columns)) for row in result["rows"]))


def _cells(row: Mapping[str, Any], modes: Sequence[str], width: int) -> list[str]:
    if row["refused"]:
        reason = row["refused"].replace("|", "\\|")
        return [row["name"], f"does not run: {reason}", *[""] * (width - 2)]
    steps = row["step_seconds"] or {}
    return [
        row["name"],
        *(f"{1e3 * steps[mode]:.1f}" if mode in steps else "" for mode in modes),
        f"{row['run_seconds']:.3f}",
        f"{row['plain_seconds'] / row['run_seconds']:.2f}",
        f"{1 / row['macs_share']:.2f}",
        f"{efficiency(row):.2f}",
        _megabytes(row["peak_bytes"]),
    ]


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], align: str = "---:") -> str:
    lines = [columns, ["---", *[align] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _targets(result: Result) -> str:
    rows = ((aim, measured, "yes" if met else "**no**") for aim, measured, met in targets(result))
    return _markdown(("target", "measured", "met"), rows, "---")


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


def _operators(result: Result) -> str:
    profiles = result["profiles"]
    intro = "Where the time goes, ms of a step (`run`: of the whole run, outside the steps):"
    columns = (
        ("plain", "plain", "REFRESH"),
        ("REFRESH", "step", "REFRESH"),
        ("CALIBRATE", "step", "CALIBRATE"),
        ("CALIBRATE, sampler", "sampler", "CALIBRATE"),
        ("run, sampler", "sampler", "run"),
    )
    times = {
        title: {e["operator"]: e["milliseconds"] for e in profiles[name] if e["mode"] == mode}
        for title, name, mode in columns
    }
    operators = dict.fromkeys(
        name for column in times.values() for name in list(column)[:SHOWN_OPERATORS]
    )
    rows = [
        [name, *(f"{column[name]:.2f}" if name in column else "" for column in times.values())]
        for name in operators
    ]
    sums = ["all", *(f"{sum(column.values()):.1f}" for column in times.values())]
    table = _markdown(["operator", *times], [*rows, sums])
    return "\n\n".join([intro, table, _copies(profiles["sampler"])])


def _copies(profile: Sequence[Mapping[str, Any]]) -> str:
    moved = [e for e in profile if e["operator"] in ("Identity", "Concat", "Expand")]
    size = sum(entry["result_bytes"] for entry in moved)
    return (
        f"Copies in the sampler (Identity, Concat, Expand): {_megabytes(size)} in all steps of "
        "one mode and the run around them."
    )


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"
