"""What processes tell one another; `test_ranks.py` runs it by torchrun.

    torchrun --nproc-per-node N ranks_at_work.py FOLDER

Every process writes what it has got as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from calicache.graph_passes.common.errors import PlanError, RankError
from calicache.graph_passes.common.ranks import Ranks
from calicache.graph_passes.common.torchrun import tell_once, torchrun_ranks

ITEMS = range(5)


def refused(place: int) -> int:
    """Refuses two items."""
    if place in (2, 3):
        raise PlanError(f"item {place}", expected="another", got=str(place), fix="Take one.")
    return place


def error_of(ranks: Ranks) -> str:
    """Where the function of all items was refused."""
    try:
        ranks.map(refused, ITEMS)
    except PlanError as error:
        return error.where
    return ""


def difference(ranks: Ranks) -> str:
    """What the processes are told that do not have the same."""
    try:
        ranks.check_alike("rank", ranks.rank, "Be one.")
    except RankError as error:
        return str(error)
    return ""


def told(rank: int) -> list[str]:
    """What this process tells of one text that all have and of one that is its own."""
    texts: list[str] = []
    tell_once("of all", texts.append)
    tell_once(f"of rank {rank}", texts.append)
    return texts


def main() -> None:
    """Command line."""
    with torchrun_ranks() as ranks:
        done: list[int] = []
        squares = ranks.map(lambda item: done.append(item) or item**2, ITEMS)
        results = {
            "share": list(ranks.share(ITEMS)),
            "done": done,
            "squares": squares,
            "first": ranks.first(lambda: f"from {ranks.rank}"),
            "sum": ranks.add(torch.full((2,), ranks.rank + 0.5, dtype=torch.float64)).tolist(),
            "error": error_of(ranks),
            "difference": difference(ranks),
            "told": told(ranks.rank),
        }
        Path(sys.argv[1], f"{ranks.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
