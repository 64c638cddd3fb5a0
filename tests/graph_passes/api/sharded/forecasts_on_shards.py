"""A plan of forecasts on a transformer that FSDP shards; `test_sharded.py` runs it.

    torchrun --nproc-per-node 2 forecasts_on_shards.py FOLDER

Every process saves latents of the plain model, of the plan on the whole model, and of the same
plan on the sharded one, also where the plan is made of the sharded model itself; and what is said
to a plan that needs graphs.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.pipelines.tiny import CASES
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from calicache.graph_passes import Plan, optimize, record
from calicache.graph_passes.common.errors import CaptureError

SCHEDULE = "RRFRRF"
FLUX = next(case for case in CASES if case.name == "flux")


def latents(model: nn.Module) -> Tensor:
    """What the pipeline makes with a transformer."""
    pipe = FLUX.build()
    pipe.transformer = model
    with torch.no_grad():
        return FLUX.latents(pipe, "a photo of a cat")


def plan_of(model: nn.Module, schedule: str = SCHEDULE) -> Plan:
    """Of one recorded run of the pipeline."""
    pipe = FLUX.build()
    pipe.transformer = model
    with record(model) as recording, torch.no_grad():
        recording.finish(FLUX.latents(pipe, "a photo of a cat"))
    return Plan.from_trajectory(model, recording, schedule=schedule, order=1)


def sharded(model: nn.Module) -> nn.Module:
    """The model with every block's weights spread over the processes."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(value, DTensor) for value in model.parameters())
    return model


def main() -> None:
    """Command line."""
    distributed.init_process_group("gloo")
    model = copy.deepcopy(FLUX.build().transformer)
    plan = plan_of(model)
    shards = sharded(copy.deepcopy(model))
    results = {
        "plain": latents(model),
        "whole": latents(optimize(model, plan)),
        "sharded": latents(optimize(shards, plan)),
        "planned on shards": latents(optimize(shards, plan_of(shards))),
    }
    rank, folder = distributed.get_rank(), Path(sys.argv[1])
    save_file(results, folder / f"{rank}.safetensors")
    try:
        optimize(shards, plan_of(model, "RRCRRC"))
    except CaptureError as error:
        (folder / f"{rank}.txt").write_text(error.got)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
