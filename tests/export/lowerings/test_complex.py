"""Complex values as pairs: fires, structure, what is left alone, numbers, ONNX Runtime."""
# ruff: noqa: ARG005 - the functions of one table have one signature

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toys import as_pairs, run_onnx, targets, trace, written
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree as pytree

from calicache.export.lowerings.complex import lower_complex
from calicache.export.lowerings.reshapes import views_to_reshapes

aten = torch.ops.aten
COMPLEX, FLOAT = torch.complex64, torch.float32
SHAPE = (2, 3, 4)
# float32: a sum of two products, each rounded, in torch's order or another.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}

Function = Callable[..., Any]


def draw(dtype: torch.dtype = COMPLEX) -> Tensor:
    return torch.randn(SHAPE, dtype=dtype)


def over_pairs(function: Function) -> Function:
    """From pairs, and maybe what is real, to pairs, as models around their rotary positions."""

    def forward(pairs: Tensor, other: Tensor | None = None) -> tuple[Tensor, ...]:
        arguments = [torch.view_as_complex(pairs), *([] if other is None else [other])]
        return tuple(torch.view_as_real(z) for z in pytree.tree_leaves(function(*arguments)))

    return forward


def lower(module: fx.GraphModule) -> fx.GraphModule:
    """Views are reshapes before complex values are lowered."""
    return lower_complex(views_to_reshapes(module))


def complex_values(module: fx.GraphModule) -> list[Tensor]:
    values = pytree.tree_leaves([node.meta.get("val") for node in module.graph.nodes])
    return [v for v in values if isinstance(v, Tensor) and v.is_complex()]


def check(model: nn.Module | Function, *inputs: Tensor, exact: bool = False) -> fx.GraphModule:
    """Lowers the model, and compares what it gives with torch on the complex values."""
    module = trace(model, *inputs)
    before = written(module)
    lowered = lower(module)
    assert written(module) == before
    assert lowered is not module
    results = lowered(*(as_pairs(value) for value in inputs))
    tolerance = {"rtol": 0, "atol": 0} if exact else CLOSE
    torch.testing.assert_close(list(results), pytree.tree_leaves(model(*inputs)), **tolerance)
    return lowered


# --- reorderings and cuts -----------------------------------------------------------------------

REORDERINGS: dict[str, Function] = {
    "unsqueeze": lambda z: (z.unsqueeze(0), z.unsqueeze(3), z.unsqueeze(-1), z.unsqueeze(-4)),
    "squeeze": lambda z: (z[:1].squeeze(0), z[:, :, :1].squeeze(-1), z[:, :1].squeeze(-2)),
    "transpose": lambda z: (z.transpose(0, 2), z.transpose(-1, -2), z.transpose(1, -1)),
    "permute": lambda z: (z.permute(2, 0, 1), z.permute(-1, -3, -2), z.permute(0, -1, 1)),
    "cat": lambda z: (torch.cat([z, z]), torch.cat([z, z[..., :1]], -1), torch.cat([z, z], 1)),
    "stack": lambda z: (torch.stack([z, z * 2]), torch.stack([z, z * 2], -1)),
    "split": lambda z: (*z.split(3, -1), *z.split([1, 2], 1), *z.split(1)),
    "chunk": lambda z: (*z.chunk(2, -1), *z.chunk(2, 1)),
    "unbind": lambda z: (*z.unbind(-1), *z.unbind(1), *z.unbind()),
    "flatten": lambda z: (z.flatten(), z.flatten(1), z.flatten(0, -2), z.flatten(-2, -1)),
    "unflatten": lambda z: (z.unflatten(-1, (2, 2)), z.unflatten(2, (-1, 2))),
    "reshape": lambda z: (z.reshape(6, 4), z.reshape(-1), z.reshape(2, -1, 2), z.view(3, 8)),
    "expand": lambda z: (z[:1].expand(3, -1, -1), z[:, :, :1].expand(2, 3, 5), z.expand(2, *SHAPE)),
    "repeat": lambda z: (z.repeat(1, 2, 3), z.repeat(2, 1, 1, 1)),
    "slice": lambda z: (z[1:], z[:, ::2], z[..., 1:3], z[..., -2:], z[:, -1:]),
    "select": lambda z: (z[0], z[:, -1], z.select(-1, 2), z.select(-3, 1)),
    "copies": lambda z: (z.transpose(0, 1).clone(), z.contiguous(), z.detach()),
}


def together(functions: dict[str, Function]) -> Function:
    """All of them in one model: one that cannot be lowered would leave all as they are."""
    return lambda *values: {name: function(*values) for name, function in functions.items()}


