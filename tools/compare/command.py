"""`calicache compare`: run, measure, draw, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calicache.graph_passes.common.errors import CompareError
from calicache.graph_passes.recording.recording import Recording
from calicache.tools.compare.comparison import Comparison, compare
from calicache.tools.compare.pictures import ImageGrid, check_grid, picture_kind, save_grid
from calicache.tools.compare.view import comparison_json, describe_comparison
from calicache.tools.terminal.model_file import call_in_file
from calicache.tools.terminal.options import CPU, Json, Provider, Runs, show
from calicache.tools.terminal.progress import progress_shown


def compare_command(
    artifact: Annotated[Path, typer.Argument(help="An artifact written by export_onnx.")],
    recording: Annotated[
        Path, typer.Option(help="Recorded runs with their results, from Recording.save.")
    ],
    runs: Runs = None,
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
    provider: Provider = CPU,
    json: Json = False,
) -> None:
    """Run an artifact beside the full model along recorded runs: error and time of every step.

    Example: calicache compare out/dit.onnx.d --recording runs.safetensors --grid compare.png
    """
    recorded = Recording.load(recording)
    decode = call_in_file(decoder, "a decoder of latents", callable) if decoder else None
    first = next((end for end in recorded.ends if end is not None), None)
    if grid is not None and first is not None:  # before anything is run
        channels = first.shape[1] if first.ndim > 1 else 0
        check_grid(grid, picture_kind(first.shape, decode), channels)
    with progress_shown() as on_progress:
        comparison = compare(
            artifact,
            recorded,
            runs=runs,
            decoder=decode,
            provider=provider,
            on_progress=on_progress,
        )
    drawn = None if grid is None else _draw(comparison, grid)
    if json:
        typer.echo(comparison_json(comparison, drawn))
    else:
        show(describe_comparison(comparison, drawn))


def _draw(comparison: Comparison, path: Path) -> ImageGrid:
    if comparison.pictures is None:
        raise CompareError(
            f"grid {path}",
            expected="results that can be drawn",
            got=str(comparison.no_measures),
            fix="Leave the grid out, and look at the errors by step.",
        )
    return save_grid(comparison.pictures, path)
