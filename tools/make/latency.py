"""`calicache latency`: time the steps of a model on this machine, for plan searches."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from calicache.export.latency import measure_latency
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.settings.latency import LatencyTable
from calicache.tools.terminal.model_file import load_model
from calicache.tools.terminal.options import check_output
from calicache.tools.terminal.progress import progress_shown
from calicache.tools.terminal.text import format_count, plain_table, show

STEADY = 0.1  # share that the plain step may move by while others are measured


def latency(
    model: str, recording: Path, output: Path, order: int, provider: str, repeats: int
) -> None:
    """Measure, save and show the table."""
    fits = not output.exists() or _is_table(output)
    check_output(output, fits, "a new file, or a latency table to replace")
    runs = Recording.load(recording)
    with progress_shown() as on_progress:
        table = measure_latency(
            load_model(model),
            runs,
            order=order,
            provider=provider,
            repeats=repeats,
            on_progress=on_progress,
        )
    table.save(output)
    show(Group(*_described(table)))
    typer.echo(f"\nTable written: {output}")
    named = shlex.quote(str(output))
    typer.echo(f"Use it: calicache search MODEL RECORDING -o PLAN --budget 0.5 --latency {named}")


def _described(table: LatencyTable) -> Iterator[RenderableType]:
    yield Text(f"{table.runtime}, order {table.order}", style="bold")
    yield Text(f"a plain step takes {1000 * table.plain:.3g} ms\n")
    rows = [
        (row.group, row.choice, format_count(row.macs), *_shares(table, row.refresh, row.step))
        for row in table.rows
    ]
    forecast = ("whole model", "forecast", "0", "", *_shares(table, table.forecast))
    left, right = ("branches", "treated as"), ("MACs", "refresh", "step")
    yield plain_table(left, right, [*rows, forecast])
    yield Text("refresh and step: of a plain step, with only these branches treated", style="dim")
    spread = float(table.environment.get("plain_spread", "0"))
    if spread > STEADY:
        yield Text(
            f"The plain step itself moved by {100 * spread:.0f} % meanwhile: something else ran on "
            "this machine. Measure again when it is quiet.",
            style="yellow",
        )


def _shares(table: LatencyTable, *seconds: float) -> Iterator[str]:
    return (f"{value / table.plain:.3f}" for value in seconds)


def _is_table(path: Path) -> bool:
    try:
        LatencyTable.load(path)
    except PlanError:
        return False
    return True
