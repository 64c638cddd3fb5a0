"""The `calicache` command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter
from rich.console import Console

from calicache.export.manifest import Manifest, load_artifact
from calicache.graph_passes.errors import CalicacheError
from calicache.tools.bench import run_bench
from calicache.tools.bench_models import MODELS
from calicache.tools.bench_report import write_report
from calicache.tools.bench_rows import BenchSettings
from calicache.tools.environment import environment
from calicache.tools.inspect_artifact import describe_artifact

app = typer.Typer(
    name="calicache",
    help="Look at what calicache did to a diffusion transformer, and measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _main() -> None:
    """Look at what calicache did to a diffusion transformer."""


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="An artifact written by export_onnx.")],
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Print the sites, rejections, schedule and costs of an artifact.

    Example: calicache inspect out/dit.onnx.d
    """
    with _errors_shown():
        manifest = load_artifact(directory)
    if json:
        typer.echo(TypeAdapter(Manifest).dump_json(manifest, indent=2).decode())
    else:
        Console(highlight=False).print(describe_artifact(manifest))


@app.command()
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
    provider: Annotated[str, typer.Option(help="Of ONNX Runtime.")] = "CPUExecutionProvider",
    work: Annotated[Path, typer.Option(help="For plans and artifacts.")] = Path("out/bench"),
    docs: Annotated[Path, typer.Option(help="For performance.md and performance.json.")] = Path(
        "out"
    ),
) -> None:
    """Run a model with and without calicache, side by side, and write the figures.

    Example: calicache bench dit-s --repeats 3
    """
    console = Console(highlight=False)
    results = []
    with _errors_shown(), console.status("") as status:

        def tick(what: str) -> None:
            status.update(what)

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
            results.append(run_bench(settings, tick))
    write_report({**environment(), "models": results}, docs)
    console.print(f"Written: {docs / 'performance.md'}")


@contextmanager
def _errors_shown() -> Iterator[None]:
    """What calicache refuses, as a message on the error stream and exit code 1."""
    try:
        yield
    except CalicacheError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
