"""From the JSON of evaluations to docs/fidelity.md and docs/fidelity.png.

    python samples/fashion_dit/fidelity_report.py

writes both anew from what lies in docs: fidelity.json, evaluation.json, fidelity-notes.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from calicache.tools.evaluate.evaluation import EVALUATION, FIGURES, Figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = Mapping[str, Any]
COLUMNS = (
    "method",
    "MACs",
    "time",
    "L2 error",
    "PSNR",
    "L2 to 500",
    "PSNR to 500",
    "FID",
    "IS",
)
EVALUATION_FILE = "evaluation.json"  # of `calicache evaluate`
RECENT = ("TaylorSeer-Lite", "Spectrum", "DMD", "FoCa", "L2P")  # families of peers.py


def write_report(result: Mapping[str, Any], docs: Path) -> None:
    """Write the table, what became of the targets, the plot and the JSON."""
    docs.mkdir(parents=True, exist_ok=True)
    rows: Sequence[Row] = result["rows"]
    (docs / "fidelity.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, docs / "fidelity.png")
    notes = docs / "fidelity-notes.md"
    parts = [_heading(result), _tables(rows), _targets(rows)]
    if (docs / EVALUATION_FILE).exists():
        parts.append(_evaluation(docs / EVALUATION_FILE))
    if notes.exists():
        parts.append(notes.read_text().strip())
    (docs / "fidelity.md").write_text("\n\n".join(parts) + "\n")


def _heading(result: Mapping[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    images = result["rows"][0]["images"]
    return f"""# Fidelity

Written by `make fidelity`; do not edit. The sample DiT (5.0 M parameters, Fashion-MNIST, 28 x 28),
35 DDIM steps, guidance 1.5, ONNX Runtime {versions["onnxruntime"]} on {_threads(machine)}
of {machine["processor"]}.

- MACs and time: share of the full run; time is the median of interleaved runs of 32 images.
- L2 error and PSNR: against the full run of the same seeds, mean over 256 held-out seeds; "to
  500" is against a 500-step DDIM run of the same seeds.
- FID and IS: {images} images, features of the sample classifier, FID against the 10,000 test
  images. They compare rows of this table and nothing else.
- Statistics, the choice of a schedule, searches, and this table use different seeds. Rows
  "searched" are plans of `Plan.search`, from three recorded batches of 32.

