"""What `calicache latency` does: time the steps of a model on this machine, for plan searches."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from calicache.export.latency import measure_latency
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.common.progress import Progress
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.settings.latency import LatencyTable
from calicache.tools.terminal.model_file import load_model
from calicache.tools.terminal.progress import progress_shown
from calicache.tools.terminal.text import format_count

STEADY = 0.1  # share that the plain step may move by while others are measured


@dataclass(frozen=True, slots=True)
class LatencyArguments:
    """The command line of `calicache latency`.

    Attributes:
        model: what `load_model` takes.
        recording: recorded runs of it.
        output: file of the table.
        order, provider, repeats: of `measure_latency`.
    """

    model: str
    recording: Path
    output: Path
    order: int
    provider: str
    repeats: int


def run_latency(arguments: LatencyArguments, console: Console, progress: Console) -> None:
    """Measure, save, and print the table.

    Args:
        arguments: as given.
        console: for the result.
        progress: for everything else.

    Raises:
        CalicacheError: something that the arguments name is refused.
    """
    _check_output(arguments.output)
    recording = Recording.load(arguments.recording)
    with progress_shown(progress) as report:

        def on_row(done: int, total: int) -> None:
            report(Progress(done, total, f"time steps, {done} of {total} rows"))

        table = measure_latency(
            load_model(arguments.model),
            recording,
            order=arguments.order,
            provider=arguments.provider,
            repeats=arguments.repeats,
            on_row=on_row,
        )
    table.save(arguments.output)
    for part in _described(table):
        console.print(part)
    named = shlex.quote(str(arguments.output))
    for line in (
        f"\nTable written: {arguments.output}",
        f"Use it: calicache plan MODEL RECORDING -o PLAN --budget 0.5 --latency {named}",
    ):
        console.print(line, markup=False, soft_wrap=True)


def _described(table: LatencyTable) -> Iterator[RenderableType]:
    yield Text(f"{table.runtime}, order {table.order}", style="bold")
    yield Text(f"a plain step takes {1000 * table.plain:.3g} ms\n")
    shown = Table(box=None, padding=(0, 1), header_style="dim")
    for column in ("branches", "treated as", "MACs", "refresh", "step"):
        left = column in ("branches", "treated as")
        shown.add_column(column, justify="left" if left else "right", overflow="fold")
    for row in table.rows:
        shares = (f"{seconds / table.plain:.3f}" for seconds in (row.refresh, row.step))
        shown.add_row(row.group, row.choice, format_count(row.macs), *shares)
    shown.add_row("whole model", "forecast", "0", "", f"{table.forecast / table.plain:.3f}")
    yield shown
    yield Text("refresh and step: of a plain step, with only these branches treated", style="dim")
    spread = float(table.environment.get("plain_spread", "0"))
    if spread > STEADY:
        yield Text(
            f"The plain step itself moved by {100 * spread:.0f} % meanwhile: something else ran on "
            "this machine. Measure again when it is quiet.",
            style="yellow",
        )


def _check_output(output: Path) -> None:
    # Saving replaces whatever lies there; a mistyped -o must not cost a recording.
    if not output.exists():
        return
    try:
        LatencyTable.load(output)
    except PlanError as error:
        raise PlanError(
            f"-o {output}",
            expected="a new file, or a latency table to replace",
            got="a folder" if output.is_dir() else "another file",
            fix="Choose another name.",
        ) from error
