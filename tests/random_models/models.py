"""Random diffusion transformers, described by plain values: a found case can be written down."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from support.models import shake
from torch import Tensor, nn

from random_models.mixers import MIXERS, TEXT, WIDTH, Context

CHANNELS, TOKENS, SIDE = 4, 4, 2  # of a latent: (B, N, C), (B, C, SIDE, SIDE), or (B, C)
LABELS = 3

NORMS = ("none", "layer", "rms", "plain_layer")
MODULATIONS = ("none", "scale", "gate", "zero", "tanh_gate")
JOINS = ("add", "in_place", "after_norm", "parallel", "nested", "scaled", "joined")
LAYOUTS = ("tokens", "image", "vector")
RESULTS = ("tensor", "tuple", "dict", "two")
TIMES = ("scaled", "sinusoid", "table")


@dataclass(frozen=True)
class BlockSpec:
    """One block: how it is normed, modulated and joined, and what it does inside."""

    mixer: str
    second: str
    norm: str
    modulation: str
    join: str


@dataclass(frozen=True)
class ModelSpec:
    """A model.

    Attributes:
        blocks: in order.
        layout: of its latent.
        rope, time, result: how tokens are turned, times embedded, results given back.
        skips: whether the first half's values are joined to the second half's, as in U-ViT.
        shared: whether the last block is the first one again.
        tied: whether the embedding's weight is the last layer's too.
        seed: of the weights.
    """

    blocks: tuple[BlockSpec, ...]
    layout: str
    rope: str
    time: str
    result: str
    skips: bool
    shared: bool
    tied: bool
    seed: int


class Block(nn.Module):
    """A block of a random model."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        self.first, self.second = MIXERS[spec.mixer](), MIXERS[spec.second]()
        self.norm = {
            "none": nn.Identity(),
            "layer": nn.LayerNorm(WIDTH),
            "rms": nn.RMSNorm(WIDTH),
            "plain_layer": nn.LayerNorm(WIDTH, elementwise_affine=False),
        }[spec.norm]
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.joined = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, condition: Tensor, context: Context) -> Tensor:
        shift, scale, gate = (
            part if x.ndim == 2 else part[:, None]
            for part in self.modulation(F.silu(condition)).chunk(3, dim=-1)
        )
        kind, join = self.spec.modulation, self.spec.join
        h = self.norm(x)
        if kind in ("scale", "zero"):
            h = h * (1 + scale) + shift
        value = self.first(h, context)
        if join == "nested":
            value = value + self.second(self.norm(value), context)
        if kind in ("gate", "zero", "tanh_gate"):
            value = value * (torch.tanh(gate) if kind == "tanh_gate" else gate)
        if join == "in_place":
            x = x.clone()
            x += value
            return x
        if join == "after_norm":
            return self.norm(x + value)
        if join == "parallel":
            return x + value + self.second(h, context)
        if join == "scaled":
            return 0.8 * x + 0.6 * value
        return self.joined(torch.cat([x, value], dim=-1)) if join == "joined" else x + value


class RandomModel(nn.Module):
    """A model of a spec."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed, self.out = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.blocks = nn.ModuleList(Block(block) for block in spec.blocks)
        if spec.shared:
            self.blocks.append(self.blocks[0])
        if spec.tied:
            self.out.weight = nn.Parameter(self.embed.weight.T.contiguous())
            self.embed.weight = nn.Parameter(self.out.weight.T)
        self.label, self.time = nn.Embedding(LABELS, WIDTH), nn.Embedding(1000, WIDTH)
        self.time_in, self.text_in = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.skip = nn.Linear(2 * WIDTH, WIDTH)

    def forward(
        self, x: Tensor, timestep: Tensor, label: Tensor, text: Tensor, mask: Tensor
    ) -> object:
        layout = self.spec.layout
        tokens = self.embed(x.flatten(2).transpose(1, 2) if layout == "image" else x)
        condition = self._time(timestep, x) + self.label(label)
        context = Context(self.text_in(text), mask, self.spec.rope)
        kept: list[Tensor] = []
        half = len(self.blocks) // 2
        for place, block in enumerate(self.blocks):
            if self.spec.skips and place < half:
                kept.append(tokens)
            if self.spec.skips and place >= len(self.blocks) - half:
                tokens = self.skip(torch.cat([tokens, kept.pop()], dim=-1))
            tokens = block(tokens, condition, context)
        result = self.out(tokens)
        if layout == "image":
            result = result.transpose(1, 2).unflatten(2, (SIDE, SIDE))
        return self._given_back(result)

    def _time(self, timestep: Tensor, x: Tensor) -> Tensor:
        if self.spec.time == "table":
            return self.time(timestep)
        numbers = timestep[:, None].to(x.dtype) / 1000
        if self.spec.time == "scaled":
            return self.time_in(numbers.expand(-1, WIDTH))
        angles = numbers * 10.0 ** torch.arange(WIDTH // 2).to(x.dtype)
        return self.time_in(torch.cat([angles.sin(), angles.cos()], dim=-1))

    def _given_back(self, result: Tensor) -> object:
        if self.spec.result == "tuple":
            return (result,)
        if self.spec.result == "dict":
            return {"sample": result}
        return (result, 2 * result + 1) if self.spec.result == "two" else result


def random_model(spec: ModelSpec) -> nn.Module:
    """The model, with weights that let every branch change its step by step."""
    torch.manual_seed(spec.seed)
    return shake(RandomModel(spec), 0.1)


def call_of(spec: ModelSpec, x: Tensor, step: int, part: int) -> dict[str, Tensor]:
    """Arguments of one call; the parts of a step differ in label and text."""
    batch = x.shape[0]
    draw = torch.Generator().manual_seed(part)
    mask = torch.arange(TOKENS) < TOKENS - part % 2
    return {
        "x": x,
        "timestep": torch.full((batch,), 900 - 100 * step),
        "label": torch.full((batch,), part % LABELS),
        "text": torch.randn(batch, TEXT, WIDTH, generator=draw).to(x.dtype),
        "mask": mask.expand(batch, -1),
    }


def noise(spec: ModelSpec, batch: int, dtype: torch.dtype) -> Tensor:
    """The latent that a run starts with."""
    shape = {
        "tokens": (batch, TOKENS, CHANNELS),
        "image": (batch, CHANNELS, SIDE, SIDE),
        "vector": (batch, CHANNELS),
    }[spec.layout]
    return torch.randn(shape, generator=torch.Generator().manual_seed(spec.seed)).to(dtype)
