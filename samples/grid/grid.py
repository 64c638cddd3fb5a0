"""Measure every way to sample in every cell of the grid; goes on where it stopped.

    python samples/grid/grid.py --cells 'fashion*'

Of every cell: plans and artifacts; seconds, all rows in turn; errors against the full run; FID of
the best peer and of the searched plan at every budget. Statistics, choices, searches and the
figures use different seeds. Writes docs/grid.json, and from it docs/grid.md and the charts.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cells import BUDGETS, CELLS
from frechet import FrechetDistance
from grid_report import best_row, family_rows, peer_rows, write_report
from grid_shared import sample_errors, save_atomic
from rows import Row, Schedule, grid_rows
from runs import BATCH, Bench, Material, prepare, prepare_material
from safetensors.torch import load_file
from subjects import Subject, load_subject
from tqdm import tqdm

from calicache.graph_passes.common.environment import environment
from calicache.graph_passes.settings.choices import STEP_LETTERS

TIME_SEED = 5
PAPER_SHARE = 9  # the paper's rank is the width over this


@dataclass(frozen=True, slots=True)
class Settings:
    """How much to measure.

    Attributes:
        images: samples whose error is measured.
        set_images: samples of a set for FID.
        repeats: timed runs of every row.
        out: where everything is kept.
    """

    images: int
    set_images: int
    repeats: int
    out: Path


def main() -> None:
    """Command line."""
    arguments = _parser().parse_args()
    settings = Settings(arguments.images, arguments.set_images, arguments.repeats, arguments.out)
    cells = [cell for cell in CELLS if fnmatch.fnmatch(cell.key, arguments.cells)]
    subjects: dict[str, Subject] = {}
    for cell in cells:
        if cell.subject not in subjects:
            subjects[cell.subject] = load_subject(cell.subject, arguments.data)
        bench = Bench(cell, subjects[cell.subject], settings.out / cell.key)
        bench.folder.mkdir(parents=True, exist_ok=True)
        measure_cell(bench, settings)
    result = {**environment(), "cells": [*_measured(settings.out)]}
    arguments.docs.mkdir(parents=True, exist_ok=True)
    (arguments.docs / "grid.json").write_text(json.dumps(result, indent=1) + "\n")
    write_report(result, arguments.docs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cells", default="*", help="shell pattern of cells' names")
    parser.add_argument("--images", type=int, default=128, help="whose error is measured")
    parser.add_argument("--set-images", type=int, default=2048, help="of a set for FID")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of every row")
    parser.add_argument("--data", type=Path, help="folder with the files of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("out/grid"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    return parser


def measure_cell(bench: Bench, settings: Settings) -> None:
    """Everything of one cell, into `cell.json`."""
    path = bench.folder / "cell.json"
    if path.exists():
        return
    rank = bench.subject.model.config.width // PAPER_SHARE
    material = prepare_material(bench, rank)
    outputs = torch.stack([material.recording.outputs[k] for k in range(bench.cell.steps)])
    full = bench.full_row
    rows = [full, *grid_rows(bench.cell, material.table, outputs, rank)]
    schedules = _prepared(bench, rows, material)
    seconds = _seconds(bench, rows, schedules, settings.repeats)
    errors = _errors(bench, rows, schedules, settings.images)
    table = [
        {
            "family": row.family,
            "label": row.label,
            "key": row.key,
            "budget": row.budget,
            "ours": row.is_ours,
            "schedule": "".join(map(STEP_LETTERS.__getitem__, schedules[row.key])),
            "time": seconds[row.key] / seconds[full.key],
            **errors[row.key],
        }
        for row in rows
    ]
    distances = _distances(bench, rows, schedules, table, settings.set_images)
    cell = {**asdict(bench.cell), "batch": BATCH, "images": settings.images}
    facts = {"set_images": settings.set_images, "rows": table, "distances": distances}
    path.write_text(json.dumps({**cell, **facts}))


def _prepared(bench: Bench, rows: Sequence[Row], material: Material) -> dict[str, Schedule]:
    told = tqdm(rows, desc=f"{bench.cell.key}: plan and export")
    return {row.key: prepare(bench, row, material) for row in told}


def _seconds(
    bench: Bench, rows: Sequence[Row], schedules: Mapping[str, Schedule], repeats: int
) -> dict[str, float]:
    """Median seconds of one batch by row, all rows in turn."""
    path = bench.folder / "seconds.json"
    if path.exists():
        return json.loads(path.read_text())
    seconds: dict[str, list[float]] = {row.key: [] for row in rows}
    for repeat in tqdm(range(repeats), desc=f"{bench.cell.key}: time"):
        for row in rows:
            session = bench.session(row)
            if not repeat:  # the first run of a session warms up
                bench.sample_in(session, row, schedules[row.key], TIME_SEED)
            start = time.perf_counter()
            bench.sample_in(session, row, schedules[row.key], TIME_SEED)
            seconds[row.key].append(time.perf_counter() - start)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    path.write_text(json.dumps(medians))
    return medians


def _errors(
    bench: Bench, rows: Sequence[Row], schedules: Mapping[str, Schedule], images: int
) -> dict[str, dict[str, float]]:
    """Mean relative error of the latents by row, its standard error, and that to a reference."""
    exact = _exact(bench, images)
    full: torch.Tensor | None = None
    errors: dict[str, dict[str, float]] = {}
    for row in tqdm(rows, desc=f"{bench.cell.key}: errors"):
        path = bench.folder / f"{row.key}.error.json"
        if path.exists() and full is not None:
            errors[row.key] = json.loads(path.read_text())
            continue
        latents = torch.cat([*bench.batches(row, schedules[row.key], images)])
        full = latents if full is None else full
        off, to_exact = (sample_errors(latents, other) for other in (full, exact))
        errors[row.key] = {
            "error": float(off.mean()),
            "standard_error": float(off.std()) / len(off) ** 0.5,
            "to_reference": float(to_exact.mean()),
        }
        path.write_text(json.dumps(errors[row.key]))
    return errors


def _exact(bench: Bench, images: int) -> torch.Tensor:
    """Latents of a run in many more steps, (images, ...); kept on disk."""
    path, row = bench.folder / "reference.safetensors", bench.reference_row
    if not path.exists():
        save_atomic({"latents": torch.cat([*bench.batches(row, (), images)])}, path)
    return load_file(path)["latents"]


def _distances(
    bench: Bench,
    rows: Sequence[Row],
    schedules: Mapping[str, Schedule],
    table: Sequence[Mapping[str, Any]],
    images: int,
) -> list[dict[str, Any]]:
    """FID of the full run, and at every budget of the best peer and of the searched plan."""
    distance = FrechetDistance(bench.subject.real())
    full = _features(bench, rows[0], schedules, images)
    distances: list[dict[str, Any]] = [{"budget": None, "full": asdict(distance.interval(full))}]
    by_key = {row.key: row for row in rows}
    for budget in BUDGETS:
        searched = best_row(family_rows(table, "searched"), budget)
        peer = best_row(peer_rows(table), budget)
        if searched is None or peer is None:
            continue
        own, other = (
            _features(bench, by_key[row["key"]], schedules, images) for row in (searched, peer)
        )
        distances.append(
            {
                "budget": budget,
                "peer": peer["family"],
                "searched": asdict(distance.interval(own)),
                "best peer": asdict(distance.interval(other)),
                "difference": asdict(distance.difference(own, other)),
            }
        )
    return distances


def _features(
    bench: Bench, row: Row, schedules: Mapping[str, Schedule], images: int
) -> torch.Tensor:
    """Features (images, F) of a row's samples; kept on disk."""
    path = bench.folder / f"{row.key}.features.safetensors"
    if not path.exists():
        batches = bench.batches(row, schedules[row.key], images)
        save_atomic({"features": torch.cat([*map(bench.subject.features, batches)])}, path)
    return load_file(path)["features"]


def _measured(out: Path) -> Iterator[dict[str, Any]]:
    """The cells that are done, in the grid's order."""
    paths = (out / cell.key / "cell.json" for cell in CELLS)
    return (json.loads(path.read_text()) for path in paths if path.exists())


if __name__ == "__main__":
    main()
