"""Values made from weights alone: folded, what is left alone, numbers, ONNX Runtime."""

from __future__ import annotations

import pytest
import torch
from support.toys import run_onnx, targets, trace, written
from torch import Tensor, nn

from calicache.export.lowerings.constants import LARGEST, fold_constants

aten = torch.ops.aten
WIDTH = 8


class Positions(nn.Module):
    """A table of positions made anew at every call, as many models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        table = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), self.scale)
        return x + torch.cat([table.sin(), table.cos()], -1)


class Weighted(nn.Module):
    """A function of an input and one weight."""

    def __init__(self, function, *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


@pytest.mark.slow
def test_a_table_of_weights_and_numbers_is_one_weight() -> None:
    model, x = Positions(), torch.randn(2, 5, 2 * WIDTH)
    module = trace(model, x)
    before = written(module)
    folded = fold_constants(module)
    assert written(module) == before
    assert targets(folded) == [aten.add.Tensor]
    (table,) = [node for node in folded.graph.nodes if node.op == "get_attr"]
    assert table.target == "folded.cat"
    assert table.meta["val"].shape == (5, 2 * WIDTH)
    assert not dict(folded.named_parameters())  # what it was made from is gone
    # The same operations on the same numbers, only earlier.
    assert torch.equal(folded(x)[0], model(x))
    # float32: ONNX Runtime adds as torch does.
    assert torch.equal(run_onnx(module, x)[0], model(x).detach())


def test_folding_twice_changes_nothing_more() -> None:
    once = fold_constants(trace(Positions(), torch.randn(2, 5, 2 * WIDTH)))
    again = fold_constants(once)
    assert written(again) == written(once)
    assert {n: t.data_ptr() for n, t in again.named_buffers()} == {
        n: t.data_ptr() for n, t in once.named_buffers()
    }


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda x, w: x + w.t(), [aten.permute.default, aten.transpose.int, aten.t.default]),
        (lambda x, w: x + w.transpose(0, 1), [aten.transpose.int]),
        (lambda x, w: x + w[1], [aten.select.int]),
        (lambda x, w: x + w.unsqueeze(0), [aten.unsqueeze.default]),
        (lambda x, w: x + w.reshape(1, WIDTH, WIDTH), [aten.reshape.default, aten.view.default]),
        (lambda x, w: x + w.split(4)[1][:1], [aten.split.Tensor]),
    ],
    ids=["t", "transpose", "select", "unsqueeze", "reshape", "split"],
)
def test_views_of_a_weight_store_no_second_copy(function, kept) -> None:
    model, x = Weighted(function, WIDTH, WIDTH), torch.randn(WIDTH, WIDTH)
    module = trace(model, x)
    folded = fold_constants(module)
    assert targets(folded) == targets(module)
    assert any(target in kept for target in targets(folded))
    assert folded.weight.data_ptr() == model.weight.data_ptr()
    assert torch.equal(folded(x)[0], model(x))


def test_what_is_made_from_a_view_is_folded() -> None:
    model, x = Weighted(lambda x, w: x + w[1].exp(), WIDTH, WIDTH), torch.randn(WIDTH)
    folded = fold_constants(trace(model, x))
    assert targets(folded) == [aten.add.Tensor]
    assert torch.equal(folded(x)[0], model(x))


@pytest.mark.parametrize("more", [0, 1])
def test_large_values_are_left_where_they_are(more: int) -> None:
    model = Weighted(lambda x, w: x + w.exp().narrow(0, 0, 1).neg(), LARGEST + more)
    x = torch.randn(1)
    folded = fold_constants(trace(model, x))
    # A small value made from a large one is folded all the same.
    assert targets(folded) == [aten.add.Tensor]
    whole = Weighted(lambda x, w: x + w.exp(), LARGEST + more)
    left = fold_constants(trace(whole, x))
    assert targets(left) == [*[aten.exp.default] * more, aten.add.Tensor]
    assert torch.equal(left(x)[0], whole(x))


def test_random_values_are_drawn_at_every_call() -> None:
    def draws(x: Tensor, weight: Tensor) -> Tensor:
        return x + (torch.rand(WIDTH) + weight) + torch.randn_like(weight).exp()

    module = trace(Weighted(draws, WIDTH), torch.zeros(WIDTH))
    folded = fold_constants(module)
    assert targets(folded) == targets(module)
    assert not torch.equal(folded(torch.zeros(WIDTH))[0], folded(torch.zeros(WIDTH))[0])


def test_what_depends_on_an_input_is_left_alone() -> None:
    def model(x: Tensor) -> Tensor:
        return (x * 2 + torch.zeros_like(x)).sin()

    x = torch.randn(3)
    module = trace(model, x)
    folded = fold_constants(module)
    assert [t for t in targets(folded) if t is not aten.zeros.default] == [
        t for t in targets(module) if t is not aten.zeros.default
    ]
    assert torch.equal(folded(x)[0], model(x))


@pytest.mark.slow
def test_parts_of_a_decomposition_are_weights() -> None:
    def orthogonal(x: Tensor, weight: Tensor) -> Tensor:
        q, r = torch.linalg.qr(weight)
        return x @ (q * r.diagonal().sign())

    model, x = Weighted(orthogonal, WIDTH, WIDTH), torch.randn(3, WIDTH)
    module = trace(model, x)
    folded = fold_constants(module)
    assert targets(folded) == [aten.matmul.default]
    assert torch.equal(folded(x)[0], model(x))
    # ONNX has no such operation; float32, sums of 8 products in another order.
    torch.testing.assert_close(run_onnx(module, x)[0], model(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_operation_that_runs_a_graph_keeps_it() -> None:
    def model(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            table = torch.arange(WIDTH, dtype=torch.float32).sin()
            return x * table

    x = torch.randn(2, WIDTH)
    module = trace(model, x)
    folded = fold_constants(module)
    assert torch.equal(folded(x)[0], model(x))
    torch.testing.assert_close(run_onnx(module, x)[0], model(x), rtol=1e-6, atol=1e-6)
