"""A plan, artifacts and a recording of a model small enough to make them often; what is said."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from support.artifacts import exported, shared_artifact
from support.models import modes, shake
from torch import Tensor, nn

from calicache.export import Layout, export_onnx, read_sampler
from calicache.graph_passes import Plan, Recording, SiteMode, SiteRule, optimize, record
from calicache.tools.inspect.command import Facts, describe_facts

STEPS = 6
RULES = (
    SiteRule("blocks.0", SiteMode.REUSE),
    SiteRule("blocks.1.fc1", SiteMode.FULL),
    SiteRule("blocks.2.fc2", SiteMode.CALIBRATE, rank=3),
)


class Block(nn.Module):
    """A residual branch of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(x)))


class Small(nn.Module):
    """Three blocks between two layers, on (2, 5, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = self.embed(x) * (1 + timestep[:, None, None])
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return shake(Small())


def small_runs(model: nn.Module, runs: int = 1, *, finish: bool = True) -> Recording:
    """Runs of Euler's method from different noise."""
    draw = torch.Generator().manual_seed(3)
    with record(model) as recording:
        for _ in range(runs):
            x = torch.randn(2, 5, 4, generator=draw)
            for step in range(STEPS):
                x = x - 0.1 * model(x, torch.full((2,), 1 - step / STEPS))
            if finish:
                recording.finish(x)
    return recording


def small_plan(
    model: nn.Module,
    recording: Recording,
    letters: str = "RCRURF",
    rules: Sequence[SiteRule] = RULES,
    rank: int = 4,
) -> Plan:
    """All modes, one branch that is reused, one layer in full, one rank of its own."""
    return Plan.from_trajectory(
        model, recording, schedule=modes(letters), rank=rank, order=1, rules=rules
    )


def small_folder() -> Path:
    """`plan`, `dit.onnx.d` and `runs.safetensors`, made once in a test run."""
    return shared_artifact("a path with spaces", _fill_small_folder)


def _fill_small_folder(folder: Path) -> None:
    folder.mkdir()
    model = small_model()
    recording = small_runs(model)
    plan = small_plan(model, recording)
    recording.save(folder / "runs.safetensors")
    plan.save(folder / "plan")
    export_onnx(optimize(model, plan), folder / "dit.onnx.d")


@cache
def other_artifact(letters: str = "RCCRCC", layout: Layout = Layout.STEP) -> Path:
    """Without rules, at rank 2; in another layout with another schedule."""
    model = small_model()
    recording = small_runs(model)
    fast = optimize(model, small_plan(model, recording, letters, rules=(), rank=2))
    sampler = read_sampler(fast, recording) if layout is Layout.SAMPLER else None
    return exported(fast, layout, sampler)


def printed(facts: Facts, width: int = 80) -> str:
    """Facts as a terminal of that width shows them."""
    file = io.StringIO()
    Console(file=file, width=width, highlight=False).print(describe_facts(facts))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def codes(facts: Facts) -> list[str]:
    """Of the warnings, in order."""
    return [caution.code for caution in facts.warnings]


def texts(facts: Facts) -> dict[str, str]:
    """Of the warnings, by code."""
    return {caution.code: caution.text for caution in facts.warnings}
