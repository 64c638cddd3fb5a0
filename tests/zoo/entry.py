"""One diffusion transformer at a tiny configuration, and what a sampler feeds to it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from zoo.tables.inputs import at_batch


def unchanged(model: nn.Module) -> None:
    """Leave a model as its class makes it."""


@dataclass(frozen=True, slots=True)
class ZooEntry:
    """A model class of diffusers at one configuration: a row of a table.

    Attributes:
        name: the class, with a note where a class is there twice: `Transformer2DModel (ada_norm)`.
        config: arguments of the class.
        call: keyword arguments of one call; functions in it are called with the size of the
            batch, in their order, under a fixed seed. Tensors are on the CPU in float32 (int64
            for ids and masks as the pipeline makes them).
        latent: dotted name of the argument that the sampler moves (`hidden_states`; `x.0` in a
            list).
        timestep: dotted name of the argument that counts the denoising down; its values in
            `call` are those of the first step.
        timesteps: first and last value of the timestep, as the model's own pipeline has them.
        module: where the class is.
        prepare: gives values to the memory that the class leaves as it is.
    """

    name: str
    config: Mapping[str, Any]
    call: Mapping[str, Any]
    latent: str = "hidden_states"
    timestep: str = "timestep"
    timesteps: tuple[float, float] = (999, 1)
    module: str = "diffusers"
    prepare: Callable[[nn.Module], Any] = unchanged

    @property
    def class_name(self) -> str:
        """The class, without the note."""
        return self.name.split()[0]

    def build(self) -> nn.Module:
        """The model with random weights; call it under a fixed seed."""
        model_class: Callable[..., nn.Module] = getattr(
            importlib.import_module(self.module), self.class_name
        )
        model = model_class(**self.config)
        self.prepare(model)
        return model

    def inputs(self, batch: int) -> dict[str, Any]:
        """Keyword arguments of one call for a batch; call it under a fixed seed."""
        return at_batch(dict(self.call), batch)
