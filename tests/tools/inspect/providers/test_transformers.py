"""Transformers of diffusers in float16: nothing but a loop's own scalars is left to the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from zoo.drive import find_leaf, make_model, run_sampler
from zoo.report import ENTRIES

from calicache.export import export_onnx
from calicache.graph_passes import OptimizedModel, Plan, optimize, record
from calicache.tools.inspect.providers.placement import PlacedNode, find_copies, place_nodes
from calicache.tools.inspect.providers.tables import kernel_table

pytestmark = pytest.mark.slow

CUDA = "CUDAExecutionProvider"
MODELS = (
    "DiTTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "WanTransformer3DModel",
)


@pytest.mark.parametrize("name", MODELS)
def test_every_layout_stays_on_the_device(name: str, tmp_path: Path) -> None:
    fast, latent = in_half(name)
    for layout in ("pair", "step", "sampler"):
        folder = tmp_path / layout
        export_onnx(fast, folder, layout=layout, attention="standard", check=False)
        for file in folder.glob("*.onnx"):
            placed = place_nodes(ir.load(file).graph, CUDA)
            large = [entry for entry in placed if elements(entry) >= latent]
            assert any("float16" in entry.types for entry in large)
            lacking = {(of.operator, of.types) for of in large if of.on_host or not has_half(of)}
            assert not lacking, file
            copied = {copy.elements for copy in find_copies(file.name, placed, CUDA)}
            on_host = {elements(entry) for entry in placed if entry.on_host}
            # A loop's counts and conditions; without a loop, nothing.
            assert copied | on_host <= ({1} if layout != "pair" else set()), file


def in_half(name: str) -> tuple[OptimizedModel, int]:
    """A tiny model in float16 under a plan of all modes, and the numbers in its latent."""
    entry = ENTRIES[name]
    model = make_model(entry).half()

    def predict(**arguments: Any) -> Any:
        result = model(**pytree.tree_map(lambda of: changed(of, torch.float16), arguments))
        return pytree.tree_map(lambda of: changed(of, torch.float32), result)

    with record(model) as recording:
        # The sampler itself is in float32, which its update can be told from.
        run = run_sampler(predict, entry, 2, linear=True)
        recording.finish(run.latents)
    plan = Plan.from_trajectory(model, recording, schedule="RCUFR", rank=2)
    latent = find_leaf(dict(entry.inputs(2)), entry.latent)
    return optimize(model, plan), latent.numel()


def changed(value: Any, dtype: torch.dtype) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floats else value


def has_half(entry: PlacedNode) -> bool:
    """Whether what the node does could be done in float16 as well."""
    half = ["float16" if kind == "float" else kind for kind in entry.types]
    return entry.node.op_type == "Constant" or kernel_table(CUDA).takes(entry.operator, half)


def elements(entry: PlacedNode) -> int:
    """Of the largest output."""
    shapes = [output.shape for output in entry.node.outputs]
    return max(torch.Size(shape.numpy()).numel() for shape in shapes if shape is not None)
