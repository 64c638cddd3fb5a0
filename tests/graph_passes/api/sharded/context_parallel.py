"""Plans on transformers whose tokens diffusers splits; `test_context_parallel.py` runs it.

    torchrun --nproc-per-node 2 context_parallel.py FOLDER

Every process saves latents of plain pipelines, of plans on the whole transformers, and of the same
plans on the split ones, also where a plan is made of the split transformer itself.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ContextParallelConfig
from diffusers.models import attention_dispatch
from safetensors.torch import save_file
from support.artifacts import quick_exports
from support.pipelines.tiny import CASES, PipelineCase
from torch import Tensor, distributed, nn

from calicache.graph_passes import Plan, optimize, record
from calicache.graph_passes.common.errors import CalicacheError
from calicache.graph_passes.common.shards import groups_of
from calicache.graph_passes.rewriting.workspace import Workspace

PLANS: dict[str, dict[str, Any]] = {
    "forecast": {"schedule": "RRFRRF"},
    "all modes": {"schedule": "RRCUCF", "rank": 4},
}


def latents(case: PipelineCase, model: nn.Module) -> Tensor:
    """What the pipeline makes with a transformer."""
    pipe = case.build()
    pipe.transformer = model
    with torch.no_grad():
        return case.latents(pipe, "a photo of a cat")


def planner(case: PipelineCase, model: nn.Module, workspace: Workspace) -> Callable[..., Plan]:
    """Makes plans of one recorded run of the pipeline."""
    with record(model) as recording:
        recording.finish(latents(case, model))
    return partial(Plan.from_trajectory, model, recording, order=1, workspace=workspace)


def attention_with_sums(
    _: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
) -> Any:
    """Attention (B, N, H, D) that also tells the logarithms of its sums, which a ring needs.

    Diffusers has such for GPUs alone.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    with_sums = options.get("return_lse") or True in rest
    return (out, scores.logsumexp(-1).transpose(1, 2)) if with_sums else out


def split(model: nn.Module, way: str, **options: bool) -> nn.Module:
    """A copy that splits its tokens over two processes."""
    parts = copy.deepcopy(model)
    if way == "ring":
        attention_dispatch._native_attention_forward_op = attention_with_sums
    parts.enable_parallelism(config=ContextParallelConfig(**{f"{way}_degree": 2}, **options))
    return parts


def said(attempt: Callable[[], object]) -> list[str]:
    """What is said to an attempt, by calicache or by diffusers' own assertion."""
    try:
        attempt()
    except CalicacheError as error:
        return [type(error).__name__, error.where, error.expected, error.got]
    except AssertionError as error:
        return [type(error).__name__, str(error)]
    return []


def uneven(case: PipelineCase, model: nn.Module, plans: dict[str, Plan]) -> dict[str, list[str]]:
    """What is said where two processes do not have equally many tokens: 27 in place of 48."""
    odd = replace(case, options={**case.options, "height": 48, "width": 48})
    parts = split(model, "ring")
    own = planner(odd, model, Workspace())(**PLANS["all modes"], correct=False)
    return {
        "plain": said(lambda: latents(odd, parts)),
        "forecast": said(lambda: latents(odd, optimize(parts, plans["forecast"]))),
        "at a call": said(lambda: latents(odd, optimize(parts, plans["all modes"]))),
        "planned so": said(lambda: optimize(parts, own)),
    }


def any_tokens(
    case: PipelineCase, model: nn.Module, plans: dict[str, Plan], way: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Forecasts on a model that may have any number of tokens, and what a graph of it is told."""
    parts = split(model, way, **{f"{way}_anything": True})
    own = planner(case, parts, Workspace())(**PLANS["forecast"], correct=False)
    results = {
        f"wan forecast {way} anything": latents(case, optimize(parts, plans["forecast"])),
        f"wan forecast {way} anything planned": latents(case, optimize(parts, own)),
    }
    return results, said(lambda: optimize(parts, plans["all modes"]))


def main() -> None:
    """Command line."""
    distributed.init_process_group("gloo")
    torch.accelerator.device_count = lambda: 1  # the CPU, of which diffusers counts none
    results: dict[str, Tensor] = {}
    refused: dict[str, list[str]] = {}
    for name, ways in (("flux", ("ulysses", "ring")), ("wan", ("ulysses", "ring"))):
        case = next(case for case in CASES if case.name == name)
        model, workspace = copy.deepcopy(case.build().transformer), Workspace()
        results[f"{name} plain"] = latents(case, model)
        make = partial(planner(case, model, workspace), correct=name == "flux")
        plans = {kind: make(**settings) for kind, settings in PLANS.items()}
        for kind, plan in plans.items():
            results[f"{name} {kind}"] = latents(case, optimize(model, plan))
        for way in ways:
            parts = split(model, way)
            results[f"{name} plain {way}"] = latents(case, parts)
            for kind, plan in plans.items():
                fast = optimize(parts, plan)
                results[f"{name} {kind} {way}"] = latents(case, fast)
            assert groups_of(fast.compiled.captured.graph)
            if (name, way) == ("flux", "ulysses"):
                make = planner(case, parts, workspace)
                for kind, settings in PLANS.items():
                    own = optimize(parts, make(**settings))
                    results[f"{name} {kind} {way} planned"] = latents(case, own)
                make = partial(make, schedule="RRCRRC", rank=4, weighting="activation")
                refused["by channels"] = said(make)
        if name == "wan":
            refused |= uneven(case, model, plans)
            for way in ways:
                forecasts, refused[f"{way} anything"] = any_tokens(case, model, plans, way)
                results |= forecasts
    rank, folder = distributed.get_rank(), Path(sys.argv[1])
    save_file(results, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(refused))
    distributed.destroy_process_group()


if __name__ == "__main__":
    with quick_exports():
        main()
