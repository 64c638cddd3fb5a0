"""`calicache search`: the best plan under a budget, or the cheapest one under an error."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import typer
from torch import distributed

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.common.errors import CalicacheError, SubjectError
from calicache.graph_passes.common.ranks import Ranks
from calicache.graph_passes.common.torchrun import torchrun_ranks
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.search.ground import check_budget
from calicache.graph_passes.settings.latency import LatencyTable
from calicache.graph_passes.settings.request import SearchRequest
from calicache.tools.make.plans import check_plan_output, show_saved
from calicache.tools.terminal.model_file import load_model
from calicache.tools.terminal.progress import progress_shown

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def search(
    model: str,
    recordings: list[Path],
    output: Path,
    budget: float | None,
    max_error: float | None,
    latency: Path | None,
    effort: int,
    reference: Path | None,
) -> None:
    """Search, save and show what was found; what was done before Ctrl-C is kept.

    Processes of torchrun share the recorded runs; the first one writes and shows.
    """
    with torchrun_ranks() as ranks:
        _search(model, recordings, output, budget, max_error, latency, effort, reference, ranks)


def _search(
    model: str,
    recordings: list[Path],
    output: Path,
    budget: float | None,
    max_error: float | None,
    latency: Path | None,
    effort: int,
    reference: Path | None,
    ranks: Ranks,
) -> None:
    ranks.first(partial(check_plan_output, output))
    place = output.resolve()  # `.` has no name of its own
    folder = place.with_name(f"{place.name}.search")
    # The small files first: what is wrong with them shows before a large model is read.
    table = LatencyTable.load(latency) if latency else None
    request = SearchRequest(budget, max_error, table, effort, ("*",), ())
    runs = _by_steps(recordings)
    for steps in runs:
        check_budget(request, steps)
    finer = Recording.load(reference) if reference else None
    begun_before = ranks.first(folder.exists)
    try:
        with progress_shown() if ranks.rank == 0 else nullcontext() as on_progress:
            plan = Plan.search(
                load_model(model),
                runs,
                budget=budget,
                max_error=max_error,
                latency=table,
                effort=effort,
                reference=finer,
                path=folder,
                on_progress=on_progress,
                group=distributed.group.WORLD if ranks.size > 1 else None,
            )
        ranks.first(partial(plan.save, output))
    except KeyboardInterrupt as interrupt:
        kept = f"What is done lies in {folder}; the same command goes on from there."
        if ranks.rank == 0:
            typer.echo(f"Stopped. {kept if folder.exists() else 'Nothing was done yet.'}", err=True)
        raise typer.Exit(INTERRUPTED) from interrupt
    except CalicacheError:
        # What is refused once is refused again; kept, it would stand in the way of other requests.
        if not begun_before:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if ranks.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        show_saved(plan, output, searched=True)


def _by_steps(paths: Sequence[Path]) -> Mapping[int, Recording]:
    """Recordings by their numbers of steps, each of which is there once.

    Raises:
        SubjectError: two have the same number.
    """
    found: dict[int, Recording] = {}
    for path in paths:
        runs = Recording.load(path)
        if runs.steps in found:
            raise SubjectError(
                str(path),
                expected="runs of another number of steps than the recordings before it",
                got=f"runs of {runs.steps} steps again",
                fix="Record all runs of one number of steps together.",
            )
        found[runs.steps] = runs
    return found
