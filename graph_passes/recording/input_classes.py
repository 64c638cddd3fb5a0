"""How often every input changes, seen from its recorded values: constant < run < step < latent."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

from calicache.graph_passes.common.errors import DependenceError
from calicache.graph_passes.recording.timestep import Run


class Dependence(IntEnum):
    """How often a value changes; a higher class includes the lower ones."""

    CONSTANT = 0
    RUN = 1
    STEP = 2
    LATENT = 3


def classify_inputs(names: Sequence[str], runs: Sequence[Run]) -> dict[str, Dependence]:
    """Class every tensor argument by its recorded values.

    An input that never changes inside a run is `run`. One that changes is `step` where it is
    known before the run starts: it is one number in every call, or runs that differ
    elsewhere have it the same, step by step. Otherwise it is `latent`.

    Args:
        names: of the tensor arguments.
        runs: the recorded calls of every denoising.

    Raises:
        DependenceError: no run has two steps, or no input depends on the latent.
    """
    longest = max(len(run) for run in runs)
    if longest < 2:
        raise DependenceError(
            "recording",
            expected="a run of at least 2 steps",
            got=f"{longest} step",
            fix="Record a whole sampler run.",
        )
    moving = [name for name in names if any(_moves(run, name) for run in runs)]
    repeated = {name for name in moving if len(runs) > 1 and _repeats(runs, name)}
    classes = dict.fromkeys(names, Dependence.RUN)
    for name in moving:
        known = _one_number_each(runs, name) or (name in repeated and set(moving) - repeated)
        classes[name] = Dependence.STEP if known else Dependence.LATENT
    if Dependence.LATENT not in classes.values():
        raise DependenceError(
            ", ".join(names),
            expected="an input that changes over the steps: the latent",
            got="none that does",
            fix="Record the calls of a real sampler, from noise to result.",
        )
    return classes


def _moves(run: Run, name: str) -> bool:
    first = run[0][name]
    return any(call[name] is not first and not torch.equal(call[name], first) for call in run)


def _repeats(runs: Sequence[Run], name: str) -> bool:
    return all(
        torch.equal(call[name], first[name])
        for run in runs[1:]
        for call, first in zip(run, runs[0], strict=False)
    )


def _one_number_each(runs: Sequence[Run], name: str) -> bool:
    values = (call[name] for run in runs for call in run)
    return all(value.numel() > 0 and bool((value == value.flatten()[0]).all()) for value in values)
