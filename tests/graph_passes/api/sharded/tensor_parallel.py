"""Plans on a model that tensor parallelism splits; `test_tensor_parallel.py` runs it.

    torchrun --nproc-per-node 2 tensor_parallel.py FOLDER

Every process saves the results of runs: of the plain model, of plans on the whole one, and of the
same plans on the split one, also where a plan is made of the split model itself. What is refused
goes to a text of its own.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from model import Attention, FashionDiT, FashionDiTConfig
from safetensors.torch import save_file
from support.artifacts import quick_exports
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from calicache.export import export_onnx
from calicache.graph_passes import Plan, SiteRule, optimize, record
from calicache.graph_passes.common.errors import CalicacheError
from calicache.graph_passes.common.shards import groups_of
from calicache.graph_passes.rewriting.workspace import Workspace

STEPS = 6
CASES: Mapping[str, Mapping[str, Any]] = {
    "forecast": {"schedule": "RRFRRF"},
    "all modes": {"schedule": "RRCUCF", "rank": 4},
    "activation": {"schedule": "RRCRRC", "rank": 4, "weighting": "activation"},
    "branch": {"schedule": "RRCRRC", "rank": 4, "granularity": "branch"},
    "int8": {
        "schedule": "RRCRRC",
        "rank": 4,
        "branch": "int8",
        "rules": [SiteRule(place, "calibrate", branch="low_rank") for place in ("*proj", "*fc2")],
    },
}
OWN = ("forecast", "all modes", "activation", "branch")


class SplitAttention(Attention):
    """Attention over as many heads as its layers give."""

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens."""
        split = (x.shape[0], x.shape[1], self.heads, -1)
        q, k, v = (layer(x).view(split).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def small_model() -> FashionDiT:
    """Two blocks of random weights."""
    torch.manual_seed(0)
    model = FashionDiT(FashionDiTConfig(width=32, depth=2)).eval()
    for block in model.blocks:
        block.attn = SplitAttention(32, 4)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


def odd_model() -> FashionDiT:
    """The same, with an MLP whose hidden channels two processes do not share evenly."""
    model = small_model()
    mlp = model.blocks[0].mlp
    mlp.fc1, mlp.fc2 = nn.Linear(32, 33), nn.Linear(33, 32)
    return model.eval()


def split(model: FashionDiT, mesh: DeviceMesh, **styles: ParallelStyle) -> FashionDiT:
    """A copy with attention and MLP of every block split over the processes."""
    model = copy.deepcopy(model)
    columns, rows = ColwiseParallel(), RowwiseParallel()
    layers = {f"attn.{name}": columns for name in "qkv"} | {"attn.proj": rows}
    layers |= {"mlp.fc1": columns, "mlp.fc2": rows}
    layers |= {"modulation": ColwiseParallel(output_layouts=Replicate())}
    for block in model.blocks:
        parallelize_module(block, mesh, layers | styles)
        block.attn.heads //= mesh.size()
    return model


def result(model: nn.Module) -> Tensor:
    """What a sampler of six steps makes of noise."""
    x = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for step in range(STEPS):
            timestep = torch.full((2,), 10.0 * (STEPS - step))
            x = x - 0.1 * model(x, timestep, torch.tensor([1, 2]))
    return x


def planner(model: nn.Module, workspace: Workspace, runs: int = 1) -> Callable[..., Plan]:
    """Makes plans of recorded runs, with one capture of the model for all of them."""
    with record(model) as recording:
        for _ in range(runs):
            recording.finish(result(model))
    return partial(Plan.from_trajectory, model, recording, order=1, workspace=workspace)


def refusal(attempt: Callable[[], object]) -> list[str]:
    """What is said to an attempt."""
    try:
        attempt()
    except CalicacheError as error:
        return [type(error).__name__, error.where, error.expected, error.got]
    return []


def uneven(model: FashionDiT, mesh: DeviceMesh) -> FashionDiT:
    """A copy that splits the odd layer, of which one process has more rows, and gathers y."""
    fc1 = {"mlp.fc1": ColwiseParallel(output_layouts=Replicate())}
    model = copy.deepcopy(model)
    parallelize_module(model.blocks[0], mesh, fc1)
    return model


def gathered(model: FashionDiT, mesh: DeviceMesh) -> FashionDiT:
    """A copy that is split by one dimension of a mesh, its parts spread by FSDP over the other."""
    both = init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("data", "tensor"))
    return fully_shard(split(model, both["tensor"]), mesh=both["data"])


