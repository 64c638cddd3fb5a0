"""`calicache compare`: run, measure, draw, print."""

from __future__ import annotations

from pathlib import Path

import typer

from calicache.graph_passes.common.errors import CompareError
from calicache.graph_passes.recording.recording import Recording
from calicache.tools.compare import comparison
from calicache.tools.compare.comparison import Comparison
from calicache.tools.compare.pictures import ImageGrid, check_grid, picture_kind, save_grid
from calicache.tools.compare.view import comparison_json, describe_comparison
from calicache.tools.terminal.model_file import call_in_file
from calicache.tools.terminal.progress import progress_shown
from calicache.tools.terminal.text import show


def compare(
    artifact: Path,
    recording: Path,
    runs: int | None,
    grid: Path | None,
    decoder: str | None,
    provider: str,
    json: bool,
) -> None:
    """Run side by side, draw the grid, print what came of it."""
    recorded = Recording.load(recording)
    decode = call_in_file(decoder, "a decoder of latents", callable) if decoder else None
    first = next((end for end in recorded.ends if end is not None), None)
    if grid is not None and first is not None:  # before anything is run
        channels = first.shape[1] if first.ndim > 1 else 0
        check_grid(grid, picture_kind(first, decode), channels)
    with progress_shown() as on_progress:
        result = comparison.compare(
            artifact,
            recorded,
            runs=runs,
            decoder=decode,
            provider=provider,
            on_progress=on_progress,
        )
    drawn = None if grid is None else _draw(result, grid)
    if json:
        typer.echo(comparison_json(result, drawn))
    else:
        show(describe_comparison(result, drawn))


def _draw(result: Comparison, path: Path) -> ImageGrid:
    if result.pictures is None:
        raise CompareError(
            f"grid {path}",
            expected="results that can be drawn",
            got=str(result.no_measures),
            fix="Leave the grid out, and look at the errors by step.",
        )
    return save_grid(result.pictures, path)
