"""Translation: right for every kind of result, each form once, errors that name the operation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from support.toys import run_onnx, trace
from torch import Tensor, nn

from calicache.export.translation import translate as translation
from calicache.export.translation.templates import MOST, Templates
from calicache.export.translation.translate import translate
from calicache.graph_passes.common.errors import ExportError

# float32 rounding of two implementations.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Blocks(nn.Module):
    """One block `depth` times over."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.nn.functional.gelu(layer(self.norm(x)))
        return x


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8, bias=False)
        self.two = nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


@pytest.fixture
def templates(monkeypatch: pytest.MonkeyPatch) -> Templates:
    fresh = Templates()
    monkeypatch.setattr(translation, "TEMPLATES", fresh)
    return fresh


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.split(3, dim=1),
        lambda x: x.split(3, dim=1)[1],
        lambda x: x.topk(2, dim=1)[1],
        lambda x: torch.cat([x.chunk(2, dim=1)[1], x], dim=1),
        lambda x: (x, x + 1, x),
        lambda x: x.detach().clone(),
        lambda x: torch.where(x > 0, x, torch.full_like(x, 2.0)),
        lambda x: x[:, None, ::2].expand(4, 3, 3).sum(1, dtype=torch.float64),
        lambda x: torch.zeros(2, 3) + x.mean(),
    ],
)
def test_results_are_those_of_torch(function: Callable[[Tensor], Any]) -> None:
    x = torch.randn(4, 6)
    expected = function(x)
    expected = [expected] if isinstance(expected, Tensor) else list(expected)
    for value, target in zip(run_onnx(trace(function, x), x), expected, strict=True):
        torch.testing.assert_close(value, target, **CLOSE)


@pytest.mark.slow
def test_a_block_is_translated_once_however_many_there_are(templates: Templates) -> None:
    x = torch.randn(2, 3, 8)
    two, nine = (trace(Blocks(depth).eval(), x) for depth in (2, 9))
    translate({"two": two})
    forms = len(templates.held)
    model = translate({"nine": nine})["nine"]
    assert len(templates.held) == forms
    assert sum(node.op_type == "Gemm" for node in model.graph) == 9
    torch.testing.assert_close(run_onnx(nine, x)[0], nine(x)[0], **CLOSE)


@pytest.mark.slow
def test_models_are_valid_and_names_are_unique() -> None:
    model = translate({"blocks": trace(Blocks(3).eval(), torch.randn(2, 3, 8))})["blocks"]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    names = [value.name for node in model.graph for value in node.outputs]
    names += [value.name for value in (*model.graph.inputs, *model.graph.initializers.values())]
    assert len(names) == len(set(names))


def test_a_weight_is_stored_once_and_is_the_models_own() -> None:
    layers = Tied().eval()
    model = translate({"tied": trace(layers, torch.randn(2, 8))})["tied"]
    (weight,) = [v for v in model.graph.initializers.values() if tuple(v.shape) == (8, 8)]
    assert weight.const_value.raw.data_ptr() == layers.one.weight.data_ptr()  # type: ignore[union-attr]


@pytest.mark.slow
def test_an_operation_without_onnx_form_is_named(templates: Templates) -> None:
    module = trace(lambda x: torch.linalg.eigvals(x.sin()).real, torch.randn(3, 3))
    with pytest.raises(ExportError, match="linalg_eigvals") as caught:
        translate({"toy": module})
    assert caught.value.__cause__ is not None
    assert not templates.held


@pytest.mark.slow
def test_templates_are_let_go_before_they_are_too_many(
    templates: Templates, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MOST > 1000  # several large models
    monkeypatch.setattr("calicache.export.translation.templates.MOST", 2)
    x = torch.randn(3)
    for number in range(4):
        translate({"toy": trace(lambda x, n=number: x + n + 0.5, x)})
        assert len(templates.held) <= 2


@pytest.mark.slow
def test_threads_translate_side_by_side(templates: Templates) -> None:
    x = torch.randn(2, 3, 8)
    module = trace(Blocks(2).eval(), x)
    models: list[ir.Model] = []
    threads = [
        threading.Thread(target=lambda: models.append(translate({"toy": module})["toy"]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models) == len(threads)
    assert len({ir.to_proto(model).SerializeToString() for model in models}) == 1
