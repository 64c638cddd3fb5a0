"""Operands that lend a form: written out exactly, values as before, no dependence any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.toys import Toy, captured, run_onnx
from torch import Tensor, fx, nn

from calicache.graph_passes import record
from calicache.graph_passes.graph.capture import capture
from calicache.graph_passes.graph.dependence import classify_nodes
from calicache.graph_passes.graph.forms import write_out_forms
from calicache.graph_passes.graph.surgery import copy_graph
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.reads import find_reads

aten = torch.ops.aten
Function = Callable[..., Any]
FLOAT, DOUBLE, CPU = torch.float32, torch.float64, torch.device("cpu")
DOUBLES = {"dtype": DOUBLE, "device": CPU}  # as the operand has it


def trace(function: Function, *inputs: Tensor) -> fx.GraphModule:
    """The graph as torch.export gives it: capture already writes forms out."""
    program = torch.export.export(Toy(function).eval(), inputs, strict=False)
    return program.run_decompositions({}).module(check_guards=False)


def write_out(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    graph, _ = copy_graph(module.graph)
    written = write_out_forms(graph)
    graph.lint()
    return fx.GraphModule(module, graph), written


def calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def value_of(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def inputs() -> tuple[Tensor, Tensor]:
    """A value of (3, 1) in float32, and an operand of (3, 4) in float64."""
    return torch.randn(3, 1), torch.randn(3, 4, dtype=DOUBLE)


# --- each operation ------------------------------------------------------------------------------

# Function of (value, operand): (what stands there, with which arguments beside the value).
FORMS: dict[str, tuple[Function, Any, tuple[Any, ...], dict[str, Any]]] = {
    "type_as": (lambda x, y: x.type_as(y), aten.to.dtype, (DOUBLE,), {}),
    "zeros_like": (lambda _, y: torch.zeros_like(y), aten.zeros.default, ([3, 4],), DOUBLES),
    "ones_like": (lambda _, y: torch.ones_like(y), aten.ones.default, ([3, 4],), DOUBLES),
    "full_like": (lambda _, y: torch.full_like(y, 7), aten.full.default, ([3, 4], 7), DOUBLES),
    "new_zeros": (lambda _, y: y.new_zeros(2, 5), aten.zeros.default, ([2, 5],), DOUBLES),
    "new_ones": (lambda _, y: y.new_ones(2), aten.ones.default, ([2],), DOUBLES),
    "new_full": (lambda _, y: y.new_full((2,), 0.5), aten.full.default, ([2], 0.5), DOUBLES),
    "dtype given": (
        lambda _, y: torch.ones_like(y, dtype=torch.int64),
        *(aten.ones.default, ([3, 4],), {**DOUBLES, "dtype": torch.int64}),
    ),
    "truth values": (
        lambda _, y: torch.full_like(y, True, dtype=torch.bool),
        *(aten.full.default, ([3, 4], True), {**DOUBLES, "dtype": torch.bool}),
    ),
    "no dimensions": (lambda _, y: y.new_zeros(()), aten.zeros.default, ([],), DOUBLES),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "target", "arguments", "options"), FORMS.values(), ids=list(FORMS)
)
def test_the_operand_is_written_as_what_it_lends(
    function: Function, target: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    values = inputs()
    module = trace(function, *values)
    before = str(module.graph)
    explicit, written = write_out(module)
    assert str(module.graph) == before
    ((old, new),) = written.items()
    assert new in calls(explicit.graph)
    assert old not in list(explicit.graph.nodes)
    assert new.target is target
    is_cast = target is aten.to.dtype
    first = next(iter(explicit.graph.nodes))
    assert new.args == ((first, *arguments) if is_cast else arguments)
    assert dict(new.kwargs) == options
    assert new.all_input_nodes == [first] * is_cast
    expected = function(*values)
    value = value_of(explicit(*values))
    assert (new.meta["val"].shape, new.meta["val"].dtype) == (expected.shape, expected.dtype)
    # Casts, copies and constants, as in torch.
    assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
    assert torch.equal(value, expected)


@pytest.mark.parametrize(
    ("source", "target", "size"),
    [
        (aten.expand_as.default, aten.expand.default, (3, 4)),
        (aten.view_as.default, aten.reshape.default, (1, 3)),
        (aten.reshape_as.default, aten.reshape.default, (3,)),
    ],
    ids=str,
)
def test_sizes_are_written_out(source: Any, target: Any, size: tuple[int, ...]) -> None:
    # torch.export writes these out itself at present.
    value, operand = torch.randn(3, 1), torch.randn(size)
    graph = fx.Graph()
    nodes = graph.placeholder("value"), graph.placeholder("operand")
    node = graph.call_function(source, nodes)
    node.meta["val"] = expected = source(value, operand)
    graph.output((node,))
    explicit, written = write_out(fx.GraphModule({}, graph))
    (new,) = written.values()
    assert (new.target, new.args[1], new.kwargs) == (target, list(size), {})
    assert [source.name for source in new.all_input_nodes] == ["value"]
    assert torch.equal(explicit(value, operand)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("function", [torch.empty_like, lambda y: y.new_empty(3, 4)])
def test_what_is_empty_is_zeros(function: Function) -> None:
    def filled(x: Tensor, y: Tensor) -> Tensor:
        empty = function(y)
        empty[:] = x
        return empty

    values = inputs()
    explicit, _ = write_out(trace(filled, *values))
    assert not {aten.empty_like, aten.new_empty} & {
        getattr(node.target, "overloadpacket", None) for node in calls(explicit.graph)
    }
    assert torch.equal(value_of(explicit(*values)), filled(*values))


def test_users_read_the_new_node_and_other_nodes_stay() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        cast = x.type_as(y)
        return cast.sin() + cast * y

    values = inputs()
    explicit, written = write_out(trace(function, *values))
    (new,) = written.values()
    assert [node.target for node in new.users] == [aten.sin.default, aten.mul.Tensor]
    assert torch.equal(value_of(explicit(*values)), function(*values))


def test_one_form_lent_on_is_written_twice() -> None:
    values = inputs()
    module = trace(lambda x, y: torch.ones_like(torch.zeros_like(y)) + x, *values)
    _, written = write_out(module)
    assert len(written) == 2
    zeros, ones = written.values()
    assert not zeros.users
    assert (zeros.target, ones.target) == (aten.zeros.default, aten.ones.default)


def test_a_second_time_it_finds_nothing_to_do() -> None:
    explicit, written = write_out(trace(lambda x, y: x.type_as(y) + torch.ones_like(y), *inputs()))
    assert len(written) == 2
    code = str(explicit.graph)
    assert write_out_forms(explicit.graph) == {}
    assert str(explicit.graph) == code


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x + y,
        lambda x, y: x.to(torch.float64) * y,
        lambda x, y: x.expand(3, 4) + y,
        lambda x, y: torch.rand_like(y) + torch.randn_like(x),
    ],
    ids=["sum", "cast", "expand", "random"],
)
def test_other_operations_are_left_alone(function: Function) -> None:
    module = trace(function, *inputs())
    explicit, written = write_out(module)
    assert not written
    assert [node.target for node in calls(explicit.graph)] == [
        node.target for node in calls(module.graph)
    ]


# --- in capture ----------------------------------------------------------------------------------


class Embedded(nn.Module):
    """The timestep is brought into the latent's dtype and form before it is embedded."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)

    def forward(self, latent: Tensor, timestep: Tensor) -> Tensor:
        times = timestep.type_as(latent)[:, None].expand_as(latent)
        return latent + self.embed(times + torch.zeros_like(latent))


