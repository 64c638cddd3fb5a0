"""The forward process of the sample model and its DDIM sampler with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TRAIN_STEPS = 1000

Denoiser = Callable[..., Tensor]


def alpha_bar_table() -> Tensor:
    """Products of (1 - beta) for the linear schedule 1e-4 .. 0.02, float64 (1000,)."""
    betas = torch.linspace(1e-4, 0.02, TRAIN_STEPS, dtype=torch.float64)
    return torch.cumprod(1.0 - betas, dim=0)


def add_noise(images: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al. 2020, eq. 4)."""
    alpha = alpha_bar_table()[timestep].float().view(-1, 1, 1, 1)
    return alpha.sqrt() * images + (1.0 - alpha).sqrt() * noise


def ddim_timesteps(steps: int) -> list[int]:
    """`steps` timesteps from the noisiest to the cleanest, evenly spaced, the last one 0."""
    return torch.linspace(TRAIN_STEPS - 1, 0, steps).round().long().tolist()


@dataclass(frozen=True, slots=True)
class GuidedDDIM:
    """Deterministic DDIM (Song et al. 2021, eq. 12, eta 0), guidance batched: 2 B samples a call.

    Attributes:
        steps: how many calls of the model.
        guidance: 1.0 is the conditional model alone.
        null_class: the label of the unconditional half.
    """

    steps: int
    guidance: float
    null_class: int

    def latents(
        self, model: Denoiser, noise: Tensor, labels: Tensor, start: int = 0
    ) -> Iterator[Tensor]:
        """Yield the latents (B, 1, H, W) after every step, the last one being the image.

        Args:
            model: called as model(hidden_states=, timestep=, class_labels=).
            noise: standard normal (B, 1, H, W); at a later start, images with that step's noise.
            labels: int64 (B,).
            start: the first step, above 0 for image to image.
        """
        table = alpha_bar_table().float()
        x = noise
        both = torch.cat([labels, torch.full_like(labels, self.null_class)])  # (2B,)
        timesteps = ddim_timesteps(self.steps)[start:]
        for now, after in zip(timesteps, [*timesteps[1:], None], strict=True):
            output = model(
                hidden_states=torch.cat([x, x]),
                timestep=torch.full_like(both, now),
                class_labels=both,
            )
            conditional, unconditional = output.chunk(2)
            epsilon = unconditional + self.guidance * (conditional - unconditional)
            alpha = table[now]
            alpha_after = table[after] if after is not None else torch.tensor(1.0)
            clean = (x - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
            x = alpha_after.sqrt() * clean + (1 - alpha_after).sqrt() * epsilon
            yield x

    def sample(self, model: Denoiser, noise: Tensor, labels: Tensor) -> Tensor:
        """The final image (B, 1, H, W), nominally in -1 .. 1."""
        with torch.no_grad():
            *_, image = self.latents(model, noise, labels)
        return image
