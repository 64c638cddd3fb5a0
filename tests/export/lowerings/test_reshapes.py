"""Views as reshapes: all of them, for other strides too, what is left alone, ONNX Runtime."""

from __future__ import annotations

import pytest
import torch
from support.toys import run_onnx, targets, trace, written
from torch import Tensor

from calicache.export.lowerings.reshapes import views_to_reshapes

aten = torch.ops.aten
SHAPE = (2, 3, 4)
VIEWS = (aten.view.default, aten._unsafe_view.default)


def viewed(x: Tensor) -> Tensor:
    flat = aten._unsafe_view((x + 1).view(6, -1), [24])
    return flat.view(4, 6).unflatten(0, (2, 2)) * 2


@pytest.mark.slow
def test_every_view_is_a_reshape_to_the_same_sizes() -> None:
    x = torch.randn(SHAPE)
    module = trace(viewed, x)
    assert set(VIEWS) <= set(targets(module))
    before = written(module)
    lowered = views_to_reshapes(module)
    assert written(module) == before
    expected = [aten.reshape.default if t in VIEWS else t for t in targets(module)]
    assert targets(lowered) == expected
    assert not set(VIEWS) & set(targets(lowered))
    for old, new in zip(module.graph.nodes, lowered.graph.nodes, strict=True):
        assert (old.op, old.args[1:], old.kwargs) == (new.op, new.args[1:], new.kwargs)
        assert old.meta.get("val") is new.meta.get("val")
    # Sizes change and no values do.
    assert torch.equal(lowered(x)[0], viewed(x))
    assert torch.equal(run_onnx(module, x)[0], viewed(x))


def test_a_second_time_it_finds_nothing_to_do() -> None:
    once = views_to_reshapes(trace(viewed, torch.randn(SHAPE)))
    assert written(views_to_reshapes(once)) == written(once)


def test_values_may_have_other_strides() -> None:
    module = trace(lambda x: x.view(6, 4) * 1, torch.randn(SHAPE))
    turned = torch.randn(SHAPE[::-1]).permute(2, 1, 0)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        module(turned)
    assert torch.equal(views_to_reshapes(module)(turned)[0], turned.reshape(6, 4))


def test_weights_keep_their_memory() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(24))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.view(SHAPE)

    model, x = Model(), torch.randn(SHAPE)
    lowered = views_to_reshapes(trace(model, x))
    assert lowered.weight.data_ptr() == model.weight.data_ptr()
    assert torch.equal(lowered(x)[0], model(x))


@pytest.mark.parametrize(
    "model",
    [
        lambda x: x.transpose(0, 1).reshape(-1),
        lambda x: x.flatten(1).unsqueeze(0),
        lambda x: x.permute(2, 0, 1).expand(2, -1, -1, -1) + 1,
        lambda x: x.view(torch.int32) + 1,
    ],
    ids=["reshape", "unsqueeze", "permute", "view of a dtype"],
)
def test_other_operations_are_left_alone(model) -> None:
    module = trace(model, torch.randn(SHAPE))
    kept = [t for t in targets(module) if t not in VIEWS]
    assert [t for t in targets(views_to_reshapes(module)) if t is not aten.reshape.default] == [
        t for t in kept if t is not aten.reshape.default
    ]
