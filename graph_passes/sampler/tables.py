"""The denoising loop as tables: all that is done between two calls of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calicache.graph_passes.common.errors import NoSampler
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.sampler.guidance import Guidance, recover_guidance, weighted_sum
from calicache.graph_passes.sampler.recover import RecordedSampler
from calicache.graph_passes.sampler.update import SamplerSteps, find_sampler_steps

ROW = 4  # numbers of one update


@dataclass(frozen=True, slots=True)
class SamplerTables:
    """A deterministic sampler: x_{k+1} = a_k x_k + b_k e_k + c_k x_{k-1} + d_k e_{k-1}.

    e is one output for every sample, made from the parts of the guided batch: u + s (c - u)
    with c the part at `conditional`, or sum_p mix_kp e_p where no one scale s fits.

    Attributes:
        latent: the model's input that holds x.
        parts: copies of x in one batch.
        conditional: the part that guidance moves towards; None where `mix` holds.
        guidance: s as it was recorded.
        mix: (T, parts), rows sum to 1.
        scales: (T,); the model gets scale_k x_k.
        updates: (T, 4), rows a, b, c, d.
        inputs: the model's inputs that change with the step alone, (T, *shape) each.
    """

    latent: str
    parts: int
    conditional: int | None
    guidance: float | None
    mix: tuple[tuple[float, ...], ...]
    scales: tuple[float, ...]
    updates: tuple[tuple[float, ...], ...]
    inputs: Mapping[str, Tensor]

    @property
    def looks_back(self) -> bool:
        """Whether any step needs the latent and the output before."""
        return any(row[2] or row[3] for row in self.updates)


def recover_tables(
    recorded: RecordedSampler, dependence: Mapping[str, Dependence]
) -> SamplerTables:
    """Tables of the sampler that made recorded runs.

    Args:
        recorded: runs with their results.
        dependence: class of every tensor argument.

    Raises:
        NoSampler: a result is not known, or an input changes from run to run as no table can.
    """
    if any(end is None for end in recorded.ends):
        raise NoSampler("a run without its result, so the last update is not known")
    guidance = recover_guidance(recorded)
    latent, parts = recorded.steps.latent, recorded.steps.parts
    runs = [[{latent: call[latent].chunk(parts)[0]} for call in run] for run in recorded.runs]
    ends = [
        None if end is None else end[: len(run[0][latent])]
        for run, end in zip(runs, recorded.ends, strict=True)
    ]
    # Once more with the shares of the parts fixed: a step's own fit is free to trade them.
    outputs = guided_outputs(recorded, guidance)
    steps = find_sampler_steps(latent, runs, outputs, ends, parts=1)
    scales = (1.0,) * len(recorded.runs[0])
    return sampler_tables(recorded, dependence, guidance, steps, scales)


def guided_outputs(recorded: RecordedSampler, guidance: Guidance) -> list[list[Tensor]]:
    """One output for every sample in float64, by run and step."""
    parts = recorded.steps.parts
    return [
        [weighted_sum(row, e.chunk(parts)) for row, e in zip(guidance.shares, outputs, strict=True)]
        for outputs in recorded.outputs
    ]


def sampler_tables(
    recorded: RecordedSampler,
    dependence: Mapping[str, Dependence],
    guidance: Guidance,
    steps: SamplerSteps,
    scales: tuple[float, ...],
) -> SamplerTables:
    """The tables of an update whose parts are known.

    Args:
        recorded: runs that the model's inputs are read from.
        dependence: class of every tensor argument.
        guidance: what is made of the parts of a batch.
        steps: the update of one copy of x by the guided output.
        scales: of the model's latent input, by step.

    Raises:
        NoSampler: an input changes from run to run, or with the latent.
    """
    return SamplerTables(
        latent=recorded.steps.latent,
        parts=recorded.steps.parts,
        conditional=guidance.conditional,
        guidance=guidance.scale,
        mix=guidance.shares,
        scales=scales,
        updates=tuple((*row, *(0.0,) * (ROW - len(row))) for row in steps.weights),
        inputs=_step_inputs(recorded, dependence),
    )


def _step_inputs(
    recorded: RecordedSampler, dependence: Mapping[str, Dependence]
) -> dict[str, Tensor]:
    tables = {}
    for name, kind in dependence.items():
        if name == recorded.steps.latent or kind < Dependence.STEP:
            continue
        table, *others = (_by_step(run, name) for run in recorded.runs)
        if kind is Dependence.LATENT or any(not torch.equal(table, other) for other in others):
            raise NoSampler(f"input {name} is not the same in every run, so no table can hold it")
        tables[name] = table
    return tables


def _by_step(run: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    return torch.stack([call[name].cpu() for call in run])
