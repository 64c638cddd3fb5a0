"""`calicache report`: gather, draw, write."""

from __future__ import annotations

from pathlib import Path

import typer

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.recording.recording import Recording
from calicache.tools.report.data import gather_report
from calicache.tools.report.page import write_report
from calicache.tools.terminal.model_file import load_model
from calicache.tools.terminal.options import check_output
from calicache.tools.terminal.progress import progress_shown


def report(
    path: Path,
    output: Path,
    recording: Path | None,
    plan: Path | None,
    model: str | None,
    runs: int | None,
) -> None:
    """Gather, and write the page."""
    is_page = output.suffix.lower() in (".html", ".htm") and not output.is_dir()
    check_output(output, is_page, "the name of an HTML file, such as report.html")
    recorded = Recording.load(recording) if recording else None
    planned = Plan.load(plan).one(str(plan)) if plan else None
    loaded = load_model(model) if model else None
    with progress_shown() as on_progress:
        data = gather_report(
            path, recording=recorded, plan=planned, model=loaded, runs=runs, on_progress=on_progress
        )
        write_report(data, output)
    typer.echo(f"Written: {output}")
