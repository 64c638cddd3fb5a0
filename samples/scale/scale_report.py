"""Measure what planning takes, beside what `calicache cost` says; write docs/scale.md.

`make scale` runs it. What was measured already is in docs/scale.json and is not measured again;
what the command says is computed anew, and the page written from both.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import geometric_mean
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from scale_measure import CASES, OBSERVE, OBSERVING, PLAN, SEARCH, Case, said, scale_of, took  # noqa: E402

from calicache.graph_passes.common.disk.files import atomic_path  # noqa: E402
from calicache.graph_passes.common.environment import environment  # noqa: E402
from calicache.tools.bench.models import find_model  # noqa: E402
from calicache.tools.bench.prepare import own_process  # noqa: E402

DOCS = HERE.parents[1] / "docs"
FILE, PAGE, NOTES = "scale.json", "scale.md", "scale-notes.md"
MODELS = str(HERE / "scale_models.py")
LARGE = {
    "dit-xl": Case("dit-xl", 128, steps=50),
    "flux": Case(f"{MODELS}:flux", 128, steps=28),
    "wan": Case(f"{MODELS}:wan", 128, steps=50),
}
KINDS = ("peak_bytes", "calls")
WORKS = {OBSERVE: "observing", PLAN: "`from_trajectory`", SEARCH: "`Plan.search`"}
Rows = Sequence[Mapping[str, Any]]


def measure(cases: Sequence[Case], known: Rows) -> Iterator[dict[str, Any]]:
    """The rows of all cases, each measured in a process of its own if it is not known."""
    by_name = {(row["model"], row["work"]): row["took"] for row in known}
    for case in cases:
        name = find_model(case.model).name
        with own_process() as process:
            counts = process.submit(said, case).result()
        for work in case.works:
            taken = by_name.get((name, work))
            if taken is None:
                with own_process() as process:
                    taken = process.submit(took, case, work).result()
            row = {"model": name, "work": work, "steps": case.steps}
            yield {**row, "said": counts[work], "took": taken}


def write_page(results: Mapping[str, Any], docs: Path) -> None:
    """Write scale.md from what scale.json holds, and the notes."""
    notes = (docs / NOTES).read_text().strip()
    with atomic_path(docs / PAGE) as path:
        path.write_text("\n".join([*_lines(results), notes, ""]))


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    machine, versions = results["machine"], results["versions"]
    yield "# Scale"
    yield ""
    yield (
        f"Written by `make scale`; do not edit. One thread of {machine['processor']}; python "
        f"{versions['python']}, torch {versions['torch']}."
    )
    yield ""
    yield "## Models that do not fit here"
    yield ""
    yield from _large_table(results["large"])
    yield ""
    yield "## Measured, against what the command says"
    yield ""
    yield from _measured_table(results["rows"])
    yield ""
    yield from _error_table(results["rows"])
    yield ""


def _large_table(scales: Mapping[str, Any]) -> Iterator[str]:
    columns = list(scales.values())
    yield (
        "| | " + " | ".join(f"{scale['name']}, {scale['steps']} steps" for scale in columns) + " |"
    )
    yield "|---|" + "---:|" * len(columns)
    rows = {
        "parameters": lambda s: f"{s['parameters'] / 1e9:.2f} G of {s['dtype']}",
        "weights": lambda s: _bytes(s["weight_bytes"]),
        "MACs of a call": lambda s: f"{s['call_macs'] / 1e12:.3g} T",
        "residual branches, layers, targets": lambda s: (
            f"{s['blocks']}, {s['sites']}, {s['targets']}"
        ),
        "CALIBRATE call, MACs against plain": lambda s: f"{s['modes']['CALIBRATE']['share']:.3f}",
        "caches of a request, CALIBRATE": lambda s: _kept(s, "CALIBRATE"),
        "REUSE": lambda s: _kept(s, "REUSE"),
        "FORECAST": lambda s: _kept(s, "FORECAST"),
        "recorded run": lambda s: _bytes(s["recording_bytes"]),
        "statistics; sums while observed": lambda s: _pair(s, "statistics_bytes", "sum_bytes"),
        "of a search": lambda s: _pair(s, "search_statistics_bytes", "search_sum_bytes"),
        "factors": lambda s: _bytes(s["factor_bytes"]),
        "observing: memory": lambda s: _peak(s, s["planning"][:OBSERVING]),
        "observing: plain runs": lambda s: _runs(s, s["planning"][:OBSERVING]),
        "`from_trajectory`: memory": lambda s: _peak(s, s["planning"]),
        "`from_trajectory`: plain runs": lambda s: _runs(s, s["planning"]),
        "`Plan.search`: memory": lambda s: _peak(s, s["search"]),
        "`Plan.search`: plain runs": lambda s: _runs(s, s["search"]),
    }
    for name, cell in rows.items():
        yield f"| {name} | " + " | ".join(map(cell, columns)) + " |"


def _measured_table(rows: Rows) -> Iterator[str]:
    yield "| model | work | memory, said | measured | ratio | calls, said | measured | ratio |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        counted, taken = row["said"], row["took"]
        memory, calls = (taken[kind] / counted[kind] for kind in KINDS)
        yield (
            f"| {row['model']} | {WORKS[row['work']]}, {row['steps']} steps "
            f"| {_bytes(counted['peak_bytes'])} | {_bytes(taken['peak_bytes'])} | {memory:.2f} "
            f"| {counted['calls']:.1f} | {taken['calls']:.1f} | {calls:.2f} |"
        )


def _error_table(rows: Rows) -> Iterator[str]:
    yield "| work | memory, measured over said | calls, measured over said |"
    yield "|---|---:|---:|"
    for work, name in WORKS.items():
        some = [row for row in rows if row["work"] == work]
        if some:
            cells = (_spread(some, kind) for kind in KINDS)
            yield f"| {name} | " + " | ".join(cells) + " |"


def _spread(rows: Rows, kind: str) -> str:
    ratios = [row["took"][kind] / row["said"][kind] for row in rows]
    return f"{min(ratios):.2f} to {max(ratios):.2f}, mean {geometric_mean(ratios):.2f}"


def _bytes(value: float) -> str:
    place = min(int(math.log10(max(value, 1)) // 3), 4)
    return f"{value / 1000**place:.3g} {('', 'k', 'M', 'G', 'T')[place]}B"


def _kept(scale: Mapping[str, Any], mode: str) -> str:
    return _bytes(scale["modes"][mode]["request_bytes"])


def _pair(scale: Mapping[str, Any], one: str, other: str) -> str:
    return f"{_bytes(scale[one])}; {_bytes(scale[other])}"


def _peak(scale: Mapping[str, Any], stages: Rows) -> str:
    return _bytes(scale["weight_bytes"] + max(stage["nbytes"] for stage in stages))


def _runs(scale: Mapping[str, Any], stages: Rows) -> str:
    calls = sum(stage["calls"] + stage["macs"] / scale["call_macs"] for stage in stages)
    return f"{calls / scale['steps'] / scale['calls']:.1f}"


def counted(case: Case) -> dict[str, Any]:
    """A large model as plain data, in bfloat16."""
    return {"name": find_model(case.model).name, **asdict(scale_of(case, "bfloat16"))}


def main() -> None:
    """Measure what is missing, count all, write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--page", action="store_true", help="write the page from the JSON alone")
    options = parser.parse_args()
    file = options.docs / FILE
    results = json.loads(file.read_text()) if file.exists() else {"rows": [], "large": {}}
    if not options.page:
        results = {**environment(), **results}
        known, rows = results["rows"], []
        for row in measure(CASES, known):
            rows.append(row)
            print(row["model"], WORKS[row["work"]], *(_spread([row], kind) for kind in KINDS))
            done = {(row["model"], row["work"]) for row in rows}
            others = [row for row in known if (row["model"], row["work"]) not in done]
            results = {**results, "rows": [*rows, *others]}
            _save(file, results)
        for name, case in LARGE.items():
            with own_process() as process:
                scale = process.submit(counted, case).result()
            results = {**results, "large": {**results["large"], name: scale}}
            _save(file, results)
    write_page(results, options.docs)


def _save(file: Path, results: Mapping[str, Any]) -> None:
    with atomic_path(file) as path:
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
