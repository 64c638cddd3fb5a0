"""`calicache bench`: measure models in every layout beside their peers, and write the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calicache.graph_passes.common.environment import environment
from calicache.tools.bench.compile_time import measure_compile
from calicache.tools.bench.models import MODELS
from calicache.tools.bench.report import write_report
from calicache.tools.bench.rows import BenchSettings
from calicache.tools.bench.run import run_bench
from calicache.tools.terminal.options import CPU, Provider
from calicache.tools.terminal.progress import progress_shown

OUT = Path("out")


def bench(
    models: Annotated[
        list[str],
        typer.Argument(help=f"{', '.join(MODELS)}, or FILE.py:FUNCTION that gives a BenchModel."),
    ],
    interval: Annotated[int, typer.Option(help="Steps from REFRESH to REFRESH.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps of a run.")] = 9,
    rank: Annotated[
        int | None, typer.Option(help="Of the branches; width / 9 if left out.")
    ] = None,
    order: Annotated[int, typer.Option(help="Of the anchors, 0 to 2.")] = 0,
    repeats: Annotated[int, typer.Option(help="Timed runs of every row.")] = 5,
    row: Annotated[
        list[str] | None, typer.Option(help="Measure this row alone; may be given several times.")
    ] = None,
    compile_only: Annotated[
        bool, typer.Option("--compile", help="Measure what compiling takes, and nothing else.")
    ] = False,
    provider: Provider = CPU,
    work: Annotated[Path, typer.Option(help="For plans and artifacts.")] = OUT / "bench",
    docs: Annotated[Path, typer.Option(help="For performance.md and performance.json.")] = OUT,
) -> None:
    """Run a model with and without calicache, side by side, and write the figures.

    Example: calicache bench dit-s --repeats 3

    What is in performance.json already and not measured now stays there.
    """
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
    compiled = {**environment(), "results": results}
    write_report(
        {"compile": compiled} if compile_only else {**environment(), "models": results}, docs
    )
    typer.echo(f"Written: {docs / 'performance.md'}")