def forecasts(
    model: FashionDiT, plans: Callable[..., Plan], parts: FashionDiT, name: str
) -> dict[str, Tensor]:
    """Of a plan that looks into no model, with whole weights and with spread ones."""
    plan, own = (make(**CASES["forecast"]) for make in (plans, planner(parts, Workspace())))
    return {
        f"{name} forecast": result(optimize(model, plan)),
        f"{name} forecast, split": result(optimize(parts, plan)),
        f"{name} forecast, planned split": result(optimize(parts, own)),
    }


def refusals(
    model: FashionDiT, parts: FashionDiT, plans: Callable[..., Plan], mesh: DeviceMesh, folder: str
) -> dict[str, list[str]]:
    """Everything that cannot be done."""
    plan = plans(**CASES["all modes"])
    integers = plans(schedule="RRCRRC", branch="int8", correct=False)
    odd = odd_model()
    odd_plan = planner(odd, Workspace())(**CASES["all modes"], correct=False)
    tokens = split(model, mesh, **{"attn.proj": RowwiseParallel(output_layouts=Shard(1))})
    tables = parallelize_module(copy.deepcopy(model), mesh, {"class_embed": RowwiseParallel()})
    dtensors = split(model, mesh, **{"mlp.fc1": ColwiseParallel(use_local_output=False)})
    with record(parts) as recording:
        for _ in range(3):
            recording.finish(result(parts))
    world = distributed.group.WORLD
    return {
        "int8": refusal(lambda: optimize(parts, integers)),
        "embedding": refusal(lambda: optimize(tables, plan)),
        "dtensors": refusal(lambda: optimize(dtensors, plan)),
        "uneven": refusal(lambda: optimize(uneven(odd, mesh), odd_plan)),
        "layouts": refusal(lambda: optimize(tokens, plan)),
        "two dimensions": refusal(lambda: optimize(gathered(model, mesh), plan)),
        "export": refusal(lambda: export_onnx(optimize(parts, plan), f"{folder}/artifact")),
        "search": refusal(lambda: Plan.search(parts, recording, budget=0.5)),
        "group": refusal(
            lambda: Plan.from_trajectory(parts, recording, schedule="RRFRRF", group=world)
        ),
    }


def main() -> None:
    """Command line."""
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    model = small_model()
    parts = split(model, mesh)
    workspace = Workspace()
    plans, plans_of_parts = planner(model, workspace), planner(parts, workspace)
    results = {"plain": result(model), "plain, split": result(parts)}
    for name, settings in CASES.items():
        plan = plans(**settings)
        whole, fast = optimize(model, plan), optimize(parts, plan)
        results[name], results[f"{name}, split"] = result(whole), result(fast)
        if name == "all modes":
            mesh_of_two = init_device_mesh(
                "cpu", (1, mesh.size()), mesh_dim_names=("data", "tensor")
            )
            one_dimension = split(model, mesh_of_two["tensor"])
            results[f"{name}, one dimension"] = result(optimize(one_dimension, plan))
            assert groups_of(fast.compiled.captured.graph)
            names = [target.name for target in fast.compiled.targets]
            assert names == [target.name for target in whole.compiled.targets]
        if name in OWN:
            own = optimize(parts, plans_of_parts(**settings))
            results[f"{name}, planned split"] = result(own)
    odd = odd_model()
    odd_plans = planner(odd, Workspace())
    results |= forecasts(odd, odd_plans, uneven(odd, mesh), "uneven")
    results |= forecasts(model, plans, gathered(model, mesh), "gathered")
    rank, folder = distributed.get_rank(), sys.argv[1]
    save_file(results, Path(folder) / f"{rank}.safetensors")
    refused = refusals(model, parts, plans, mesh, folder)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(refused))
    distributed.destroy_process_group()


if __name__ == "__main__":
    with quick_exports():
        main()
