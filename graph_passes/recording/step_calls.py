"""The calls of one step as one call: guidance by two calls, seen as guidance by a batch of two.

What the sampler makes of the outputs is found, fitted and exported in this form; the model itself
goes on being called as its pipeline calls it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from calicache.graph_passes.common.errors import NoSampler
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.signature import CallSignature
from calicache.graph_passes.recording.timestep import Call, Timestep, calls_of, cut_runs


def batch_size(signature: CallSignature, dependence: Mapping[str, Dependence]) -> int:
    """First dimension of the latent inputs."""
    shapes = (s.shape for s in signature.tensors if dependence[s.name] is Dependence.LATENT)
    return next((shape[0] for shape in shapes if shape), 1)


def batch_signature(signature: CallSignature, calls: int, batch: int) -> CallSignature:
    """The form of one call in the place of several: first dimensions of `batch` are multiplied."""
    specs = (
        replace(spec, shape=(calls * batch, *spec.shape[1:]))
        if spec.shape[:1] == (batch,)
        else spec
        for spec in signature.tensors
    )
    return replace(signature, tensors=tuple(specs))


def one_call(timestep: Timestep | None) -> Timestep | None:
    """The timestep of a run whose steps call the model once."""
    return None if timestep is None else replace(timestep, calls=1)


def batch_calls(recording: Recording, batch: int) -> Recording:
    """The same recording with the calls of every step in one batch.

    Args:
        recording: with several calls a step.
        batch: first dimension of the latent.

    Raises:
        NoSampler: the calls differ in what has no batch dimension.
    """
    timestep = recording.timestep
    beside = calls_of(timestep)
    calls = [
        _one_call(run[first : first + beside], batch)
        for run in cut_runs(timestep, recording.calls, recording.results)
        for first in range(0, len(run), beside)
    ]
    signature = batch_signature(recording.signature, beside, batch)
    results = {count // beside: value for count, value in recording.results.items()}
    return Recording(calls, [signature], results)


def _one_call(calls: Sequence[Call], batch: int) -> Call:
    merged: dict[str, Tensor] = {}
    for name, first in calls[0].items():
        values = [call[name] for call in calls]
        if first.shape[:1] == (batch,):
            merged[name] = torch.cat(values)
        elif all(torch.equal(first, value) for value in values):
            merged[name] = first
        else:
            raise NoSampler.because(
                f"the calls of a step differ in {name}, which has no batch dimension"
            )
    return merged
