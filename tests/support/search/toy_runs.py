"""Toy models and samplers, and what their runs are in coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from support.toys import captured
from torch import Tensor, nn
from torch.nn.functional import gelu

from calicache.graph_passes import Sites, StepMode
from calicache.graph_passes.rewriting.rewrite import rewrite
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.sampler.recover import RecordedSampler
from calicache.graph_passes.sampler.update import SamplerSteps
from calicache.graph_passes.search.rehearse import Scales, Span
from calicache.graph_passes.settings.schedule import anchor_table

STEPS = 8
NOWHERE = Sites((), (), (), ())

Shape = tuple[int, int]  # parts of the batch, and whether the sampler looks back
SHAPES = {"one": (1, 0), "guided": (2, 0), "two-step": (1, 1), "guided two-step": (2, 1)}


class Affine(nn.Module):
    """e = gain_t x + c(label, t), float64: a model that answers to a latent by one number."""

    def __init__(self, gains: Sequence[float], shape: tuple[int, ...]) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        table = torch.randn(2, len(gains), *shape, generator=draw, dtype=torch.float64)
        self.table = nn.Parameter(table, requires_grad=False)
        self.gains = nn.Parameter(torch.tensor(gains, dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        return self.gains[timestep][:, None, None, None] * x + self.table[labels, timestep]


def sampler_of(shape: Shape, steps: int = STEPS) -> SamplerSteps:
    """Updates of about the size that a sampler has, other ones at every step."""
    parts, back = shape
    draw = np.random.default_rng(11)
    rows = []
    for step in range(steps):
        now = [draw.uniform(0.8, 1.2), *draw.uniform(-0.6, -0.2, parts)]
        before = [draw.uniform(-0.2, 0.2), *draw.uniform(0.05, 0.2, parts)]
        rows.append(tuple(now + before * (back if step else 0)))
    return SamplerSteps("x", parts, tuple(rows))


def recorded_run(
    model: nn.Module, steps: SamplerSteps, noise: Tensor
) -> tuple[list[dict[str, Tensor]], list[Tensor], Tensor]:
    """Calls, outputs and result of the sampler, each update written out by hand."""
    x, before, calls, outputs = noise, list[Tensor](), [], []
    labels = torch.arange(steps.parts).repeat_interleave(len(noise))
    for step, weights in enumerate(steps.weights):
        timestep = torch.full((len(labels),), step)
        calls.append({"x": torch.cat([x] * steps.parts), "timestep": timestep, "labels": labels})
        outputs.append(model(**calls[-1]))
        now = [x, *outputs[-1].split(len(noise))]
        x = torch.zeros_like(noise)
        for weight, term in zip(weights, now + before, strict=False):
            x = x + weight * term
        before = now
    return calls, outputs, x


def recording_of(
    model: nn.Module, steps: SamplerSteps, size: tuple[int, ...], seeds: Sequence[int] = (1,)
) -> RecordedSampler:
    noises = [
        torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    runs = [recorded_run(model, steps, noise) for noise in noises]
    return RecordedSampler(
        tuple(calls for calls, _, _ in runs),
        tuple(tuple(outputs) for _, outputs, _ in runs),
        tuple(end for _, _, end in runs),
        steps,
    )


def plain_variants(model: nn.Module, call: dict[str, Tensor]) -> VariantSet:
    """REFRESH alone, for replays of REFRESH and FORECAST steps."""
    graph = captured(model, *call.values())
    return rewrite(graph, NOWHERE, (), {}, (), anchors=anchor_table((StepMode.REFRESH,) * STEPS, 2))


def toy_span(steps: int, parts: int = 1, back: int = 0, seed: int = 3) -> Span:
    """A few random outputs, and the latents that a sampler makes of them."""
    draw = np.random.default_rng(seed)
    size = 1 + steps * parts
    outputs = draw.normal(size=(steps, parts, size))
    rows = sampler_of((parts, back), steps).weights
    latents, before = [draw.normal(size=size)], np.zeros((0, size))
    for step, row in enumerate(rows):
        now = np.concatenate([latents[-1][None], outputs[step]])
        latents.append(np.array(row) @ np.concatenate([now, before])[: len(row)])
        before = now
    return Span(torch.tensor(np.stack(latents)), torch.tensor(outputs), rows)


def random_scales(steps: int, seed: int) -> Scales:
    draw = np.random.default_rng(seed)
    return tuple(tuple(row) for row in draw.uniform(0.05, 0.5, (3, steps)).tolist())


class Blocks(nn.Module):
    """Two residual branches on a stream of tokens, float64, with a step and a label inside."""

    def __init__(self, steps: int = STEPS) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.left, self.right = nn.Linear(8, 12), nn.Linear(12, 8)
        self.times = nn.Parameter(torch.randn(steps, 8))
        self.labels = nn.Parameter(torch.randn(2, 8))

    def skip(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """The stream before the first branch."""
        return self.embed(x) + self.times[timestep][:, None] + self.labels[labels][:, None]

    def branches(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """What both branches add to the stream."""
        h = self.skip(x, timestep, labels)
        first = self.down(gelu(self.up(self.norm(h))))
        return first + self.right(torch.tanh(self.left(h + first)))

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        h = self.skip(x, timestep, labels)
        h = h + self.down(gelu(self.up(self.norm(h))))
        h = h + self.right(torch.tanh(self.left(h)))
        return self.out(h)


def tokens(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 8, generator=draw, dtype=torch.float64)
