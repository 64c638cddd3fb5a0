"""`calicache bench`: measure models in every layout beside their peers, and write the figures."""

from __future__ import annotations

from pathlib import Path

import typer

from calicache.graph_passes.common.environment import environment
from calicache.tools.bench.compile_time import measure_compile
from calicache.tools.bench.report import write_report
from calicache.tools.bench.rows import BenchSettings
from calicache.tools.bench.run import run_bench
from calicache.tools.bench.start_time import measure_start
from calicache.tools.terminal.progress import progress_shown


def bench(
    models: list[str],
    interval: int,
    steps: int,
    rank: int | None,
    order: int,
    repeats: int,
    row: list[str] | None,
    compile_only: bool,
    provider: str,
    work: Path,
    docs: Path,
) -> None:
    """Measure every model, and write the figures."""
    results = []
    with progress_shown() as on_progress:
        for number, model in enumerate(models):
            settings = BenchSettings(
                model=model,
                interval=interval,
                steps=steps,
                rank=rank,
                order=order,
                repeats=repeats,
                folder=work / str(number),
                rows=tuple(row or ()),
                provider=provider,
            )
            measure = measure_compile if compile_only else run_bench
            results.append(measure(settings, on_progress))
    measured = {**environment(), "models": results, "start": measure_start()}
    compiled = {"compile": {**environment(), "results": results}}
    write_report(compiled if compile_only else measured, docs)
    typer.echo(f"Written: {docs / 'performance.md'}")
