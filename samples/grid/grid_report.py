"""From docs/grid.json to docs/grid.md and a chart for each model.

python samples/grid/grid_report.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from cells import BUDGETS, SAMPLERS, SCALES, Cell

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = Mapping[str, Any]
CellFigures = Mapping[str, Any]

TOLERANCE = 1.02  # of measured time: rows within it count as equally long
STRICT_BUDGETS = (0.35, 0.5)  # where the worst cell has a bar
SEARCH_BUDGETS = (0.2, 0.35, 0.5)
SEARCH_BARS = {"fashion": 0.5, "scenes": 0.6}
TITLES = {"fashion": "Sample DiT (Fashion-MNIST)", "scenes": "Scenes DiT (captions, latents)"}
EVEN = ("ours, even FORECAST", "ours, int8")


def best_row(rows: Sequence[Row], time: float, error: str = "error") -> Row | None:
    """The row with the least error of a kind that takes no longer; None where every one does."""
    within = [row for row in rows if row["time"] <= time * TOLERANCE]
    return min(within, key=lambda row: row[error], default=None)


def family_rows(rows: Sequence[Row], *families: str) -> list[Row]:
    """Rows of some families."""
    return [row for row in rows if row["family"] in families]


def peer_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows that are not calicache's, without the full run."""
    return [row for row in rows if not row["ours"] and row["family"] != "full"]


def write_report(result: Mapping[str, Any], docs: Path) -> None:
    """Write the page and the charts."""
    cells: Sequence[CellFigures] = result["cells"]
    parts = [_heading(result), _bars(cells)]
    for subject in SAMPLERS:
        own = [cell for cell in cells if cell["subject"] == subject]
        if own:
            _plot(own, docs / f"grid-{subject}.png")
            parts.append(f"## {TITLES[subject]}\n\n![error against time](grid-{subject}.png)")
            parts += [_cell_table(cell) for cell in own]
    notes = docs / "grid-notes.md"
    if notes.exists():
        parts.append(notes.read_text().strip())
    (docs / "grid.md").write_text("\n\n".join(parts) + "\n")


