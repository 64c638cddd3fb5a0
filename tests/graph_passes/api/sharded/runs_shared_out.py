"""Runs that several processes record and search with; `test_runs_shared_out.py` runs it.

    torchrun --nproc-per-node N runs_shared_out.py FOLDER [killed]

Every process records its share of the seeds. The first one saves the plans, and every one what it
was refused. With `killed`, the second process ends itself in the middle of its first search.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from model import FashionDiT, FashionDiTConfig
from support.models import sample_dit, shake
from torch import distributed, nn

from calicache.graph_passes import CalicacheError, Plan, Progress, Recording, record
from calicache.graph_passes.common.torchrun import torchrun_ranks

SEEDS = range(7)
STEPS = 8
BEFORE_THE_END = 3  # results of the search before the process is killed


def small_model() -> nn.Module:
    """One block, with weights large enough to make errors."""
    torch.manual_seed(0)
    return shake(FashionDiT(FashionDiTConfig(width=32, depth=1, frequency_channels=32)), 0.3)


def record_seeds(model: nn.Module, seeds: range) -> Recording:
    """One run of every seed."""
    with record(model) as recording:
        for seed in seeds:
            recording.finish(sample_dit(model, batch=2, seed=seed, steps=STEPS))
    return recording


def poisoned(recording: Recording) -> Recording:
    """The same with NaN in the latent of the last run's last step but one."""
    last = {k: v * float("nan") if v.ndim == 4 else v for k, v in recording.calls[-2].items()}
    calls = [*recording.calls[:-2], last, recording.calls[-1]]
    return Recording(calls, recording.signature, recording.results)


def refusal(plan: Callable[[], object]) -> str:
    """What is refused."""
    try:
        plan()
    except CalicacheError as error:
        return str(error)
    return ""


class KillsItself:
    """Ends its process by SIGKILL as soon as the search has some results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, progress: Progress) -> None:  # noqa: ARG002
        """Look at the journal."""
        results = sorted((self.folder / "journal").glob("*-*"))
        if len(results) >= BEFORE_THE_END:
            kept = {path.name: path.stat().st_mtime_ns for path in results}
            (self.folder / "kept.json").write_text(json.dumps(kept))
            os.kill(os.getpid(), signal.SIGKILL)


def made_plans(
    model: nn.Module,
    recording: Recording,
    group: distributed.ProcessGroup | None,
) -> dict[str, Plan]:
    """Plans that are made from the statistics of all runs."""
    plan = partial(Plan.from_trajectory, model, recording, rank=8, group=group)
    return {
        "covariance": plan().rebind(model, recording, group=group),
        "paper": plan(order=0, weighting="increment"),
    }


def main() -> None:
    """Command line."""
    folder, killed = Path(sys.argv[1]), "killed" in sys.argv
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    model = small_model()
    with torchrun_ranks() as ranks:
        own = record_seeds(model, SEEDS[ranks.rank :: ranks.size])
        recording = own.gather()
        group = distributed.group.WORLD if distributed.is_initialized() else None
        search = partial(Plan.search, model, recording, budget=0.5, path=folder / "journal")
        kills = KillsItself(folder) if killed and ranks.rank == 1 and not again else None
        plans = {
            "searched": search(on_progress=kills, group=group),
            **made_plans(model, recording, group),
        }
        of = partial(Plan.from_trajectory, model, rank=8, schedule="RCRCRCRC", group=group)
        refusals = {
            "poisoned": refusal(partial(of, poisoned(recording))),
            "own alone": refusal(partial(of, own)),
        }
        del group, of, search  # a group that outlives its end makes the process abort
        if ranks.rank == 0:
            for name, plan in plans.items():
                plan.save(folder / name)
            recording.save(folder / "recording.safetensors")
        told = {"plans": {name: repr(plan) for name, plan in plans.items()}, "refusals": refusals}
        (folder / f"{ranks.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
