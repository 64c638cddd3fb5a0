"""`calicache plan`: search for a plan, show its front, choose another point of it."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Annotated

import typer

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.plan_file import PLAN_FILE
from calicache.graph_passes.common.errors import CalicacheError, PlanError
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.settings.front import Front
from calicache.graph_passes.settings.latency import LatencyTable
from calicache.tools.terminal.front import describe_front, describe_point
from calicache.tools.terminal.model_file import load_model
from calicache.tools.terminal.options import Json, Model, Output, check_output, show, show_value
from calicache.tools.terminal.progress import progress_shown

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

PlanFolder = Annotated[Path, typer.Argument(metavar="PLAN", help="The folder of a plan.")]

plan_app = typer.Typer(name="plan", no_args_is_help=True)


@plan_app.callback()
def _plan() -> None:
    """Search for a plan, look at its front, choose another point of it.

    Example: calicache plan search dit.py:build runs.safetensors -o out/plan --budget 0.5
    """


@plan_app.command()
def search(
    model: Model,
    recording: Annotated[
        Path, typer.Argument(help="Three recorded runs or more, from Recording.save.")
    ],
    output: Output,
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
        int, typer.Option(help="Candidates run for every one at effort 1, which is usual.")
    ] = 1,
) -> None:
    """Search for the best plan under a budget, or the cheapest one under an error.

    Ctrl-C stops it; the same command goes on later.

    Example: calicache plan search dit.py:build runs.safetensors -o out/plan --budget 0.5
    """
    _check_output(output)
    place = output.resolve()  # `.` has no name of its own
    folder = place.with_name(f"{place.name}.search")
    # The small files first: a typing error in them shows before a large model is read.
    table = LatencyTable.load(latency) if latency else None
    runs = Recording.load(recording)
    begun_before = folder.exists()
    try:
        with progress_shown() as on_progress:
            plan = Plan.search(
                load_model(model),
                runs,
                budget=budget,
                max_error=max_error,
                latency=table,
                effort=effort,
                path=folder,
                on_progress=on_progress,
            )
        plan.save(output)
    except KeyboardInterrupt as interrupt:
        kept = f"What is done lies in {folder}; the same command goes on from there."
        typer.echo(f"Stopped. {kept if folder.exists() else 'Nothing was done yet.'}", err=True)
        raise typer.Exit(INTERRUPTED) from interrupt
    except CalicacheError:
        # What is refused once is refused again; kept, it would stand in the way of other requests.
        if not begun_before:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    _show_saved(plan, output, searched=True)


@plan_app.command("show")
def show_front(plan: PlanFolder, json: Json = False) -> None:
    """Print the front of a plan: all points of cost and error that no other beats.

    Example: calicache plan show out/plan
    """
    show_value(_front_of(Plan.load(plan), plan), describe_front, json=json)


@plan_app.command()
def choose(
    plan: PlanFolder,
    point: Annotated[int, typer.Argument(help="Number of the point on the plan's front.")],
    output: Output,
) -> None:
    """Save the plan of another point of a plan's front.

    Example: calicache plan choose out/plan 3 -o out/other
    """
    _check_output(output)
    searched = Plan.load(plan)
    _front_of(searched, plan)
    chosen = searched.take(point)
    chosen.save(output)
    _show_saved(chosen, output, searched=False)


def _show_saved(plan: Plan, output: Path, *, searched: bool) -> None:
    show(describe_point(_front_of(plan, output), searched=searched))
    named = shlex.quote(str(output))
    typer.echo(f"\nPlan written: {output}")
    typer.echo(f"The whole front: calicache plan show {named}")
    typer.echo(f"Another point of it: calicache plan choose {named} NUMBER -o OTHER")


def _front_of(plan: Plan, path: Path) -> Front:
    if plan.front is None:
        raise PlanError(
            str(path),
            expected="a plan that a search made, with its front",
            got="a plan without a front",
            fix="Search for one: calicache plan search MODEL RECORDING -o PLAN --budget SHARE.",
        )
    return plan.front


def _check_output(output: Path) -> None:
    empty = output.is_dir() and not any(output.iterdir())
    fits = not output.exists() or empty or (output / PLAN_FILE).is_file()
    check_output(output, fits, "a new folder, or a plan to replace")
