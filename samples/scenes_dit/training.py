"""The loop that both trainings of this sample share: checkpoints, a log, a bound of minutes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Protocol

from safetensors.torch import load_file
from shared import save_atomic
from torch import Tensor
from tqdm import tqdm

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"


class Trainer(Protocol):
    """A training that can stop after any step and go on from its state."""

    step: int

    def train_step(self) -> float:
        """One optimizer step; returns the loss."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything a later run needs, as flat tensors."""
        ...

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a state written by `state`."""
        ...


def run(
    trainer: Trainer, steps: int, out: Path, *, save_minutes: float, minutes: float | None
) -> bool:
    """Train from the checkpoint in a folder, if there is one.

    Args:
        trainer: what to train.
        steps: the step at which training is over.
        out: folder of `checkpoint.safetensors` and `log.jsonl`.
        save_minutes: time between two checkpoints, each with a line in the log.
        minutes: stop after this time, with a checkpoint; never when None.

    Returns:
        Whether training is over.
    """
    checkpoint = out / CHECKPOINT
    out.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        trainer.load(load_file(checkpoint))
    losses: list[float] = []
    begin = saved = time.monotonic()
    with tqdm(total=steps, initial=trainer.step, unit="step", mininterval=10.0) as progress:
        while trainer.step < steps:
            losses.append(trainer.train_step())
            progress.update()
            now = time.monotonic()
            late = minutes is not None and now - begin >= 60 * minutes
            if late or now - saved >= 60 * save_minutes or trainer.step == steps:
                save_atomic(trainer.state(), checkpoint)
                _log(out / LOG, trainer.step, losses, now - saved)
                losses, saved = [], now
            if late:
                break
    return trainer.step >= steps


def _log(path: Path, step: int, losses: list[float], seconds: float) -> None:
    line = {
        "step": step,
        "loss": round(sum(losses) / len(losses), 5),
        "seconds_per_step": round(seconds / len(losses), 3),
    }
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
