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
from calicache.tools.latency_command import LatencyArguments, run_latency
from calicache.tools.plan_command import PlanArguments, run_plan

app = typer.Typer(
    name="calicache",
    help="Plan what calicache does to a diffusion transformer, look at it, and measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _main() -> None:
    """Plan what calicache does to a diffusion transformer, look at it, and measure it."""


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


@app.command()
def plan(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|PLAN",
            help="FILE.py:FUNCTION that returns the model, or a folder that diffusers' "
            "save_pretrained wrote; with --show and --take the folder of a plan.",
        ),
    ],
    trajectory: Annotated[
        Path | None, typer.Argument(help="Three recorded runs or more, from Trajectory.save.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Of the new plan.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Share of the full run's cost, above 0 and below 1.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Relative L2 error that new samples stay below.")
    ] = None,
    latency: Annotated[
        Path | None, typer.Option(help="Count the cost in these seconds, from calicache latency.")
    ] = None,
    effort: Annotated[
        int | None, typer.Option(help="Candidates run for every one at effort 1, which is usual.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the front of a plan.")] = False,
    take: Annotated[
        int | None, typer.Option(help="Number of the point on a plan's front to save.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="With --show: print it as JSON.")] = False,
) -> None:
    """Search for the best plan under a budget, or the cheapest one under an error.

    Ctrl-C stops it; the same command goes on later.

    Example: calicache plan dit.py:build runs.safetensors -o out/plan --budget 0.5

    All points of cost and error that no other beats: calicache plan out/plan --show

    Take another of them: calicache plan out/plan --take 3 -o out/other
    """
    arguments = PlanArguments(
        target, trajectory, output, budget, max_error, latency, effort, show, take, json
    )
    with _errors_shown():
        code = run_plan(arguments, *_consoles())
    if code:
        raise typer.Exit(code)


@app.command()
def latency(
    model: Annotated[
        str,
        typer.Argument(
            help="FILE.py:FUNCTION that returns the model, or a folder that diffusers' "
            "save_pretrained wrote."
        ),
    ],
    trajectory: Annotated[Path, typer.Argument(help="A recorded run, from Trajectory.save.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Of the table, a JSON file.")],
    order: Annotated[int, typer.Option(help="Of the anchors, 0 to 2.")] = 2,
    provider: Annotated[str, typer.Option(help="Of ONNX Runtime.")] = "CPUExecutionProvider",
    repeats: Annotated[int, typer.Option(help="Timed steps of every kind.")] = 7,
) -> None:
    """Time the steps of a model on this machine, so that a plan search counts in seconds.

    Example: calicache latency dit.py:build runs.safetensors -o out/latency.json
    """
    arguments = LatencyArguments(model, trajectory, output, order, provider, repeats)
    with _errors_shown():
        run_latency(arguments, *_consoles())


def _consoles() -> tuple[Console, Console]:
    """For results and for everything else."""
    return Console(highlight=False), Console(stderr=True, highlight=False)


@contextmanager
def _errors_shown() -> Iterator[None]:
    """What calicache refuses, as a message on the error stream and exit code 1."""
    try:
        yield
    except CalicacheError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
