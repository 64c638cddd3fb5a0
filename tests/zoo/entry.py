"""One diffusion transformer at a tiny configuration, and what a sampler feeds to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class ZooEntry:
    """A model class of diffusers at one configuration.

    Attributes:
        name: the class, with a note where a class is there twice: `AllegroTransformer3DModel`.
        build: makes the model, random weights; called under a fixed seed.
        inputs: keyword arguments of one call for a batch size; called under a fixed seed. The
            tensors are on the CPU in float32 (int64 for ids and masks as the pipeline makes them).
        latent: dotted name of the argument that the sampler moves (`hidden_states`; `x.0` in a
            list).
        timestep: dotted name of the argument that counts the denoising down; its values in
            `inputs` are those of the first step.
        timesteps: first and last value of the timestep, as the model's own pipeline has them.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Mapping[str, Any]]
    latent: str = "hidden_states"
    timestep: str = "timestep"
    timesteps: tuple[float, float] = (999, 1)