@pytest.mark.slow
def test_reorderings_and_cuts_do_the_same_to_pairs() -> None:
    # Values are moved, and doubled at most.
    lowered = check(over_pairs(together(REORDERINGS)), as_pairs(draw()), exact=True)
    assert not complex_values(lowered)
    assert lower_complex(lowered) is lowered


STEPS: Sequence[Callable[[Tensor, int, int], Tensor]] = (
    lambda z, i, j: z.transpose(i, j),
    lambda z, i, _: z.unsqueeze(i),
    lambda z, i, _: z.squeeze(i),
    lambda z, i, j: z.permute(*(d - z.dim() * (j % 2) for d in range(z.dim())[::-1])),
    lambda z, i, j: z.flatten(*sorted((i % z.dim(), j % z.dim()))),
    lambda z, i, _: z.narrow(i, 0, (z.shape[i] + 1) // 2),
    lambda z, i, _: z.select(i, -1),
    lambda z, i, _: torch.cat([z, z], i),
    lambda z, i, _: torch.stack([z, z], i),
    lambda z, i, _: z.chunk(2, i)[0],
    lambda z, _, j: z.reshape(-1, z.shape[j]),
    lambda z, i, _: z.repeat(*(2 if d == i % z.dim() else 1 for d in range(z.dim()))),
)
PLACES = st.integers(0, 9)
CHAINS = st.lists(st.tuples(st.sampled_from(STEPS), PLACES, PLACES), min_size=1, max_size=6)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(CHAINS)
def test_any_chain_of_reorderings_is_what_torch_makes_of_it(chain: list[Any]) -> None:
    def forward(x: Tensor) -> Tensor:
        z = torch.view_as_complex(x)
        for step, first, second in chain:
            z = z if z.dim() > 1 else z.reshape(1, -1)
            sides = 2 * z.dim()
            z = step(z, first % sides - z.dim(), second % sides - z.dim())
        return torch.view_as_real(z) + 1

    # Values are moved and 1 is added, as in torch.
    check(forward, torch.arange(48.0).view(*SHAPE, 2), exact=True)


# --- arithmetic ---------------------------------------------------------------------------------


class Held(nn.Module):
    """A function of a complex buffer and an input."""

    def __init__(self, function: Function, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return pytree.tree_map(torch.view_as_real, self.function(self.value, x))


@pytest.mark.slow
def test_rotary_positions_are_four_products() -> None:
    angles = torch.outer(torch.arange(3.0), torch.tensor([1.0, 0.1]))
    table, x = torch.polar(torch.ones_like(angles), angles), draw(FLOAT)
    # As in Lumina and Z-Image: pairs of channels turned by a complex table.
    model = Held(lambda z, x: torch.view_as_complex(x.unflatten(-1, (-1, 2))) * z, table)
    lowered = check(model, x)
    select, mul = aten.select.int, aten.mul.Tensor
    assert targets(lowered) == [
        *(aten.reshape.default, select, select, select, select),
        *(mul, mul, aten.sub.Tensor, mul, mul, aten.add.Tensor, aten.stack.default),
    ]
    (node,) = [node for node in lowered.graph.nodes if node.op == "get_attr"]
    assert node.target == "value_pairs"
    assert torch.equal(lowered.value_pairs, as_pairs(table))
    torch.testing.assert_close(run_onnx(trace(model, x), x)[0], model(x), **CLOSE)


ARITHMETIC: dict[str, Function] = {
    "product": lambda z, x: z * z[:, :1],
    "product of two ranks": lambda z, x: z * z[0],
    "complex times real": lambda z, x: z * x,
    "real times complex": lambda z, x: x * z,
    "real of a higher rank": lambda z, x: z[0] * x,
    "real of a lower rank": lambda z, x: z * x[0],
    "times a number": lambda z, x: z * 2.5,
    "a number times": lambda z, x: 3 * z,
    "sum": lambda z, x: z + z[:, :1],
    "difference": lambda z, x: z[:1] - z,
    "weighted difference": lambda z, x: torch.sub(z, z[0], alpha=2),
    "conj": lambda z, x: z.conj() * z[0],
    "polar": lambda z, x: torch.polar(x.abs(), x) * z,
    "polar of two shapes": lambda z, x: torch.polar(torch.ones(1), x) * z,
    "complex": lambda z, x: torch.complex(x, x * 2) * z,
}


@pytest.mark.slow
def test_arithmetic_is_torchs() -> None:
    """On values that are made of pairs, that the model holds, and that it is given."""
    z, x, every = draw(), draw(FLOAT), together(ARITHMETIC)
    check(over_pairs(every), as_pairs(z), x)
    check(Held(every, z), x)
    check(lambda z, x: pytree.tree_map(torch.view_as_real, every(z, x)), z, x)


@pytest.mark.slow
def test_onnx_runtime_agrees_with_torch() -> None:
    def every(z: Tensor, x: Tensor) -> list[Tensor]:
        results = together(REORDERINGS)(z), together(ARITHMETIC)(z, x)
        return [result * 3 for result in pytree.tree_leaves(results)]

    model, inputs = over_pairs(every), (as_pairs(draw()), draw(FLOAT))
    results = run_onnx(trace(model, *inputs), *inputs)
    torch.testing.assert_close(results, list(model(*inputs)), **CLOSE)


PARTS: dict[str, Function] = {
    "plus a number": lambda z, x: z + 1.5,
    "plus i": lambda z, x: z + 2j,
    "times i": lambda z, x: z * 2j,
    "real times i": lambda z, x: x * 2j + z,
    "plus real": lambda z, x: z + x,
    "real minus": lambda z, x: x - z,
    "real as complex": lambda z, x: x.to(COMPLEX) * 2,
    "real part": lambda z, x: z.conj().real * z,
    "complex of two shapes": lambda z, x: torch.complex(x, torch.ones(1)),
    "as double": lambda z, x: z.to(torch.complex128) * 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("function", PARTS.values(), ids=PARTS)
def test_mixtures_of_real_and_complex_are_right_or_left_alone(function: Function) -> None:
    model, inputs = over_pairs(function), (as_pairs(draw()), draw(FLOAT))
    results = lower(trace(model, *inputs))(*inputs)
    torch.testing.assert_close(results, model(*inputs), **CLOSE)


# --- look-ups and assignments -------------------------------------------------------------------


def padded(z: Tensor) -> Tensor:
    return pad_sequence([z[0], z[1, :2], z[0, :1]], batch_first=True)


def assigned(z: Tensor) -> Tensor:
    scattered = torch.zeros(3, 3, 4, dtype=z.dtype)
    scattered[:2], scattered[:, :, 1:2] = z, z[:1, :, :1]
    return scattered


MADE: dict[str, Function] = {
    "pad_sequence": padded,
    "slice_scatter": assigned,
    "index_put": lambda z: z.new_zeros(4, 3, 4).index_put((torch.tensor([3, 1]),), z),
    "select_scatter": lambda z: torch.select_scatter(torch.zeros_like(z), z[0], -3, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("function", MADE.values(), ids=MADE)
def test_values_are_written_into_others(function: Function) -> None:
    x = as_pairs(draw())
    model = over_pairs(function)
    check(model, x, exact=True)
    assert torch.equal(run_onnx(trace(model, x), x)[0], model(x)[0])  # nothing is computed


@pytest.mark.slow
@pytest.mark.parametrize("dim", [0, 2, -1, -2])
def test_gather_and_index_take_places_of_an_input(dim: int) -> None:
    places = torch.tensor([1, 0, 1])

    def picked(z: Tensor, places: Tensor) -> list[Tensor]:
        each = places.view([3 if d == dim % 3 else 1 for d in range(3)])
        each = each.expand([3 if d == dim % 3 else n for d, n in enumerate(SHAPE)])
        parts = [z.gather(dim, each), z.index_select(dim, places)]
        return [*parts, z[places], z[:, :, places], z[places, places]]

    model, inputs = over_pairs(picked), (as_pairs(draw()), places)
    check(model, *inputs, exact=True)
    results = run_onnx(trace(model, *inputs), *inputs)
    assert all(map(torch.equal, results, model(*inputs)))


@pytest.mark.slow
def test_complex_inputs_are_taken_as_pairs() -> None:
    def model(z: Tensor, pairs: Tensor) -> Tensor:
        return torch.view_as_real(z[:, 1:] * torch.view_as_complex(pairs)[0])

    inputs = (draw(), as_pairs(draw())[:, 1:])
    lowered = check(model, *inputs)
    assert next(iter(lowered.graph.nodes)).meta["val"].shape == (*SHAPE, 2)
    results = run_onnx(trace(model, *inputs), *inputs)
    torch.testing.assert_close(results, [model(*inputs)], **CLOSE)


# --- what is left alone -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        lambda x: x * 2,
        lambda x: torch.view_as_real(torch.exp(torch.view_as_complex(x))),
        lambda x: torch.view_as_real(torch.view_as_complex(x) * 2 / 3),
        lambda x: torch.view_as_complex(x) * 2,
    ],
    ids=["nothing complex", "an unknown operation", "a division", "a complex result"],
)
def test_other_modules_are_returned_as_they_are(model: Function) -> None:
    module = trace(model, as_pairs(draw()))
    before = written(module)
    assert lower_complex(module) is module
    assert written(module) == before
