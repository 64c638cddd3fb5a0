"""Multiply-accumulates of operations and of whole graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from calicache.graph_passes.graph.capture import capture
from calicache.graph_passes.graph.macs import graph_macs
from calicache.graph_passes.recording.recorder import Recorder


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b)


def attention(a: Tensor, b: Tensor, **options: object) -> Tensor:
    return F.scaled_dot_product_attention(a, b, b, **options)


QUERY, KEY, IMAGE, KERNEL = (2, 3, 5, 4), (2, 3, 6, 4), (2, 4, 9, 9), (6, 4, 3, 3)
BOTH = 2 * (2 * 3) * 5 * 6 * 4  # scores and mix of QUERY and KEY
# name: function, shape of a, shape of b, multiply-accumulates by hand.
PRODUCTS = {
    "linear": (F.linear, (2, 5, 4), (7, 4), 2 * 5 * 4 * 7),
    "matmul": (torch.matmul, (2, 3, 5, 4), (2, 3, 4, 6), 6 * 5 * 4 * 6),
    "matmul broadcast": (torch.matmul, (2, 3, 5, 4), (4, 6), 6 * 5 * 4 * 6),
    "mm": (torch.mm, (5, 4), (4, 6), 5 * 4 * 6),
    "bmm": (torch.bmm, (3, 5, 4), (3, 4, 6), 3 * 5 * 4 * 6),
    "addmm": (lambda a, b: torch.addmm(b[0], a, b), (5, 4), (4, 6), 5 * 4 * 6),
    "baddbmm": (lambda a, b: torch.baddbmm(b[:, :1], a, b), (3, 5, 4), (3, 4, 6), 3 * 5 * 4 * 6),
    "einsum": (lambda a, b: torch.einsum("bhqd,bhkd->bhqk", a, b), QUERY, KEY, BOTH // 2),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 1), (5, 4), (4, 6), 5 * 4 * 6),
    "attention": (attention, QUERY, KEY, BOTH),
    "masked": (lambda a, b: attention(a, b, attn_mask=a[..., :1] > 0), QUERY, KEY, BOTH),
    "grouped": (lambda a, b: attention(a, b, enable_gqa=True), QUERY, (2, 1, 6, 4), BOTH),
    "attention without heads": (attention, (6, 5, 4), (6, 6, 4), BOTH),
    "attention to one text": (attention, QUERY, (1, 3, 6, 4), BOTH),
    "conv1d": (F.conv1d, (2, 4, 9), (6, 4, 3), 2 * 7 * 6 * 4 * 3),
    "conv2d": (lambda a, b: F.conv2d(a, b, stride=2), IMAGE, KERNEL, 2 * 16 * 6 * 4 * 9),
    "same": (lambda a, b: F.conv2d(a, b, padding="same"), IMAGE, KERNEL, 2 * 81 * 6 * 4 * 9),
    "groups": (lambda a, b: F.conv2d(a, b, groups=2), IMAGE, (6, 2, 3, 3), 2 * 49 * 6 * 2 * 9),
    "conv3d": (F.conv3d, (2, 4, 5, 5, 5), (6, 4, 3, 3, 3), 2 * 27 * 6 * 4 * 27),
    "transposed": (
        lambda a, b: F.conv_transpose2d(a, b, stride=2),
        IMAGE,
        (4, 6, 3, 3),
        2 * 81 * 4 * 6 * 9,
    ),
    "permutation": (lambda a, b: torch.einsum("abcd->dacb", a) + b, QUERY, (1,), 0),
    "element-wise": (lambda a, b: F.gelu(a * b).softmax(-1), QUERY, (4,), 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRODUCTS)
def test_macs_of_one_operation(name: str) -> None:
    function, a, b, macs = PRODUCTS[name]
    model = Apply(function).eval()
    recording = Recorder()
    recording.append(model, (torch.randn(a), torch.randn(b)), {})
    assert graph_macs(capture(model, recording.signature).graph) == macs


@pytest.mark.parametrize("which", ["dit", "diffusers"])
def test_macs_of_a_model_are_half_of_what_pytorch_counts(
    which: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue("dit" if which == "dit" else "diffusers_dit")
    signature = request.getfixturevalue(f"{which}_recording").signature
    # On the meta device: attention on the CPU is not counted by PyTorch.
    inputs = [
        torch.empty(spec.shape, dtype=spec.torch_dtype, device="meta") for spec in signature.tensors
    ]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).to("meta")(**signature.unflatten(inputs))
    assert graph_macs(capture(model, signature).graph) == counter.get_total_flops() / 2
