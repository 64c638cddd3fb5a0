"""`calicache evaluate`: sample what is missing, score all of it, write and print the figures."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import typer

from calicache.graph_passes.common.torchrun import torchrun_ranks
from calicache.tools.evaluate.evaluation import describe_evaluation
from calicache.tools.evaluate.run import EvaluateSettings, run_evaluation
from calicache.tools.evaluate.shards import SHARDS
from calicache.tools.evaluate.subject import load_subject
from calicache.tools.terminal.options import check_output
from calicache.tools.terminal.progress import progress_shown
from calicache.tools.terminal.text import show


def evaluate(
    subject: str,
    plan: Path,
    output: Path,
    samples: int,
    shard: int,
    batch: int,
    reference: Path | None,
) -> None:
    """Sample and score, in as many processes as torchrun has started; the first one tells."""
    empty = output.is_dir() and not any(output.iterdir())
    fits = not output.exists() or empty or (output / SHARDS).is_dir()
    check_output(output, fits, "a new folder, or that of an evaluation to go on with")
    settings = EvaluateSettings(output, samples, shard, batch, reference)
    with torchrun_ranks() as ranks:
        # Every process of its own GPU: the file may put its model there.
        model = load_subject(subject)
        with progress_shown() if ranks.rank == 0 else nullcontext() as on_progress:
            evaluation = run_evaluation(model, plan, settings, ranks, on_progress)
        if ranks.rank == 0:
            show(describe_evaluation(evaluation))
            typer.echo(f"Written: {output}")
