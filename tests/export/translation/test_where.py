"""Choices between truth values: written as logic, exact nodes, what is left alone, all values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from support.toys import op_types, run_onnx, trace
from torch import Tensor

from calicache.export.translation.translate import translate
from calicache.export.translation.where import lower_boolean_where

LOGIC = ["And", "Not", "And", "Or"]
OPSET = 18  # torch's own choice
Shape = Sequence[int]


def choice(kind: int, *shapes: Shape, behind: Sequence[onnx.NodeProto] = ()) -> ir.Model:
    """where(c, a, b) of one kind of value; what comes behind it makes the result."""
    kinds = (TensorProto.BOOL, kind, kind)
    full = np.broadcast_shapes(*map(tuple, shapes))
    arguments = zip("cab", kinds, shapes, strict=True)
    graph = helper.make_graph(
        [helper.make_node("Where", ["c", "a", "b"], ["chosen"]), *behind],
        "choice",
        [helper.make_tensor_value_info(*argument) for argument in arguments],
        [helper.make_tensor_value_info("result" if behind else "chosen", kind, full)],
        value_info=[helper.make_tensor_value_info("chosen", kind, full)] if behind else [],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def run(model: ir.Model, *values: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString())
    return session.run(None, dict(zip("cab", values, strict=True)))[0]


def truths(*shapes: Shape) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [np.asarray(draw.random(shape) > 0.5) for shape in shapes]


def test_a_choice_is_and_not_and_or() -> None:
    model = choice(TensorProto.BOOL, (8,), (8,), (8,))
    assert lower_boolean_where(model) is model  # in place
    first, negated, second, either = model.graph
    assert list(op_types(model)) == LOGIC
    condition, yes, no = model.graph.inputs
    assert list(first.inputs) == [condition, yes]
    assert list(negated.inputs) == [condition]
    assert list(second.inputs) == [negated.outputs[0], no]
    assert list(either.inputs) == [first.outputs[0], second.outputs[0]]
    (result,) = model.graph.outputs
    assert result is either.outputs[0]
    assert (result.name, result.dtype, list(result.shape)) == ("chosen", ir.DataType.BOOL, [8])
    values = list(np.array(list(itertools.product([False, True], repeat=3))).T)
    assert np.array_equal(run(model, *values), np.where(*values))


def test_a_second_time_it_finds_nothing_to_do() -> None:
    once = ir.to_proto(lower_boolean_where(choice(TensorProto.BOOL, (8,), (8,), (8,))))
    assert ir.to_proto(lower_boolean_where(ir.from_proto(once))) == once


@pytest.mark.parametrize(
    "shapes",
    [((2, 3), (2, 3), (2, 3)), ((2, 1), (3,), (1, 1)), ((), (2, 3), ()), ((4, 1, 3), (2, 1), (3,))],
    ids=str,
)
def test_shapes_broadcast_as_before(shapes: Sequence[Shape]) -> None:
    model, values = choice(TensorProto.BOOL, *shapes), truths(*shapes)
    result = run(lower_boolean_where(model), *values)
    assert result.shape == np.broadcast_shapes(*shapes)
    assert np.array_equal(result, np.where(*values))


def test_what_reads_the_choice_reads_the_logic() -> None:
    behind = [helper.make_node("Xor", ["chosen", "a"], ["result"])]
    model, values = choice(TensorProto.BOOL, (8,), (8,), (8,), behind=behind), truths((8,)) * 3
    assert list(op_types(lower_boolean_where(model))) == [*LOGIC, "Xor"]
    assert np.array_equal(run(model, *values), np.where(*values) ^ values[1])


def test_a_choice_of_a_choice_is_logic_twice() -> None:
    behind = [helper.make_node("Where", ["a", "chosen", "chosen"], ["result"])]
    model, values = choice(TensorProto.BOOL, (8,), (8,), (8,), behind=behind), truths(*[(8,)] * 3)
    assert list(op_types(lower_boolean_where(model))) == LOGIC * 2
    assert np.array_equal(run(model, *values), np.where(*values))


@pytest.mark.parametrize(
    ("kind", "dtype"), [(TensorProto.FLOAT, np.float32), (TensorProto.INT64, np.int64)]
)
def test_choices_between_numbers_are_left_alone(kind: int, dtype: type) -> None:
    model = choice(kind, (8,), (8,), (8,))
    assert list(op_types(lower_boolean_where(model))) == ["Where"]
    values = [truths((8,))[0], np.arange(8, dtype=dtype), -np.arange(8, dtype=dtype)]
    assert np.array_equal(run(model, *values), np.where(*values))


def joined(tokens: Tensor, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """A mask over image and text, as a choice; and one between numbers."""
    return torch.where(tokens > 0, image, ~text), torch.where(image, tokens, -tokens)


@pytest.mark.slow
def test_masks_of_a_model_run_in_onnx_runtime() -> None:
    inputs = torch.randn(2, 5), torch.rand(2, 5) > 0.5, torch.rand(5) > 0.5
    module = trace(joined, *inputs)
    assert list(op_types(translate({"toy": module})["toy"])).count("Where") == 1
    for result, expected in zip(run_onnx(module, *inputs), joined(*inputs), strict=True):
        assert torch.equal(result, expected)  # truth values, and numbers that are passed on


@pytest.mark.slow
def test_choices_inside_a_branch_are_written_too() -> None:
    def model(x: Tensor, mask: Tensor) -> Tensor:
        chosen = [lambda x, mask: torch.where(x > 0, mask, x < -1), lambda x, mask: mask & (x > 0)]
        return torch.cond(x.sum() > 0, *chosen, (x, mask))

    inputs = torch.randn(5) + 1, torch.rand(5) > 0.5
    assert torch.equal(run_onnx(trace(model, *inputs), *inputs)[0], model(*inputs))
