"""Small models: random weights, and what real samplers feed them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusion import GuidedDDIM
from model import FashionDiT
from torch import Tensor, nn

from calicache.graph_passes import Recording, StepMode, record

STEPS = 6
LETTERS = dict(zip("RCUF", StepMode, strict=True))


def modes(letters: str) -> tuple[StepMode, ...]:
    """A schedule in letters: REFRESH, CALIBRATE, REUSE (U), FORECAST."""
    return tuple(LETTERS[letter] for letter in letters)


class Branch(nn.Module):
    """x + f(x) of tokens (B, N, 8), which are embedded first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def branch(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return x + self.branch(self.norm(x))


def shake(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """Random values in every parameter, so that zero-initialised gates let something through."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=draw)
    return model.eval().requires_grad_(False)


def sample_dit(model: nn.Module, batch: int = 2, seed: int = 1, steps: int = STEPS) -> torch.Tensor:
    """Run the sample's own sampler; batch 2 means 4 rows, guidance included."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 1, 28, 28, generator=draw)
    labels = torch.arange(batch) % 10
    return GuidedDDIM(steps, 1.5, 10).sample(model, noise, labels)


def diffusers_calls(model: nn.Module, seed: int = 1, steps: int = STEPS) -> list[torch.Tensor]:
    """A denoising loop over a diffusers DiT; returns the outputs of all steps."""
    draw = torch.Generator().manual_seed(seed)
    latents = torch.randn(4, 4, 8, 8, generator=draw)
    outputs = []
    with torch.no_grad():
        for now in torch.linspace(999, 0, steps).long():
            output = model(
                latents, timestep=now.expand(4), class_labels=torch.tensor([1, 2, 10, 10])
            ).sample
            outputs.append(output)
            latents = latents - 0.2 * output[:, :4]
    return outputs


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error."""
    return float((got - expected).norm() / expected.norm())


def half_precision(dit: FashionDiT) -> tuple[FashionDiT, Recording]:
    """The same weights in float16, and three recorded calls at falling timesteps."""
    half = FashionDiT(dit.config).eval()
    half.load_state_dict(dit.state_dict())
    half.half()
    images = torch.randn(4, 1, 28, 28).half()
    with record(half) as recording, torch.no_grad():
        for now in (900, 600, 300):
            images = images - 0.2 * half(images, torch.full((4,), now), torch.arange(4))
    return half, recording