@pytest.mark.slow
def test_what_only_has_the_latents_form_does_not_depend_on_it() -> None:
    model, values = Embedded(), (torch.randn(3, 4), torch.tensor([5, 3, 1]))
    graph = captured(model, *values)
    classes = classify_nodes(graph, {"latent": Dependence.LATENT, "timestep": Dependence.STEP})
    (linear,) = [node for node in graph.graph.nodes if node.target is aten.linear.default]
    assert classes[linear.name] is Dependence.STEP
    assert [node.target for node in linear.args[0].all_input_nodes] == [
        *(aten.expand.default, aten.zeros.default)
    ]
    # float32: the same operations on the same numbers.
    assert torch.equal(graph.module(*values)[0], model(*values))
    # Sums of 4 products in another order.
    output = run_onnx(graph.module, *values)[0]
    torch.testing.assert_close(output, model(*values).detach(), rtol=1e-5, atol=1e-6)


def test_values_are_laid_out_as_before() -> None:
    def model(x: Tensor) -> Tensor:
        ones = torch.ones_like(x.transpose(0, 1))  # with the strides of its operand
        return ones.transpose(0, 1).flatten() * x.flatten()

    x = torch.randn(3, 4)
    assert torch.equal(captured(model, x).module(x)[0], model(x))


def test_what_was_read_in_a_form_is_fixed_by_its_value_alone() -> None:
    def function(latent: Tensor, length: Tensor, timestep: Tensor) -> Tensor:
        return latent[:, : int(length.type_as(latent))] * timestep

    model, length = Toy(function).eval(), torch.tensor([3])
    with record(model) as recording, torch.no_grad():
        for time in (3.0, 2.0, 1.0):
            model(torch.randn(2, 5), length, torch.tensor(time))
    graph = capture(model, recording.signature, find_reads(model, recording))
    assert graph.fixed == ("length",)
    values = torch.randn(2, 5), length, torch.tensor(4.0)
    assert torch.equal(graph.module(*values)[0], function(*values))  # the same product
