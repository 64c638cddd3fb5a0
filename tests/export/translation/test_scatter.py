"""Scattered sums in half precision: what is widened, what is left alone, all numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.toys import op_types, run_onnx, trace
from torch import Tensor

from calicache.export.translation.translate import translate

pytestmark = pytest.mark.slow

PLACES, ORDER = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([3, 2, 1, 0, 4])


def along(x: Tensor, places: Tensor = PLACES) -> Tensor:
    return places[None, :, None].expand(x.shape)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(1, along(x), x),
    "product": lambda x: torch.ones_like(x).scatter_reduce(1, along(x), x, "prod"),
    "index_add": lambda x: torch.zeros_like(x).index_add(1, PLACES, x),
    "index_put": lambda x: torch.ones_like(x).index_put(
        (torch.arange(2)[:, None], PLACES), x, accumulate=True
    ),
    "largest": lambda x: torch.zeros_like(x).scatter_reduce(1, along(x), x, "amax"),
    "plain": lambda x: torch.zeros_like(x).scatter(1, along(x, ORDER), x),
}
SUMS = ("scatter_add", "product", "index_add", "index_put")


def draw(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_half_precision_run_and_agree_with_torch(name: str) -> None:
    x = draw(torch.float16)
    module = trace(FUNCTIONS[name], x)
    (got,) = run_onnx(module, x)
    assert got.dtype == torch.float16
    # Two terms in float16, rounded at 5e-4 of the result once or twice.
    torch.testing.assert_close(got, FUNCTIONS[name](x), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", SUMS)
def test_only_the_sum_is_in_float32(name: str) -> None:
    half, full = (
        list(op_types(translate({"toy": trace(FUNCTIONS[name], draw(dtype))})["toy"]))
        for dtype in (torch.float16, torch.float32)
    )
    place = next(k for k, op in enumerate(half) if op.startswith("Scatter"))
    assert half[place - 2 : place] == ["Cast", "Cast"]
    assert half[place + 1] == "Cast"
    assert [op for op in half if op != "Cast"] == [op for op in full if op != "Cast"]


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - set(SUMS)))
def test_what_the_provider_has_is_left_alone(name: str) -> None:
    x = draw(torch.float16)
    module = trace(FUNCTIONS[name], x)
    types = list(op_types(translate({"toy": module})["toy"]))
    place = next(k for k, op in enumerate(types) if op.startswith("Scatter"))
    assert "Cast" not in types[place - 2 : place + 2]
    (got,) = run_onnx(module, x)
    assert torch.equal(got, FUNCTIONS[name](x))
