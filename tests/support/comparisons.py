"""Recorded runs with what the sampler made of them step by step, and comparisons made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler
from diffusion import GuidedDDIM
from torch import Tensor, nn

from calicache.export import Layout
from calicache.graph_passes import Recording, StepMode, record
from calicache.graph_passes.settings.front import ErrorSummary
from calicache.tools.compare.comparison import Comparison, ModeTime, StepComparison
from calicache.tools.compare.pictures import ImageMeasures, PictureKind

R, C, U, FORECAST = StepMode
STEPS, GUIDANCE, NULL = 6, 1.5, 10

Latents = list[Tensor]
Denoise = Callable[[Callable[..., Any], Tensor], Latents]


class Residual(nn.Module):
    """One residual branch over (rows, 5, 8) tokens, with a class label."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 8)
        self.label, self.norm = nn.Embedding(11, 16), nn.LayerNorm(16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        h = self.enter(hidden_states) + self.label(class_labels)[:, None]
        h = h + timestep[:, None, None] / 1000
        return self.leave(h + self.fc2(F.gelu(self.fc1(self.norm(h)))))


def residual(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval().requires_grad_(False).to(dtype)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ddim(model: Callable[..., Any], noise: Tensor) -> Latents:
    """The sample's sampler, guidance in one batch."""
    labels = torch.arange(len(noise)) % 10
    with torch.no_grad():
        return [*GuidedDDIM(STEPS, GUIDANCE, NULL).latents(model, noise, labels)]


def two_calls(model: Callable[..., Any], noise: Tensor) -> Latents:
    """The same, guidance by two calls a step."""
    rows = len(noise)

    def denoiser(hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        parts = (slice(0, rows), slice(rows, 2 * rows))
        return torch.cat(
            [
                model(
                    hidden_states=hidden_states[part],
                    timestep=timestep[part],
                    class_labels=class_labels[part],
                )
                for part in parts
            ]
        )

    return ddim(denoiser, noise)


def flow(dtype: torch.dtype = torch.float32, noisy: float = 0.0) -> Denoise:
    """Euler steps from 1 to 0 in float32, without guidance; `noisy` adds noise to every latent."""

    def denoise(model: Callable[..., Any], x: Tensor) -> Latents:
        latents = []
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for now in torch.linspace(1, 1 / STEPS, STEPS):
                given = {"hidden_states": x.to(dtype), "timestep": (1000 * now).expand(2).to(dtype)}
                output = model(**given, class_labels=torch.tensor([1, 2]))
                x = x - output.float() / STEPS
                x = x + noisy * torch.randn(x.shape, generator=generator)
                latents.append(x)
        return latents

    return denoise


def euler_scheduler() -> EulerDiscreteScheduler:
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    return scheduler


def euler(model: Callable[..., Any], x: Tensor) -> Latents:
    """A sampler whose model gets the latent times a scale of the step."""
    scheduler, latents = euler_scheduler(), []
    with torch.no_grad():
        for now in scheduler.timesteps:
            given = scheduler.scale_model_input(x, now)
            output = model(
                hidden_states=given, timestep=now.expand(2), class_labels=torch.tensor([1, 2])
            )
            x = scheduler.step(output, now, x).prev_sample
            latents.append(x)
    return latents


def recorded(
    model: nn.Module, denoise: Denoise, noises: Sequence[Tensor], *, finish: bool = True
) -> tuple[Recording, list[Latents]]:
    """A recording of one run for every noise, and the latents after every step of each."""
    latents = []
    with record(model) as recording:
        for noise in noises:
            latents.append(denoise(model, noise))
            if finish:
                recording.finish(latents[-1][-1])
    return recording, latents


def errors_of(got: Sequence[Latents], expected: Sequence[Latents]) -> list[list[float]]:
    """Relative L2 errors by step, of every sample of every run."""
    return [
        [
            float((a - b).double().norm() / b.double().norm())
            for mine, exact in zip(got, expected, strict=True)
            for a, b in zip(mine[step], exact[step], strict=True)
        ]
        for step in range(len(expected[0]))
    ]


def comparison_of(
    errors: Sequence[float],
    schedule: Sequence[StepMode],
    *,
    layout: Layout = Layout.STEP,
    ssim: float | None = 0.98,
) -> Comparison:
    """A comparison with these errors; full steps take 10 ms, those of a mode 10, 5, 2 and 1 ms."""
    seconds = dict(zip(StepMode, (0.01, 0.005, 0.002, 0.001), strict=True))
    whole = layout is Layout.SAMPLER
    steps = tuple(
        StepComparison(
            step,
            mode,
            None if whole else ErrorSummary.of([error, 1.5 * error]),
            None if whole else 0.01,
            None if whole else seconds[mode],
        )
        for step, (mode, error) in enumerate(zip(schedule, errors, strict=True))
    )
    modes = tuple(
        ModeTime(
            mode,
            list(schedule).count(mode),
            None if whole else 0.01,
            None if whole else seconds[mode],
        )
        for mode in sorted(set(schedule))
    )
    measures = ImageMeasures(
        PictureKind.IMAGES, 2.0, "-1 .. 1", 31.25, 28.5, ssim, None if ssim is None else 0.95
    )
    return Comparison(
        layout=layout,
        schedule=tuple(schedule),
        macs_share=0.4,
        provider="CPUExecutionProvider",
        runs=2,
        samples=4,
        steps=steps,
        modes=modes,
        final=ErrorSummary.of([errors[-1], 1.5 * errors[-1]]),
        full_seconds=0.01 * len(schedule),
        cached_seconds=sum(seconds[mode] for mode in schedule),
        no_steps="no steps are seen" if whole else None,
        measures=measures,
        no_measures=None,
        environment={"machine": {"processor": "one", "threads": 1}, "versions": {"torch": "2"}},
        full=torch.zeros(4, 1, 2, 2),
        cached=torch.zeros(4, 1, 2, 2),
        pictures=None,
    )
