"""The calls of one step as one call: guidance by two calls, seen as guidance by a batch of two.

What the sampler makes of the outputs is recovered, fitted and exported in this form; the model
itself goes on being called as its pipeline calls it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from calicache.graph_passes.common.errors import NoSampler
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.signature import CallSignature
from calicache.graph_passes.recording.timestep import Call


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


def merge_calls(calls: Sequence[Call], batch: int) -> Call:
    """The calls of one step as one call.

    Args:
        calls: tensors by argument name, each (B, ...) or the same in all calls.
        batch: B, the first dimension of the latent.

    Raises:
        NoSampler: the calls differ in what has no batch dimension.
    """
    merged: dict[str, Tensor] = {}
    for name, first in calls[0].items():
        values = [call[name] for call in calls]
        if first.shape[:1] == (batch,):
            merged[name] = torch.cat(values)
        elif all(torch.equal(first, value) for value in values):
            merged[name] = first
        else:
            raise NoSampler(f"the calls of a step differ in {name}, which has no batch dimension")
    return merged
