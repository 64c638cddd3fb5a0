"""`calicache export`: from a model and a plan to an artifact."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer
from rich.text import Text

from calicache.export.artifact.manifest import MANIFEST_FILE
from calicache.export.export import export_onnx
from calicache.graph_passes.api.optimize import optimize
from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.settings.schedule import count_modes
from calicache.tools.terminal.model_file import load_model
from calicache.tools.terminal.options import check_output
from calicache.tools.terminal.progress import progress_shown
from calicache.tools.terminal.text import fact_grid, format_count, show


def export(
    model: str,
    plan: Path,
    output: Path,
    layout: str,
    attention: str,
    precision: str,
    dynamic: list[str],
) -> None:
    """Optimise, export and say what was written."""
    empty = output.is_dir() and not any(output.iterdir())
    fits = not output.exists() or empty or (output / MANIFEST_FILE).is_file()
    check_output(output, fits, "a new folder, or an artifact to replace")
    planned = Plan.load(plan).one(str(plan))
    with progress_shown() as on_progress:
        optimized = optimize(load_model(model), planned, on_progress=on_progress)
        manifest = export_onnx(
            optimized,
            output,
            layout=layout,
            attention=attention,
            precision=precision,
            dynamic=dynamic,
            on_progress=on_progress,
        )
    size = sum(file.size for file in manifest.files)
    show(Text(f"Artifact, layout {manifest.layout}", style="bold"))
    show(
        fact_grid(
            [
                ("steps", f"{count_modes(manifest.schedule)}, order {manifest.order}"),
                ("MACs", f"{manifest.run_share:.3f} of the full run"),
                ("files", f"{len(manifest.files)}, {format_count(size, 'B')}"),
            ]
        )
    )
    named = shlex.quote(str(output))
    typer.echo(f"\nArtifact written: {output}")
    typer.echo(f"What was done in it: calicache inspect {named}")
    typer.echo(f"Beside the full model: calicache compare {named} --recording RECORDING")
