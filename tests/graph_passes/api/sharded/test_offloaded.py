"""Models that accelerate spreads over places: a plan reads their weights where they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from support.models import relative
from support.pipelines.tiny import CASES
from torch import Tensor, nn

from calicache.graph_passes import Plan, optimize, record
from calicache.graph_passes.common.disk.hashing import hash_weights
from calicache.graph_passes.common.errors import CaptureError
from calicache.graph_passes.graph.capture import capture

pytestmark = pytest.mark.slow

FLUX = next(case for case in CASES if case.name == "flux")
CPU = torch.device("cpu")


def latents(model: nn.Module) -> Tensor:
    """What the pipeline makes with a transformer."""
    pipe = FLUX.build()
    pipe.transformer = model
    return FLUX.latents(pipe, "a photo of a cat")


def plan_of(model: nn.Module, schedule: str = "RRFRRF") -> Plan:
    """Of one recorded run of the pipeline."""
    with record(model) as recording:
        recording.finish(latents(model))
    return Plan.from_trajectory(model, recording, schedule=schedule, order=1, correct=False)


def mapped(model: nn.Module, folder: Path) -> None:
    """Half of the blocks on the disk, all else in memory."""
    places = {name: "cpu" for name, _ in model.named_children()}
    places |= {"single_transformer_blocks": "disk"}
    dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def in_memory(model: nn.Module, _: Path) -> None:
    """All weights in the memory of the CPU, until they are used."""
    cpu_offload(model, execution_device=CPU)


def on_disk(model: nn.Module, folder: Path) -> None:
    """All weights on the disk, until they are used."""
    disk_offload(model, folder, execution_device=CPU)


@pytest.mark.parametrize("spread", [mapped, in_memory, on_disk])
def test_forecasts_run_and_graphs_are_refused(
    spread: Callable[[nn.Module, Path], None], tmp_path: Path
) -> None:
    model = copy.deepcopy(FLUX.build().transformer)
    plan = plan_of(model)
    expected, weights = latents(optimize(model, plan)), hash_weights(model)
    spread(model, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert hash_weights(model) == weights
    # The same operations on copies of the same weights.
    assert relative(latents(optimize(model, plan)), expected) < 1e-5
    assert relative(latents(optimize(model, plan_of(model))), expected) < 1e-5
    with pytest.raises(CaptureError, match="on one device") as refused:
        plan_of(model, "RRCRRC")
    assert "accelerate" in refused.value.got


def test_weights_on_several_devices_are_refused() -> None:
    model = copy.deepcopy(FLUX.build().transformer)
    plan = plan_of(model)
    model.proj_out.weight = nn.Parameter(model.proj_out.weight.to("meta"))
    with pytest.raises(CaptureError, match="on one device") as refused:
        capture(model, plan.binding.signature)
    assert refused.value.got == "some on each of cpu, meta"
