"""`calicache report`: gather, draw, write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.recording.recording import Recording
from calicache.tools.report.data import gather_report
from calicache.tools.report.page import write_report
from calicache.tools.terminal.model_file import load_model
from calicache.tools.terminal.options import AlsoModel, Output, Runs, check_output
from calicache.tools.terminal.progress import progress_shown


def report(
    path: Annotated[Path, typer.Argument(help="An artifact, or a plan.")],
    output: Output,
    recording: Annotated[
        Path | None, typer.Option(help="Recorded runs: adds errors by step, times, pictures.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="That the artifact was made from; goes with --model.")
    ] = None,
    model: AlsoModel = None,
    runs: Runs = None,
) -> None:
    """Write one HTML file that works offline: schedule, errors, costs, graphs, pictures.

    A model, with a plan and recorded runs, adds the error by branch and step.

    Example: calicache report out/dit.onnx.d -o report.html --recording runs.safetensors
    """
    is_page = output.suffix.lower() in (".html", ".htm") and not output.is_dir()
    check_output(output, is_page, "the name of an HTML file, such as report.html")
    recorded = Recording.load(recording) if recording else None
    planned = Plan.load(plan) if plan else None
    loaded = load_model(model) if model else None
    with progress_shown() as on_progress:
        data = gather_report(
            path, recording=recorded, plan=planned, model=loaded, runs=runs, on_progress=on_progress
        )
        write_report(data, output)
    typer.echo(f"Written: {output}")
