"""Rectified flow: straight paths from latents to noise, and samplers that walk them back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from scenes import empty_captions
from torch import Tensor

TIME_SCALE = 1000.0

Denoiser = Callable[..., Tensor]


def add_noise(latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t noise (Liu et al. 2023, eq. 1), times (B,) in 0 .. 1."""
    time = time.view(-1, 1, 1, 1)
    return (1.0 - time) * latents + time * noise


def draw_times(batch: int, draw: torch.Generator) -> Tensor:
    """Logit-normal times (B,): most often in the middle (Esser et al. 2024, section 3.1)."""
    return torch.randn(batch, generator=draw).sigmoid()


def flow_times(steps: int, shift: float = 1.0) -> list[float]:
    """Times from 1, all noise, to 0; a shift above 1 spends more of the steps on the noisy part."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * even / (1 + (shift - 1) * even)).tolist()


@dataclass(frozen=True, slots=True)
class GuidedFlow:
    """Sampler of order 1 (Euler) or 2 (Adams-Bashforth), guidance batched: 2 B samples a call.

    Attributes:
        steps: how many calls of the model.
        guidance: 1.0 is the conditional model alone.
        shift: see `flow_times`.
        order: 2 extrapolates the velocity from the step before, at no further call.
    """

    steps: int
    guidance: float
    shift: float = 1.0
    order: int = 2

    def latents(
        self, model: Denoiser, noise: Tensor, captions: Tensor, start: int = 0
    ) -> Iterator[Tensor]:
        """Yield the latents (B, 4, 16, 16) after every step.

        Args:
            model: called as model(hidden_states=, timestep=, caption=).
            noise: standard normal (B, 4, 16, 16); at a later start, latents with its noise.
            captions: word ids int64 (B, L).
            start: the first step, above 0 for image to image.
        """
        x = noise
        both = torch.cat([captions, empty_captions(len(captions))])  # (2B, L)
        times = flow_times(self.steps, self.shift)[start:]
        earlier: tuple[Tensor, float] | None = None
        for now, after in pairwise(times):
            output = model(
                hidden_states=torch.cat([x, x]),
                timestep=torch.full((len(both),), TIME_SCALE * now),
                caption=both,
            )
            conditional, unconditional = output.chunk(2)
            velocity = unconditional + self.guidance * (conditional - unconditional)
            step = after - now
            change = velocity
            if self.order == 2 and earlier is not None:
                before, step_before = earlier
                change = velocity + step / (2 * step_before) * (velocity - before)
            x = x + step * change
            earlier = velocity, step
            yield x

    def sample(self, model: Denoiser, noise: Tensor, captions: Tensor) -> Tensor:
        """The final latents (B, 4, 16, 16)."""
        with torch.no_grad():
            *_, latents = self.latents(model, noise, captions)
        return latents
