"""Numbers of float64 operations: as exact in ONNX as they are in torch, and others left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.models import relative
from support.toys import run_onnx, targets, trace, written
from torch import Tensor

from calicache.export.translation.doubles import widen_numbers

pytestmark = pytest.mark.slow

aten = torch.ops.aten
EXACT = 1e-14  # float64 rounds at 1e-16; float32 numbers would be off by 1e-8

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda x: 0.8 * x,
    "sum": lambda x: x + 0.3,
    "difference": lambda x: 0.3 - x,
    "quotient": lambda x: x / 0.3,
    "power": lambda x: (x * x) ** 1.7,
    "share": lambda x: torch.add(x, x.tanh(), alpha=0.3),
    "bounds": lambda x: x.clamp(-0.3, 0.7),
    "one bound": lambda x: x.clamp(min=0.3),
    "mask": lambda x: x.masked_fill(x > 0, 0.3),
    "choice": lambda x: torch.where(x > 0, x, 0.3),
    "mean": lambda x: torch.lerp(x, x * 2, 0.3),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
}


def draw(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_numbers_are_exact_in_onnx() -> None:
    """All at once: an export takes seconds."""
    module = trace(lambda x: tuple(f(x) for f in FUNCTIONS.values()), draw())
    for name, got, f in zip(FUNCTIONS, run_onnx(module, draw()), FUNCTIONS.values(), strict=True):
        assert relative(got, f(draw())) < EXACT, name


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_written_out_as_torch_has_it(approximate: str) -> None:
    """ONNX Runtime's CPU provider has no Erf for float64, so torch runs what was written."""
    module = widen_numbers(trace(lambda x: F.gelu(x, approximate=approximate), draw()))
    assert aten.gelu.default not in targets(module)
    (got,) = module(draw())
    assert relative(got, F.gelu(draw(), approximate=approximate)) < EXACT


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_runs_the_copy_to_the_same_values(name: str) -> None:
    module = trace(FUNCTIONS[name], draw())
    before = written(module)
    (got,) = widen_numbers(module)(draw())
    assert relative(got, FUNCTIONS[name](draw())) < EXACT
    assert written(module) == before


@pytest.mark.parametrize(
    "function",
    [lambda x: 0.5 * x, lambda x: x**2, lambda x: x.clamp(-1.0, 1.0), lambda x: x.softmax(-1)],
    ids=["half", "square", "whole bounds", "none"],
)
def test_numbers_that_float32_holds_are_left_alone(function: Callable[[Tensor], Tensor]) -> None:
    module = trace(function, draw())
    assert targets(widen_numbers(module)) == targets(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_left_alone(dtype: torch.dtype) -> None:
    module = trace(FUNCTIONS["product"], draw(dtype))
    assert widen_numbers(module) is module
