"""Models that `calicache bench` measures, and the sampler that runs all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from calicache.graph_passes.common.errors import BenchError, ModelError
from calicache.graph_passes.recording.recorder import Recorder
from calicache.graph_passes.recording.recording import Recording
from calicache.tools.terminal.model_file import call_in_file
from calicache.tools.terminal.options import import_library

Denoiser = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A denoiser with what a sampler needs to run it.

    Attributes:
        name: for tables.
        width: channels of the latent stream; the rank is measured against it.
        build: makes the model, in eval mode. Weights may be random: time does not depend on them.
        noise: shape of the latents (B, C, ...); a call takes 2 B, guidance batched.
        inputs: the model's other arguments, the same at every step, tensors of (2 B, ...).
        latent, timestep: names of the arguments that the sampler makes.
        guidance: scale of classifier-free guidance; None for none, and calls of B.
    """

    name: str
    width: int
    build: Callable[[], nn.Module]
    noise: tuple[int, ...]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    latent: str = "hidden_states"
    timestep: str = "timestep"
    guidance: float | None = 4.0

    def draw(self, seed: int) -> Tensor:
        """Noise to start from."""
        return torch.randn(self.noise, generator=torch.Generator().manual_seed(seed))

    def latents(self, model: Denoiser, noise: Tensor, steps: int) -> Iterator[Tensor]:
        """Yield the latents after every step of an Euler sampler with guidance.

        Args:
            model: takes the named tensors; returns a tensor, or a tuple or output object that
                holds it first. Channels beyond the latents' own (learned variances) are left out.
            noise: latents to start from.
            steps: calls of the model.
        """
        x, parts = noise, 1 if self.guidance is None else 2
        for now in torch.linspace(999, 0, steps).round().long():
            timesteps = now.expand(parts * self.noise[0]).clone()
            tensors = {self.latent: torch.cat(parts * [x]), self.timestep: timesteps}
            result = model(**tensors, **self.inputs)
            output = result if isinstance(result, Tensor) else result[0]
            x = 0.98 * x - 0.05 * self._guided(output[:, : x.shape[1]])
            yield x

    def _guided(self, output: Tensor) -> Tensor:
        if self.guidance is None:
            return output
        conditional, unconditional = output.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    def imagined(self, module: nn.Module, steps: int) -> Recording:
        """A run as its calls would be if the model returned its latents: it is not run.

        Args:
            module: the model, on any device.
            steps: of the run.

        Raises:
            RecordError: the model does not take these arguments.
        """
        recorder = Recorder()

        def answer(**call: Any) -> Tensor:
            recorder.append(module, (), call)
            latents: Tensor = call[self.latent]
            return latents

        recorder.finish(self.sample(answer, self.draw(0), steps))
        return recorder

    def sample(self, model: Denoiser, noise: Tensor, steps: int) -> Tensor:
        """The latents after the last step."""
        with torch.no_grad():
            *_, last = self.latents(model, noise, steps)
        return last


def find_model(name: str) -> BenchModel:
    """One of `MODELS`, or the result of a function in a file: `path/to/file.py:function`.

    Raises:
        BenchError: there is none of that name.
    """
    if name in MODELS:
        return MODELS[name]()
    try:
        model: BenchModel = call_in_file(name, "a BenchModel", lambda r: isinstance(r, BenchModel))
    except ModelError as error:
        raise BenchError(
            "model",
            expected=f"{' | '.join(MODELS)}, or FILE.py:FUNCTION that returns a BenchModel",
            got=f"{name!r}: {error.got}",
            fix="Choose one of these.",
        ) from error
    return model


def _dit(name: str, heads: int, head_width: int, layers: int) -> BenchModel:
    """DiT of diffusers for 256 x 256 images: 256 tokens, two samples with guidance."""

    def build() -> nn.Module:
        diffusers = import_library("diffusers", "diffusers", f"has {name}", "evaluate")
        torch.manual_seed(0)
        model: nn.Module = diffusers.DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_width,
            in_channels=4,
            out_channels=8,
            num_layers=layers,
            sample_size=32,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )
        embedders = [
            model.get_submodule(f"transformer_blocks.{k}.norm1.emb") for k in range(layers)
        ]
        for embedder in embedders:  # all alike, as in published checkpoints
            embedder.load_state_dict(embedders[0].state_dict())
        return model.eval()

    inputs = {"class_labels": torch.tensor([207, 1000])}
    return BenchModel(name, heads * head_width, build, (1, 4, 32, 32), inputs)


MODELS: Mapping[str, Callable[[], BenchModel]] = {
    "dit-s": lambda: _dit("DiT-S/2", 6, 64, 12),
    "dit-b": lambda: _dit("DiT-B/2", 12, 64, 12),
    "dit-xl": lambda: _dit("DiT-XL/2", 16, 72, 28),
}
