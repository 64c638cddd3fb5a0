"""What every value of the graph depends on: constant < run < step < latent.

The inputs are classed by how they behaved over a recorded trajectory; every other node has
the highest class among what it is computed from.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import torch
from torch import fx

from calicache.graph_passes.capture import CapturedGraph
from calicache.graph_passes.errors import DependenceError
from calicache.graph_passes.record import Trajectory
from calicache.graph_passes.timestep import Run

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default


class Dependence(IntEnum):
    """How often a value changes; a higher class includes the lower ones."""

    CONSTANT = 0
    RUN = 1
    STEP = 2
    LATENT = 3


def classify_inputs(trajectory: Trajectory) -> dict[str, Dependence]:
    """Class every tensor argument by its recorded values.

    An input that never changes inside a run is `run`. One that changes is `step` where it is
    known before the run starts: it is one number in every call, or runs that differ
    elsewhere have it the same, step by step. Otherwise it is `latent`.

    Raises:
        DependenceError: no run has two steps, or no input depends on the latent.
    """
    runs = trajectory.runs
    if trajectory.steps < 2:
        raise DependenceError(
            "trajectory",
            expected="a run of at least 2 steps",
            got=f"{trajectory.steps} step",
            fix="Record a whole sampler run.",
        )
    names = [spec.name for spec in trajectory.signature.tensors]
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


def classify_nodes(
    captured: CapturedGraph, inputs: Mapping[str, Dependence]
) -> dict[str, Dependence]:
    """Class every node of the graph, by name.

    Args:
        captured: the graph.
        inputs: class of every tensor argument, from `classify_inputs`.
    """
    arguments = iter(captured.signature.tensors)
    classes: dict[str, Dependence] = {}
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            classes[node.name] = inputs[next(arguments).name]
        elif is_random(node):
            classes[node.name] = Dependence.LATENT
        else:
            classes[node.name] = max(
                (classes[source.name] for source in node.all_input_nodes),
                default=Dependence.CONSTANT,
            )
    return classes


def is_random(node: fx.Node) -> bool:
    """Whether the op draws new numbers at every call; attention does so only with dropout."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags and node.target is not ATTENTION


def _moves(run: Run, name: str) -> bool:
    first = run[0][name]
    return any(call[name] is not first and not torch.equal(call[name], first) for call in run)


def _repeats(runs: tuple[Run, ...], name: str) -> bool:
    return all(
        torch.equal(call[name], first[name])
        for run in runs[1:]
        for call, first in zip(run, runs[0], strict=False)
    )


def _one_number_each(runs: tuple[Run, ...], name: str) -> bool:
    values = (call[name] for run in runs for call in run)
    return all(value.numel() > 0 and bool((value == value.flatten()[0]).all()) for value in values)
