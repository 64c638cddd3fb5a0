"""Pieces of text that several commands print: schedules, counts, lists of facts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import typer
from pydantic import TypeAdapter
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from calicache.export.artifact.manifest import FileRecord
from calicache.graph_passes.recording.signature import ConstantSpec
from calicache.graph_passes.settings.choices import STEP_LETTERS, StepMode

T = TypeVar("T")

_STYLES = {
    StepMode.REFRESH: "bold red",
    StepMode.CALIBRATE: "yellow",
    StepMode.REUSE: "green",
    StepMode.FORECAST: "cyan",
}
STEPS_A_LINE = 50


def schedule_strip(schedule: Sequence[StepMode]) -> Iterator[Text]:
    """One letter a step, `R` `C` `U` `F`, fifty steps a line, with the step number in front."""
    for start in range(0, len(schedule), STEPS_A_LINE):
        line = Text(f"{start:4d}  ")
        for mode in schedule[start : start + STEPS_A_LINE]:
            line.append(STEP_LETTERS[mode], style=_STYLES[mode])
        yield line
    names = ", ".join(f"{STEP_LETTERS[mode]} {mode.name.lower()}" for mode in StepMode)
    yield Text(f"      {names}", style="dim")


def format_count(value: float, unit: str = "") -> str:
    """1234567 as `1.23 M`."""
    for prefix in ("", "k", "M", "G"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}{unit}".rstrip()
        value /= 1000
    return f"{value:.3g} T{unit}"


def fact_grid(facts: Iterable[tuple[str, str]]) -> Table:
    """Names and values in two columns; long values are broken."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(name, Text(value))  # Text: what looks like rich's markup is none
    return grid


def plain_table(
    left: Sequence[str], right: Sequence[str] = (), rows: Iterable[Sequence[str]] = ()
) -> Table:
    """A table without lines; its first columns stand left and may be broken, the others right."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: what looks like rich's markup is none
    return table


def show(shown: RenderableType) -> None:
    """Print what rich lays out; into a file without colours."""
    Console(highlight=False).print(shown)


def show_value(value: T, describe: Callable[[T], RenderableType], *, json: bool) -> None:
    """Print a dataclass as JSON, or as it is described."""
    if json:
        typer.echo(json_text(value))
    else:
        show(describe(value))


def json_text(value: Any) -> str:
    """A dataclass as JSON: its attributes; numbers that are not finite are null."""
    return TypeAdapter(type(value)).dump_json(value, indent=2).decode()


def title(name: str) -> Text:
    """The heading of a section, an empty line in front."""
    return Text(f"\n{name}", style="bold")


def files_in_words(files: Sequence[FileRecord]) -> str:
    """Names, sizes and the start of every file's SHA-256."""
    return "\n".join(
        f"{file.name}, {format_count(file.size, 'B')}, sha256 {file.sha256[:16]}" for file in files
    )


def some_of(items: Sequence[str], most: int = 12) -> str:
    """One a line; where there are many, the first and how many more."""
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return "\n".join([*items[:most], *more])


def some_names(names: Sequence[str], most: int = 5) -> str:
    """The first few of many names, in one line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def constants_in_words(constants: Sequence[ConstantSpec]) -> str:
    """The arguments of a call that are no tensors, None left out."""
    given = (f"{spec.name}={spec.value!r}" for spec in constants if spec.value is not None)
    return ", ".join(given) or "tensors alone"