def _heading(result: Mapping[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    cell = result["cells"][0]
    return f"""# Error per second

How far do images move when a run takes a fifth, a third, half of its time? Written by `make grid`;
do not edit. ONNX Runtime {versions["onnxruntime"]}, {threads} of {machine["processor"]}.

- Error: relative L2 distance of the final latents from the full run's of the same seeds, mean over
  {cell["images"]} unseen seeds. The second table of a case has the distance from a run of 8 times
  the steps, from which the full run is off itself.
- Time: share of the full run, median of runs in turn, batches of {cell["batch"]}. A figure in a
  budget's column is the best of its family that takes no longer.
- FID: {cell["set_images"]} images, features of the sample classifier or of the autoencoder's
  encoder; intervals of 95 % over the seeds. It compares figures of this page and nothing else.
- Peers are written from their formulas (`samples/fashion_dit/peers.py`), at the model's final
  output, with evenly spaced full steps in the better of two ways."""


def _bars(cells: Sequence[CellFigures]) -> str:
    lines = ["## Bars", "", "| bar | measured | met |", "|---|---|---|"]
    for wanted, measured, met in _checks(cells):
        lines.append(f"| {wanted} | {measured} | {'yes' if met else '**no**'} |")
    return "\n".join(lines)


def _checks(cells: Sequence[CellFigures]) -> Iterator[tuple[str, str, bool]]:
    ratios = {
        (_title(cell), budget): ratio
        for cell in cells
        for budget in BUDGETS
        if (ratio := _peer_ratio(cell, budget)) is not None
    }
    strict = {key: ratio for key, ratio in ratios.items() if key[1] in STRICT_BUDGETS}
    worst = max(strict, key=strict.__getitem__)
    yield (
        "searched against the best peer that takes no longer: at most 0.6 in the worst cell at "
        "budgets 0.35 and 0.5",
        f"{strict[worst]:.2f} ({worst[0]}, budget {worst[1]:g})",
        strict[worst] <= 0.6,
    )
    median = statistics.median(ratios.values())
    yield "the same: at most 0.35, median of all cells and budgets", f"{median:.2f}", median <= 0.35
    differences = [d["difference"]["low"] <= 0 for cell in cells for d in cell["distances"][1:]]
    yield (
        "FID no higher than the best peer's, or within the interval of the difference, everywhere",
        f"{sum(differences)} of {len(differences)}",
        all(differences),
    )
    for subject, bar in SEARCH_BARS.items():
        yield from _search_check([c for c in cells if c["subject"] == subject], subject, bar)
    for cell in cells:
        yield from _integer_check(cell)


def _peer_ratio(cell: CellFigures, budget: float) -> float | None:
    """Error of the searched plan against the best peer's in the same time."""
    searched = best_row(family_rows(cell["rows"], "searched"), budget)
    peer = best_row(peer_rows(cell["rows"]), budget)
    if searched is None or peer is None:
        return None
    ratio: float = searched["error"] / peer["error"]
    return ratio


def _search_check(
    cells: Sequence[CellFigures], subject: str, bar: float
) -> Iterator[tuple[str, str, bool]]:
    ratios = []
    for cell in cells:
        for budget in SEARCH_BUDGETS:
            searched = best_row(family_rows(cell["rows"], "searched"), budget)
            even = best_row(family_rows(cell["rows"], *EVEN), budget)
            if searched is not None and even is not None:
                ratios.append(searched["error"] / even["error"])
    if ratios:
        wanted = f"{TITLES[subject]}: searched against the best even plan, at most {bar:g}"
        median = statistics.median(ratios)
        yield wanted, f"{median:.2f} in the median, {max(ratios):.2f} at most", max(ratios) <= bar


def _integer_check(cell: CellFigures) -> Iterator[tuple[str, str, bool]]:
    """Increments in int8 against forecasts in the same time."""
    row = next(
        (r for r in family_rows(cell["rows"], "ours, int8") if r["label"].endswith(" 6")), None
    )
    if row is None:
        return
    forecast = best_row(family_rows(cell["rows"], "ours, even FORECAST"), row["time"])
    if forecast is None:
        return
    ratio = row["error"] / forecast["error"]
    yield (
        f"{_title(cell)}: int8 increments, interval 6, at most 0.5 of FORECAST in the same time",
        f"{ratio:.2f} at {row['time']:.2f} of the time",
        ratio <= 0.5,
    )


def _title(cell: CellFigures) -> str:
    place = Cell(cell["subject"], cell["sampler"], cell["steps"], cell["scale"])
    return f"{cell['subject']}, {place.title}"


def _cell_table(cell: CellFigures) -> str:
    """Families by rows, budgets by columns."""
    rows = cell["rows"][1:]
    lines = [
        f"### {_title(cell)}",
        "",
        "| error (time) | " + " | ".join(f"{budget:g}" for budget in BUDGETS) + " |",
        "|---" + "|---:" * len(BUDGETS) + "|",
    ]
    for family in dict.fromkeys(row["family"] for row in rows):
        if family == "searched with a reference":  # it does not aim at the full run
            continue
        best = [best_row(family_rows(rows, family), budget) for budget in BUDGETS]
        figures = [f"{row['error']:.4f} ({row['time']:.2f})" if row else "" for row in best]
        name = f"**{family}**" if any(row["ours"] for row in family_rows(rows, family)) else family
        lines.append(f"| {name} | " + " | ".join(figures) + " |")
    return "\n".join([*lines, "", _reference_table(cell), "", _distance_table(cell)])


def _reference_table(cell: CellFigures) -> str:
    """The nearest to a run of many more steps, calicache's and the peers', by budget."""
    full, *rows = cell["rows"]
    lines = [
        f"From {8 * cell['steps']} steps the full run is {full['to_reference']:.4f} off.",
        "",
        "| distance from it (time) | " + " | ".join(f"{budget:g}" for budget in BUDGETS) + " |",
        "|---" + "|---:" * len(BUDGETS) + "|",
    ]
    groups = {
        "best peer": peer_rows(rows),
        "searched": family_rows(rows, "searched"),
        "**searched with a reference**": family_rows(rows, "searched with a reference"),
    }
    for name, group in groups.items():
        best = [best_row(group, budget, "to_reference") for budget in BUDGETS]
        figures = [f"{row['to_reference']:.4f} ({row['time']:.2f})" if row else "" for row in best]
        lines.append(f"| {name} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def _distance_table(cell: CellFigures) -> str:
    full, *others = cell["distances"]
    lines = [
        f"FID of the full run: {_interval(full['full'])}.",
        "",
        "| budget | searched | best peer by error | difference |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {one['budget']:g} | {_interval(one['searched'])} | {one['peer']}: "
        f"{_interval(one['best peer'])} | {_interval(one['difference'])} |"
        for one in others
    ]
    return "\n".join(lines)


def _interval(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def _plot(cells: Sequence[CellFigures], path: Path) -> None:
    """A chart for every case: error against time, a curve for every family."""
    samplers = list(dict.fromkeys((cell["sampler"], cell["steps"]) for cell in cells))
    size = (5 * len(SCALES), 4 * len(samplers))
    figure, charts = plt.subplots(
        len(samplers), len(SCALES), figsize=size, layout="constrained", squeeze=False
    )
    for cell in cells:
        place = samplers.index((cell["sampler"], cell["steps"])), SCALES.index(cell["scale"])
        _chart(charts[place], cell)
    handles = {
        label: handle
        for axes in charts.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _chart(axes: Any, cell: CellFigures) -> None:
    rows = cell["rows"][1:]
    rows = [row for row in rows if row["family"] != "searched with a reference"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    for number, family in enumerate(families):
        own = family_rows(rows, family)
        points = sorted((row["time"], row["error"]) for row in own)
        ours = own[0]["ours"]
        axes.plot(
            *zip(*points, strict=True),
            label=family,
            color=plt.get_cmap("tab20")(number % 20),
            marker="o" if ours else ".",
            linewidth=2.5 if ours else 1,
        )
    axes.set_yscale("log")
    axes.set_title(_title(cell), fontsize=10)
    axes.set_xlabel("time, share of the full run")
    axes.set_ylabel("relative L2 error")
    axes.grid(alpha=0.3, which="both")


if __name__ == "__main__":
    folder = Path(__file__).parents[2] / "docs"
    write_report(json.loads((folder / "grid.json").read_text()), folder)
