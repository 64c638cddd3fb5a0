"""The `calicache` command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from calicache.graph_passes.common.environment import environment
from calicache.graph_passes.common.errors import CalicacheError
from calicache.tools.bench.models import MODELS
from calicache.tools.bench.report import write_report
from calicache.tools.bench.rows import BenchSettings
from calicache.tools.bench.run import run_bench
from calicache.tools.compare.command import CompareArguments, run_compare
from calicache.tools.diff.diff import diff_subjects
from calicache.tools.diff.difference import difference_json
from calicache.tools.diff.view import describe_difference
from calicache.tools.graph.command import GraphArguments, GraphFormat, run_graph
from calicache.tools.inspect.subject_facts import facts_json, inspect_subject
from calicache.tools.inspect.view import describe_facts
from calicache.tools.plan.command import PlanArguments, run_plan
from calicache.tools.plan.latency import LatencyArguments, run_latency
from calicache.tools.report.command import ReportArguments, run_report

WARNINGS, DIFFERENT = 2, 3  # exit codes; 1 is for what is refused

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
    target: Annotated[
        Path,
        typer.Argument(
            help="The folder of a plan or an artifact, the file of a recording or an ONNX model."
        ),
    ],
    json: Annotated[
        bool, typer.Option("--json", help="Print all of it as JSON; `kind` says what it is.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with code 2 where there are warnings.")
    ] = False,
) -> None:
    """Print what a plan, an artifact, a recording or an ONNX file is, and what is odd about it.

    Example: calicache inspect out/dit.onnx.d

    Exit codes: 1 for what is refused; with --strict 2 where there are warnings.
    """
    with _errors_shown():
        facts = inspect_subject(target)
    if json:
        typer.echo(facts_json(facts))
    else:
        Console(highlight=False).print(describe_facts(facts))
    if strict and facts.warnings:
        raise typer.Exit(WARNINGS)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="The folder of a plan or an artifact.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another of the same kind.")],
    json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Print what differs between two plans, or between two artifacts, in cost and structure.

    Example: calicache diff out/plan out/other-plan

    Exit codes: 0 where they are equal, 3 where they differ, 1 for what cannot be compared.
    """
    with _errors_shown():
        difference = diff_subjects(a, b)
    if json:
        typer.echo(difference_json(difference))
    else:
        Console(highlight=False).print(describe_difference(difference))
    if not difference.equal:
        raise typer.Exit(DIFFERENT)


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
    recording: Annotated[
        Path | None, typer.Argument(help="Three recorded runs or more, from Recording.save.")
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
        target, recording, output, budget, max_error, latency, effort, show, take, json
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
    recording: Annotated[Path, typer.Argument(help="A recorded run, from Recording.save.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Of the table, a JSON file.")],
    order: Annotated[int, typer.Option(help="Of the anchors, 0 to 2.")] = 2,
    provider: Annotated[str, typer.Option(help="Of ONNX Runtime.")] = "CPUExecutionProvider",
    repeats: Annotated[int, typer.Option(help="Timed steps of every kind.")] = 7,
) -> None:
    """Time the steps of a model on this machine, so that a plan search counts in seconds.

    Example: calicache latency dit.py:build runs.safetensors -o out/latency.json
    """
    arguments = LatencyArguments(model, recording, output, order, provider, repeats)
    with _errors_shown():
        run_latency(arguments, *_consoles())


@app.command()
def compare(
    artifact: Annotated[Path, typer.Argument(help="An artifact written by export_onnx.")],
    recording: Annotated[
        Path, typer.Option(help="Recorded runs with their results, from Recording.save.")
    ],
    runs: Annotated[
        int | None, typer.Option(help="Recorded runs to compare; all if left out.")
    ] = None,
    grid: Annotated[
        Path | None, typer.Option(help="PNG to draw: full, optimised, difference.")
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(
            help="FILE.py:FUNCTION that returns a function from latents to images "
            "(B, C, H, W) in -1 .. 1."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Time this torch model too: FILE.py:FUNCTION or a diffusers folder."),
    ] = None,
    provider: Annotated[str, typer.Option(help="Of ONNX Runtime.")] = "CPUExecutionProvider",
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Run an artifact beside the full model along recorded runs: error and time of every step.

    Example: calicache compare out/dit.onnx.d --recording runs.safetensors --grid compare.png
    """
    arguments = CompareArguments(artifact, recording, runs, grid, decoder, model, provider, json)
    with _errors_shown():
        run_compare(arguments, *_consoles())


@app.command()
def graph(
    target: Annotated[Path, typer.Argument(help="An artifact written by export_onnx.")],
    block: Annotated[
        str | None,
        typer.Option(help="Name or number of a block; left out, the model is folded by block."),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="plain, or a mode of the schedule; if left out its first one that is not refresh."
        ),
    ] = None,
    form: Annotated[
        GraphFormat, typer.Option("--format", help="How the graph is written.")
    ] = GraphFormat.TEXT,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write; printed if left out.")
    ] = None,
) -> None:
    """Show a rewritten graph beside the plain one: what was inserted, removed, read and kept.

    Example: calicache graph out/dit.onnx.d --block 3 --mode calibrate

    As a drawing: calicache graph out/dit.onnx.d --block 3 --format svg -o block.svg
    """
    with _errors_shown():
        text = run_graph(GraphArguments(target, block, mode, form, output))
    typer.echo(text, nl=False)


@app.command()
def report(
    target: Annotated[Path, typer.Argument(help="An artifact, or a plan.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")],
    recording: Annotated[
        Path | None, typer.Option(help="Recorded runs: adds errors by step, times, pictures.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="That the artifact was made from; goes with --model.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="FILE.py:FUNCTION or a diffusers folder; with a plan and recorded runs: adds the "
            "error by branch and step."
        ),
    ] = None,
    runs: Annotated[
        int | None, typer.Option(help="Recorded runs to compare; all if left out.")
    ] = None,
) -> None:
    """Write one HTML file that works offline: schedule, errors, costs, graphs, pictures.

    Example: calicache report out/dit.onnx.d -o report.html --recording runs.safetensors
    """
    arguments = ReportArguments(target, output, recording, plan, model, runs)
    with _errors_shown():
        run_report(arguments, *_consoles())


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
