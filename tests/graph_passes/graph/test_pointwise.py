"""Convolutions of kernel 1 become linear layers, exactly; all others stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import shake
from torch import Tensor, fx, nn
from torch.nn import functional as F

from calicache.graph_passes import Plan, StepMode, optimize, record
from calicache.graph_passes.graph.capture import CapturedGraph, capture
from calicache.graph_passes.graph.checks import verify_captured
from calicache.graph_passes.graph.operations import LINEAR
from calicache.graph_passes.graph.pointwise import CONVOLUTIONS, pointwise_to_linear
from calicache.graph_passes.graph.surgery import module_path, shape_of
from calicache.graph_passes.recording.signature import flatten_call

aten = torch.ops.aten
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
IN, OUT = 6, 10
PLACES = (5, 4, 3)

# float32: sums of 6 or 20 products in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Around(nn.Module):
    """One layer between two operations that are no layers."""

    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mix(torch.sin(x)))


def captured_from(model: nn.Module, x: Tensor) -> CapturedGraph:
    return capture(model.eval(), flatten_call(model, (x,), {}).signature())


def latent(dims: int, channels: int = IN) -> Tensor:
    return torch.randn(2, channels, *PLACES[:dims])


def ops(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def convolutions(graph: fx.Graph) -> int:
    return sum(target in CONVOLUTIONS for target in ops(graph))


# --- what is written anew -----------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_kernel_1_is_a_linear_layer_over_channels(dims: int, bias: bool) -> None:
    model, x = Around(CONV[dims](IN, OUT, 1, bias=bias)), latent(dims)
    captured = pointwise_to_linear(captured_from(model, x))
    verify_captured(captured)
    permute = aten.permute.default
    assert ops(captured.graph) == [
        aten.sin.default,
        permute,
        LINEAR,
        permute,
        aten.tanh.default,
    ]
    last, product, back = list(captured.graph.nodes)[-5:-2]
    places = list(range(1, dims + 1))
    assert last.args[1] == [0, *(d + 1 for d in places), 1]
    assert back.args[1] == [0, dims + 1, *places]
    assert [str(node.target) for node in product.args[1:]] == ["mix.weight", "mix.bias"][: 1 + bias]
    assert shape_of(last) == (2, *PLACES[:dims], IN)
    assert shape_of(product) == (2, *PLACES[:dims], OUT)
    assert shape_of(back) == (2, OUT, *PLACES[:dims])
    torch.testing.assert_close(captured.module(x)[0], model(x), **CLOSE)


def test_the_layer_keeps_its_name_and_its_memory() -> None:
    model = Around(nn.Conv2d(IN, OUT, 1))
    captured = pointwise_to_linear(captured_from(model, latent(2)))
    (linear,) = [node for node in captured.graph.nodes if node.target is LINEAR]
    assert module_path(linear) == "mix"
    weight = captured.attribute("mix.weight")
    assert tuple(weight.shape) == (OUT, IN)
    assert weight.data_ptr() == model.mix.weight.data_ptr()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_values_keep_their_dtype(dtype: torch.dtype) -> None:
    model, x = Around(nn.Conv2d(IN, OUT, 1)).to(dtype), latent(2).to(dtype)
    captured = pointwise_to_linear(captured_from(model, x))
    assert {node.meta["val"].dtype for node in captured.graph.nodes if node.op != "output"} == {
        dtype
    }
    assert captured.module(x)[0].dtype == dtype


def test_one_layer_called_twice_is_written_twice() -> None:
    class Twice(Around):
        def forward(self, x: Tensor) -> Tensor:
            return self.mix(torch.tanh(self.mix(x)))

    model, x = Twice(nn.Conv1d(IN, IN, 1)), latent(1)
    captured = pointwise_to_linear(captured_from(model, x))
    assert ops(captured.graph).count(LINEAR) == 2
    assert convolutions(captured.graph) == 0
    torch.testing.assert_close(captured.module(x)[0], model(x), **CLOSE)


def test_only_the_kernels_of_size_1_change() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.mix = nn.Conv2d(IN, IN, 3, padding=1), nn.Conv2d(IN, OUT, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(self.wide(x))

    model, x = Both(), latent(2)
    captured = pointwise_to_linear(captured_from(model, x))
    kept = [module_path(n) for n in captured.graph.nodes if n.target in CONVOLUTIONS]
    assert kept == ["wide"]
    assert tuple(captured.attribute("wide.weight").shape) == (IN, IN, 3, 3)
    torch.testing.assert_close(captured.module(x)[0], model(x), **CLOSE)


def test_a_captured_graph_on_meta_is_written_too() -> None:
    model = Around(nn.Conv2d(IN, OUT, 1)).to("meta")
    captured = pointwise_to_linear(captured_from(model, latent(2).to("meta")))
    assert convolutions(captured.graph) == 0
    assert captured.attribute("mix.weight").is_meta


def test_the_graph_it_was_made_from_is_not_changed() -> None:
    model, x = Around(nn.Conv2d(IN, OUT, 1)), latent(2)
    source = captured_from(model, x)
    code, weight = str(source.graph), source.attribute("mix.weight")
    shapes = {n.name: shape_of(n) for n in source.graph.nodes if n.op != "output"}
    changed = pointwise_to_linear(source)
    assert changed is not source
    assert str(source.graph) == code
    assert source.attribute("mix.weight") is weight
    assert {n.name: shape_of(n) for n in source.graph.nodes if n.op != "output"} == shapes
    assert tuple(model.mix.weight.shape) == (OUT, IN, 1, 1)
    # The same kernel on the same numbers.
    assert torch.equal(source.module(x)[0], model(x))


def test_a_second_time_it_finds_nothing_to_do() -> None:
    once = pointwise_to_linear(captured_from(Around(nn.Conv2d(IN, OUT, 1)), latent(2)))
    assert pointwise_to_linear(once) is once


# --- what is left alone -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(IN, OUT, 3),
        nn.Conv2d(IN, OUT, (1, 3)),
        nn.Conv2d(IN, OUT, 1, stride=2),
        nn.Conv2d(IN, OUT, 1, stride=(1, 2)),
        nn.Conv2d(IN, OUT, 1, padding=1),
        nn.Conv2d(IN, OUT, 1, padding="same"),
        nn.Conv2d(IN, 2 * IN, 1, groups=2),
        nn.Conv2d(IN, IN, 1, groups=IN),
        nn.ConvTranspose2d(IN, OUT, 1),
        nn.Linear(PLACES[1], OUT),
    ],
    ids=str,
)
def test_other_layers_are_left_alone(layer: nn.Module) -> None:
    captured = captured_from(Around(layer), latent(2))
    assert pointwise_to_linear(captured) is captured


class SharedWeight(Around):
    """A convolution whose weight is also scaled and added up."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x) + self.mix.weight.sum()


