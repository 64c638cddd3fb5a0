"""The plain model along recorded runs, and from that the sampler's own update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from calicache.graph_passes.common.errors import NoSampler
from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.common.ranks import ALONE, Ranks
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.surgery import graph_outputs
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.timestep import Run
from calicache.graph_passes.sampler.update import (
    SamplerSteps,
    find_latent,
    find_sampler_steps,
    latent_channels,
)

ALIKE = 1e-4  # relative: above rounding in another order, below another checkpoint's outputs


@dataclass(frozen=True, slots=True)
class Reference:
    """Runs of more steps, whose latents and outputs stand in the place of the recorded ones.

    Attributes:
        steps: how many.
        off: mean relative L2 error of the recorded results against theirs; None where there are
            none.
    """

    steps: int
    off: float | None


@dataclass(frozen=True, slots=True)
class RecordedSampler:
    """Recorded runs of one length and what their sampler does.

    Attributes:
        runs: the calls, on the model's device.
        outputs: e for every call of every run, with x's channels alone.
        ends: results of the runs, as far as they are known.
        steps: how the next latent is made.
        reference: where latents, outputs and results are from, which the sampler's update then
            does not lead to; None for the recorded runs.
    """

    runs: tuple[Run, ...]
    outputs: tuple[tuple[Tensor, ...], ...]
    ends: tuple[Tensor | None, ...]
    steps: SamplerSteps
    reference: Reference | None = None


def recover_sampler(
    captured: CapturedGraph,
    recording: Recording,
    dependence: Mapping[str, Dependence],
    length: int,
    meter: Meter | None = None,
    ranks: Ranks = ALONE,
) -> RecordedSampler:
    """The plain model along the recorded runs of one length, and the sampler's update.

    Outputs that were recorded are taken where the model gives the same in one call of the run;
    otherwise, as with a recording of other weights, the model is run in every call.

    Args:
        captured: the plain graph.
        recording: the recorded runs.
        dependence: class of every tensor argument.
        length: of the runs to use, in steps.
        meter: counts the steps of every run that this process looks at.
        ranks: the processes that share the runs.

    Raises:
        NoSampler: it cannot be told from the recording.
    """
    returned = graph_outputs(captured.graph)
    meta = returned[0].meta.get("val") if isinstance(returned[0], fx.Node) else None
    if len(returned) != 1 or not (isinstance(meta, Tensor) and meta.is_floating_point()):
        raise NoSampler(f"the model returns {len(returned)} values, not one floating-point tensor")
    runs, known, ends = _runs_of_length(recording, length, captured.device)
    if not runs or length < 2:
        raise NoSampler(f"no recorded run has the plan's {length} steps")
    latent = find_latent(runs[0][0], meta, dependence)
    answered = list(zip(runs, known, strict=True))
    outputs = [
        [latent_channels(own.to(captured.device), run[0][latent]) for own in every]
        for run, every in zip(runs, _all_outputs(captured, answered, meter, ranks), strict=True)
    ]
    steps = find_sampler_steps(latent, runs, outputs, ends)
    return RecordedSampler(tuple(runs), tuple(map(tuple, outputs)), tuple(ends), steps)


def _all_outputs(
    captured: CapturedGraph,
    runs: Sequence[tuple[Run, Sequence[Tensor | None]]],
    meter: Meter | None,
    ranks: Ranks,
) -> list[list[Tensor]]:
    """Outputs of every run: those that the recording tells, and what the model gives else."""
    missing = ranks.map(partial(_missing, captured, meter), runs)
    known = ({k: own for k, own in enumerate(answers) if own is not None} for _, answers in runs)
    every = ({**told, **new} for told, new in zip(known, missing, strict=True))
    return [[outputs[step] for step in sorted(outputs)] for outputs in every]


def _missing(
    captured: CapturedGraph, meter: Meter | None, run: tuple[Run, Sequence[Tensor | None]]
) -> dict[int, Tensor]:
    """The outputs of a run that its recording does not tell, by step, on the CPU."""
    calls, answers = run
    same = _gives(captured, calls, answers)
    outputs: dict[int, Tensor] = {}
    for step, (call, answer) in enumerate(zip(calls, answers, strict=True)):
        if answer is None or not same:
            outputs[step] = run_plain(captured, call).cpu()
        if meter:
            meter.add()
    return outputs


def _gives(captured: CapturedGraph, run: Run, recorded: Sequence[Tensor | None]) -> bool:
    """Whether the plain model gives in the middle of a run what was recorded there."""
    place = len(run) // 2
    answer = recorded[place]
    if answer is None:
        return False
    own = run_plain(captured, run[place])
    if (own.shape, own.dtype) != (answer.shape, answer.dtype):
        return False
    wide = answer.to(own.device).double()
    rounding = max(ALIKE, torch.finfo(own.dtype).eps)
    return float((own.double() - wide).norm()) <= rounding * float(wide.norm())


def _runs_of_length(
    recording: Recording, length: int, device: torch.device
) -> tuple[list[Run], list[tuple[Tensor | None, ...]], list[Tensor | None]]:
    triples = zip(recording.runs, recording.run_outputs, recording.ends, strict=True)
    chosen = [triple for triple in triples if len(triple[0]) == length]
    runs: list[Run] = [
        [{name: value.to(device) for name, value in call.items()} for call in run]
        for run, _, _ in chosen
    ]
    ends = [None if end is None else end.to(device) for _, _, end in chosen]
    return runs, [outputs for _, outputs, _ in chosen], ends


def run_plain(captured: CapturedGraph, call: Mapping[str, Tensor]) -> Tensor:
    """The first output of the plain model in one recorded call."""
    arguments: Sequence[Tensor] = list(call.values())
    with torch.no_grad():
        first = captured.module(*arguments)[0]
    assert isinstance(first, Tensor)
    return first
