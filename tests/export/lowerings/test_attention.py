"""Attention handed to the fused operator: fires, structure, what is left alone, numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from calicache.export.lowerings.attention import fuse_attention
from calicache.export.translation.translate import translate
from calicache.graph_passes.graph.operations import ATTENTION

aten = torch.ops.aten
BATCH, HEADS, TOKENS, WIDTH = 2, 4, 5, 8


class Attend(nn.Module):
    """Heads split off (B, N, H d), attention, heads joined again, as every DiT does it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=mask, **self.options)
        return mixed.transpose(1, 2).flatten(2)


def draw(tokens: int = TOKENS, keys: int = TOKENS, values: int = WIDTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, WIDTH), (keys, WIDTH), (keys, values))
    return [torch.randn(BATCH, n, HEADS * d, generator=generator) for n, d in shapes]


def trace(model: nn.Module, inputs: list[Tensor]) -> fx.GraphModule:
    program = torch.export.export(model.eval(), tuple(inputs), strict=False)
    module = program.run_decompositions({}).module(check_guards=False)
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if node.op == "output":
            node.args = ((node.args[0][0] if isinstance(node.args[0], tuple) else node.args[0],),)
    return fx.GraphModule(module, graph)


def fused_nodes(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target is torch.onnx.ops.symbolic]


def targets(module: fx.GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def run(module: fx.GraphModule, inputs: list[Tensor]) -> np.ndarray:
    model = translate({"attention": module})["attention"]
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    names = [value.name for value in session.get_inputs()]
    feed = dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True))
    return session.run(None, feed)[0]


def test_attention_becomes_the_operator_over_heads_side_by_side() -> None:
    module = trace(Attend(scale=0.3), draw())
    fused = fuse_attention(module)
    assert ATTENTION not in targets(fused)
    (node,) = fused_nodes(fused)
    assert node.args[0] == "com.microsoft::MultiHeadAttention"
    assert node.args[2] == {"num_heads": HEADS, "unidirectional": False, "scale": 0.3}
    assert [source.target for source in node.args[1]] == [aten.reshape.default] * 3
    assert [tuple(s.meta["val"].shape) for s in node.args[1]] == [(BATCH, TOKENS, 32)] * 3
    assert node.kwargs["shape"] == (BATCH, TOKENS, HEADS * WIDTH)
    (back,) = node.users
    assert back.target is aten.reshape.default
    assert back.args[1] == [BATCH, TOKENS, HEADS, WIDTH]
    fused.graph.lint()


def test_graph_that_is_given_stays_as_it_was() -> None:
    module = trace(Attend(), draw())
    before = str(module.graph)
    fuse_attention(module)
    assert str(module.graph) == before


def test_fusing_twice_changes_nothing_more() -> None:
    once = fuse_attention(trace(Attend(), draw()))
    assert str(fuse_attention(once).graph) == str(once.graph)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, {}),
        ({"scale": 0.3}, {}),
        ({"is_causal": True}, {}),
        ({}, {"keys": 7}),
        ({}, {"values": 6}),
    ],
    ids=["plain", "scale", "causal", "cross", "narrow values"],
)
def test_operator_agrees_with_torch(options: dict[str, Any], sizes: dict[str, int]) -> None:
    inputs = draw(**sizes)
    model = Attend(**options)
    module = trace(model, inputs)
    assert fused_nodes(fuse_attention(module))
    # float32, another order of sums over 8 channels and 5 keys.
    np.testing.assert_allclose(run(module, inputs), model(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["boolean", "number"])
@pytest.mark.parametrize("shape", [(BATCH, 1, TOKENS, 7), (1, HEADS, TOKENS, 7)])
def test_masks_agree_with_torch(kind: str, shape: tuple[int, ...]) -> None:
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if kind == "boolean":
        mask = mask > -0.5
        mask[..., 0] = True  # a row without any key is NaN in every implementation
    inputs = [*draw(keys=7), mask]
    module = trace(Attend(), inputs)
    (node,) = fused_nodes(fuse_attention(module))
    assert node.args[1][3:5] == [None, None] or tuple(node.args[1][3:5]) == (None, None)
    np.testing.assert_allclose(run(module, inputs), Attend()(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sizes", "mask"),
    [
        ({"is_causal": True}, {"keys": 7}, None),
        ({}, {}, (BATCH, 1, 1, TOKENS)),
        ({}, {}, (TOKENS, TOKENS)),
    ],
    ids=["causal across lengths", "mask over keys alone", "mask without batch"],
)
def test_other_forms_are_left_to_torch(
    options: dict[str, Any], sizes: dict[str, int], mask: tuple[int, ...] | None
) -> None:
    inputs = draw(**sizes)
    if mask is not None:
        inputs.append(torch.zeros(mask))
    module = trace(Attend(**options), inputs)
    fused = fuse_attention(module)
    assert not fused_nodes(fused)
    assert ATTENTION in targets(fused)
    expected = Attend(**options)(*inputs)
    np.testing.assert_allclose(run(module, inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_grouped_queries_are_left_to_torch() -> None:
    class Grouped(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    inputs = [torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)]
    module = trace(Grouped(), inputs)
    assert not fused_nodes(fuse_attention(module))
    np.testing.assert_allclose(run(module, inputs), Grouped()(*inputs), rtol=1e-5, atol=1e-6)


def test_transposes_are_gone_from_the_exported_graph() -> None:
    model = translate({"attention": trace(Attend(), draw())})["attention"]
    assert [node.op_type for node in model.graph if node.op_type == "Transpose"] == []
    assert sum(node.op_type == "MultiHeadAttention" for node in model.graph) == 1
