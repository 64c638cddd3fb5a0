"""What `calicache compare` does: run, measure, draw, print."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from calicache.graph_passes.common.errors import CompareError, ModelError
from calicache.graph_passes.common.progress import Progress
from calicache.graph_passes.recording.recording import Recording
from calicache.tools.compare.comparison import Comparison, compare
from calicache.tools.compare.image_grid import check_grid, save_grid
from calicache.tools.compare.image_measures import Decoder, picture_kind
from calicache.tools.compare.view import comparison_data, describe_comparison
from calicache.tools.terminal.model_file import call_in_file, load_model
from calicache.tools.terminal.progress import progress_shown


@dataclass(frozen=True, slots=True)
class CompareArguments:
    """The command line of `calicache compare`.

    Attributes:
        artifact: folder of an artifact.
        recording: recorded runs of its model.
        runs: how many of them; None takes all.
        grid: PNG to draw, or None.
        decoder: `FILE.py:FUNCTION` that returns the decoder, or None.
        model: what `load_model` takes, or None.
        provider: of ONNX Runtime.
        json: print JSON.
    """

    artifact: Path
    recording: Path
    runs: int | None = None
    grid: Path | None = None
    decoder: str | None = None
    model: str | None = None
    provider: str = "CPUExecutionProvider"
    json: bool = False


def run_compare(arguments: CompareArguments, console: Console, progress: Console) -> None:
    """Compare, draw the grid, and print.

    Args:
        arguments: as given.
        console: for the result.
        progress: for everything else.

    Raises:
        CalicacheError: something that the arguments name is refused.
    """
    recording = Recording.load(arguments.recording)
    decoder = None if arguments.decoder is None else load_decoder(arguments.decoder)
    shape = _result_shape(recording)
    if arguments.grid is not None and shape is not None:  # before anything is run
        check_grid(arguments.grid, picture_kind(shape, decoder), shape[1] if shape[1:] else 0)
    comparison = _compare(arguments, recording, decoder, progress)
    grid = None
    if arguments.grid is not None:
        if comparison.pictures is None:
            raise CompareError(
                f"grid {arguments.grid}",
                expected="results that can be drawn",
                got=str(comparison.no_measures),
                fix="Leave the grid out, and look at the errors by step.",
            )
        grid = save_grid(comparison.pictures, arguments.grid)
    if arguments.json:
        # Not through rich, which breaks long lines.
        console.file.write(json.dumps(comparison_data(comparison, grid), indent=2) + "\n")
    else:
        console.print(describe_comparison(comparison, grid))


def load_decoder(spec: str) -> Decoder:
    """The decoder that a function in a Python file returns.

    Args:
        spec: `FILE.py:FUNCTION`; the function takes nothing, as for models, and returns a function
            from latents (B, ...) to images (B, C, H, W) in -1 .. 1.

    Raises:
        ModelError: there is no such function, it fails, or returns no function.
    """
    decoder: Any = call_in_file(spec)
    if not callable(decoder):
        raise ModelError(
            spec,
            expected="a function that returns a decoder, which is called with latents",
            got=f"{type(decoder).__name__} {decoder!r:.60}",
            fix="Let it `return decode`.",
        )
    made: Decoder = decoder
    return made


def _result_shape(recording: Recording) -> tuple[int, ...] | None:
    """Of the first recorded result; the comparison itself refuses where there is none."""
    first = next((end for end in recording.ends if end is not None), None)
    return None if first is None else tuple(first.shape)


def _compare(
    arguments: CompareArguments,
    recording: Recording,
    decoder: Decoder | None,
    progress: Console,
) -> Comparison:
    with progress_shown(progress) as report:

        def on_step(done: int, total: int) -> None:
            report(Progress(done, total, "run full and optimised"))

        return compare(
            arguments.artifact,
            recording,
            runs=arguments.runs,
            model=None if arguments.model is None else load_model(arguments.model),
            decoder=decoder,
            provider=arguments.provider,
            on_step=on_step,
        )
