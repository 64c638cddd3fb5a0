"""Real, small models and what their real samplers feed to them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusion import GuidedDDIM
from model import FashionDiT, FashionDiTConfig
from torch import nn

from calicache.export import Session
from calicache.graph_passes import Plan, StepMode, Trajectory, record

STEPS = 6


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


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


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all graphs inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


def kept_refreshes(session: Session, call: int = 0) -> list[dict[str, ort.OrtValue]]:
    """What a session keeps on its device, newest refresh first."""
    kept, caches = session._kept[call], session.manifest.caches
    return [
        {cache.name: kept.read(cache, back) for cache in caches if back < kept.depths[cache.name]}
        for back in range(min(kept.count, session.manifest.history))
    ]


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


@pytest.fixture(scope="session")
def dit() -> FashionDiT:
    """The sample's architecture at 2 blocks of width 32, all weights random."""
    torch.manual_seed(0)
    return shake(FashionDiT(FashionDiTConfig(width=32, depth=2, frequency_channels=32)))


@pytest.fixture(scope="session")
def dit_trajectory(dit: FashionDiT) -> Trajectory:
    with record(dit) as trajectory:
        sample_dit(dit)
    return trajectory


@pytest.fixture(scope="session")
def dit_plan(dit: FashionDiT, dit_trajectory: Trajectory) -> Plan:
    """The paper's method: stale anchors, factors from channel statistics of the increments."""
    return Plan.from_trajectory(
        dit, dit_trajectory, interval=3, rank=4, weighting="increment", order=0, correct=False
    )


@pytest.fixture(scope="session")
def forecast_plan(dit: FashionDiT, dit_trajectory: Trajectory) -> Plan:
    """Everything at once: order 2, covariance, joint siblings, all modes, output weights."""
    letters = {"R": 0, "C": 1, "U": 2, "F": 3}
    schedule = [StepMode(letters[letter]) for letter in "RCRURF"]
    return Plan.from_trajectory(dit, dit_trajectory, schedule=schedule, rank=4)


@pytest.fixture(scope="session")
def diffusers_dit() -> DiTTransformer2DModel:
    """diffusers' own DiT at 2 blocks of width 16, all weights random."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return shake(model)


@pytest.fixture(scope="session")
def diffusers_trajectory(diffusers_dit: DiTTransformer2DModel) -> Trajectory:
    with record(diffusers_dit) as trajectory:
        diffusers_calls(diffusers_dit)
    return trajectory


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error."""
    return float((got - expected).norm() / expected.norm())