![relative error against time, every method](fidelity.png)"""


def _threads(machine: Mapping[str, Any]) -> str:
    return "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"


def _tables(rows: Sequence[Row]) -> str:
    parts = [_table(rows[:1])]
    for refreshes in sorted({row["refreshes"] for row in rows[1:]}):
        group = [row for row in rows[1:] if row["refreshes"] == refreshes]
        parts.append(f"## {refreshes} full evaluations of 35\n\n{_table(group)}")
    return "\n\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    for row in rows:
        full, fine = row["to_full"], row["to_reference"]
        psnr = "" if full["relative_error"] == 0 else f"{full['psnr']:.1f}"
        cells = (
            f"{row['family']}: {row['name']}",
            f"{row['macs_share']:.3f}",
            f"{row['time_share']:.3f}",
            f"{full['relative_error']:.4f} ± {full['standard_error']:.4f}",
            psnr,
            f"{fine['relative_error']:.4f}",
            f"{fine['psnr']:.1f}",
            f"{row['fid']:.3f}",
            f"{row['inception']:.3f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _targets(rows: Sequence[Row]) -> str:
    lines = [
        "## Targets",
        "",
        "| target | measured | met |",
        "|---|---|---|",
    ]
    for wanted, measured, met in _checks(rows):
        lines.append(f"| {wanted} | {measured} | {'yes' if met else '**no**'} |")
    return "\n".join(lines)


def _evaluation(path: Path) -> str:
    """Figures of the plan that ships with the sample, each with its interval."""
    evaluation = EVALUATION.read(path)
    assert evaluation.reference is not None
    lines = [
        f"## The released plan, {evaluation.samples:,} images",
        "",
        f"`make evaluation`: seeds 0 to {evaluation.samples - 1:,} in full and under "
        f"`samples/fashion_dit/plan`, eight bits, FID against {evaluation.reference.images:,} test "
        f"images. Intervals of 95 %: jackknife over {evaluation.samples // evaluation.shard} "
        f"shards; the reference is taken as it is. {evaluation.equal_images:,} images are equal in "
        "both, and not in the mean of PSNR.",
        "",
        "| figure | value | 95 % interval |",
        "|---|---:|---:|",
    ]
    for name, figure in evaluation.figures.items():
        lines.append(f"| {FIGURES[name]} | {figure.value:.4f} | {_interval(figure)} |")
    return "\n".join(lines)


def _interval(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return "unknown"
    return f"{figure.low:.4f} to {figure.high:.4f}"


def _checks(rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    checks = []
    full = rows[0]
    for refreshes in (18, 12):
        group = [row for row in rows[1:] if row["refreshes"] == refreshes]
        paper = min(_error(row) for row in group if row["family"].startswith("paper"))
        ours = next(row for row in group if row["family"] == "ours, CALIBRATE")
        ratio = _error(ours) / paper
        wanted = f"interval {round(35 / refreshes)}, equal MACs: at most 0.35 of the paper's best"
        checks.append((wanted, f"{_error(ours):.4f} / {paper:.4f} = {ratio:.2f}", ratio <= 0.35))
    own = ("ours", "uniform", "searched")
    peers = [row for row in rows[1:] if not row["family"].startswith(own)]
    for ours in (row for row in rows if row["family"] == "ours, FORECAST"):
        rivals = _within(peers, ours["time_share"] * 1.02)
        best = min(rivals, key=_error)
        ratio = _error(ours) / _error(best)
        wanted = f"time {ours['time_share']:.2f}: error below every peer that takes no longer"
        measured = f"{_error(ours):.4f}, {best['family']} {_error(best):.4f} (ratio {ratio:.2f})"
        checks.append((wanted, measured, ratio < 1))
        best_fid = min(row["fid"] for row in rivals)
        wanted = f"time {ours['time_share']:.2f}: FID no worse than the best of them"
        checks.append((wanted, f"{ours['fid']:.3f}, {best_fid:.3f}", ours["fid"] <= best_fid))
    checks += _search_checks(rows)
    for refreshes, allowed in ((18, 1.02), (12, 1.05)):
        ours = next(
            r for r in rows if r["refreshes"] == refreshes and r["family"] == "ours, FORECAST"
        )
        wanted = f"{refreshes} of 35: FID at most {allowed} of the full run's"
        ratio = ours["fid"] / full["fid"]
        checks.append(
            (wanted, f"{ours['fid']:.3f} / {full['fid']:.3f} = {ratio:.3f}", ratio <= allowed)
        )
    return checks


def _search_checks(rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    """What searches are asked for: against even schedules, and in time."""
    checks = []
    even = ("REUSE", "paper", "ours, CALIBRATE", "uniform", "final-output", *RECENT)
    searched = [row for row in rows if row["family"] == "searched"]
    for row in searched:
        if row.get("budget") is not None:
            budget = row["budget"]
            others = [r for r in rows if r["family"].startswith(even)]
            best = min(_within(others, budget), key=_error)
            ratio = _error(row) / _error(best)
            wanted = f"budget {budget:g} of the time: error at most 0.6 of the best even schedule"
            measured = (
                f"{_error(row):.4f} at {row['time_share']:.3f}, {best['family']} "
                f"{_error(best):.4f} at {best['time_share']:.3f} (ratio {ratio:.2f})"
            )
            checks.append((wanted, measured, ratio <= 0.6 and row["time_share"] <= budget))
        else:
            wanted = f"{row['name']}: kept by 0.95 of the images"
            checks.append((wanted, f"{row['kept']:.3f}", row["kept"] >= 0.95))
    longest = max((row["search_runs"] for row in searched), default=0.0)
    if searched:
        wanted = "a search takes less than 10 full runs"
        checks.append((wanted, f"{longest:.1f}, the longest", longest < 10))
    return checks


def _within(rows: Sequence[Row], time_share: float) -> list[Row]:
    """Those that take no longer; the fastest where none does."""
    limit = max(time_share, min(row["time_share"] for row in rows))
    return [row for row in rows if row["time_share"] <= limit]


def _error(row: Row) -> float:
    error: float = row["to_full"]["relative_error"]
    return error


def plot(rows: Sequence[Row], path: Path) -> None:
    """Relative error against the share of time, a curve for every family."""
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for family in dict.fromkeys(row["family"] for row in rows[1:]):
        points = sorted(
            (row["time_share"], _error(row)) for row in rows[1:] if row["family"] == family
        )
        ours = family.startswith(("ours", "searched"))
        paper, recent = family.startswith("paper"), family.startswith(RECENT)
        axes.plot(
            *zip(*points, strict=True),
            label=family,
            marker="o" if ours else ".",
            linewidth=2.5 if ours else 1,
            linestyle="--" if paper else ":" if recent else "-",
        )
    axes.set_yscale("log")
    axes.set_xlabel("time, share of the full run")
    axes.set_ylabel("relative L2 error against the full run, 256 held-out seeds")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    docs = Path(__file__).parents[2] / "docs"
    write_report(json.loads((docs / "fidelity.json").read_text()), docs)