class SharedKernel(Around):
    """One weight, once at stride 1 and once at stride 2."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x).mean() + F.conv2d(x, self.mix.weight, stride=2)


class TiedBias(nn.Module):
    """A weight of one layer that is the bias of another."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(IN, IN, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.mix.weight, self.mix.weight[:, 0, 0])


class ComputedWeight(Around):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.mix.weight * 2, self.mix.bias)


@pytest.mark.parametrize(
    ("model", "dims"),
    [
        (SharedWeight(nn.Conv2d(IN, OUT, 1)), 2),
        (SharedKernel(nn.Conv2d(IN, OUT, 1)), 2),
        (TiedBias(), 1),
        (ComputedWeight(nn.Conv2d(IN, OUT, 1)), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_weight_that_something_else_reads_is_left_alone(model: nn.Module, dims: int) -> None:
    captured = captured_from(model, latent(dims))
    assert pointwise_to_linear(captured) is captured


@pytest.mark.slow
@pytest.mark.parametrize("length", [5, IN])
def test_a_convolution_without_a_batch_stays_right(length: int) -> None:
    model, x = Around(nn.Conv1d(IN, OUT, 1)), torch.randn(IN, length)
    captured = pointwise_to_linear(captured_from(model, x))
    torch.testing.assert_close(captured.module(x)[0], model(x), **CLOSE)


# --- the whole compiler -------------------------------------------------------------------------


class ConvMLP(nn.Module):
    """Sana's kind: an MLP of two 1x1 convolutions with a depthwise one between them."""

    def __init__(self, *, bias: bool = True, depthwise: bool = True) -> None:
        super().__init__()
        self.up = nn.Conv2d(IN, 2 * IN, 1, bias=bias)
        self.down = nn.Conv2d(2 * IN, IN, 1, bias=bias)
        self.middle = (
            nn.Conv2d(2 * IN, 2 * IN, 3, padding=1, groups=2 * IN) if depthwise else nn.Identity()
        )

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x * (1 + timestep[:, None, None, None])
        return torch.tanh(x + self.down(F.silu(self.middle(self.up(x)))))


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"bias": False, "depthwise": False}], ids=str
)
def test_a_conv_mlp_is_calibrated_and_exact_at_full_rank(options: dict[str, bool]) -> None:
    model = shake(ConvMLP(**options))
    inputs = [latent(2) for _ in range(4)]
    times = [torch.full((2,), t) for t in (0.9, 0.6, 0.3, 0.1)]
    with record(model) as recording, torch.no_grad():
        for x, now in zip(inputs, times, strict=True):
            model(x, now)
    plan = Plan.from_trajectory(model, recording, rank=IN, order=0, correct=False)
    fast = optimize(model, plan)
    assert StepMode.CALIBRATE in plan.schedule
    sites = [
        (s.name, s.in_features, s.out_features, s.tokens)
        for s in fast.compiled.analysis.sites.linears
    ]
    tokens = 2 * PLACES[0] * PLACES[1]
    assert sites == [("up", IN, 2 * IN, tokens), ("down", 2 * IN, IN, tokens)]
    for x, now in zip(inputs, times, strict=True):
        # float32: two layers as products of two factors.
        torch.testing.assert_close(fast(x, now), model(x, now), rtol=1e-4, atol=1e-5)
