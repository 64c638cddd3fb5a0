"""What a provider leaves to the host, and what is copied for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from calicache.graph_passes.common.errors import SubjectError
from calicache.tools.cli import app
from calicache.tools.inspect.providers.facts import (
    HostOperator,
    KernelNote,
    facts_of_models,
    provider_facts,
)
from calicache.tools.inspect.providers.placement import Copy
from calicache.tools.inspect.providers.tables import known_providers

CPU, CUDA, DML = "CPUExecutionProvider", "CUDAExecutionProvider", "DmlExecutionProvider"
TENSORRT, COREML = "TensorrtExecutionProvider", "CoreMLExecutionProvider"


def test_what_an_artifact_leaves_to_the_host(home: Path) -> None:
    facts = provider_facts(home / "dit.onnx.d", CUDA)
    assert (facts.host, facts.has_types, facts.remarks) == ((), True, ())
    # The layout `step` compares the step's mode, once a step, and an If reads that on the host.
    assert facts.copies
    assert all((copy.elements, copy.to) == (1, "host") for copy in facts.copies)
    assert facts.nodes > 100
    of_cpu = provider_facts(home / "dit.onnx.d", CPU)
    assert (of_cpu.host, of_cpu.copies) == ((), ())


def test_copies_are_told_with_their_place() -> None:
    """Unique has no kernel on CUDA; a Loop reads its count from the host."""
    body = helper.make_graph(
        [
            helper.make_node("Add", ["kept", "unique"], ["next"]),
            helper.make_node("Not", ["go"], ["on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("k", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("kept", TensorProto.FLOAT, [2, 3]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [2, 3]),
        ],
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["positive"]),
        helper.make_node("Unique", ["positive"], ["unique"]),
        helper.make_node("Add", ["n", "n"], ["twice"]),
        helper.make_node("Loop", ["twice", "", "positive"], ["y"], body=body),
    ]
    graph = helper.make_graph(
        nodes,
        "two_sides",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3]),
            helper.make_tensor_value_info("n", TensorProto.INT64, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        value_info=[
            helper.make_tensor_value_info("positive", TensorProto.FLOAT, [2, 3]),
            helper.make_tensor_value_info("unique", TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info("twice", TensorProto.INT64, []),
        ],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    facts = facts_of_models({"m": model}, CUDA)
    assert facts.nodes == 6
    assert facts.host == (HostOperator("m", "Unique", ("float",), 1),)
    assert set(facts.copies) == {
        Copy("m", "positive", 6, "host", ()),
        Copy("m", "unique", None, CUDA, ("Loop",)),
        Copy("m", "twice", 1, "host", ()),
    }
    assert facts_of_models({"m": model}, CPU).copies == ()


def value(name: str, dtype: int = TensorProto.FLOAT, shape: tuple[int, ...] = (2, 3)) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def chosen(operators: tuple[str, str]) -> ir.Model:
    """A Relu, and an If of two operators on what it makes."""
    bodies = {
        name: helper.make_graph(
            [helper.make_node(of, ["positive"], [name])], name, [], [value(name)]
        )
        for name, of in zip(("then_branch", "else_branch"), operators, strict=True)
    }
    nodes = [
        helper.make_node("Relu", ["x"], ["positive"]),
        helper.make_node("If", ["c"], ["chosen"], **bodies),
        helper.make_node("Exp", ["chosen"], ["y"]),
    ]
    inputs = [value("x"), value("c", TensorProto.BOOL, ())]
    graph = helper.make_graph(
        nodes, "g", inputs, [value("y")], value_info=[value("positive"), value("chosen")]
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))


@pytest.mark.parametrize(
    ("provider", "operators", "on_host"),
    [
        # Whole graphs: an If with bodies that are taken; without one, what is left of the other.
        (TENSORRT, ("Sin", "Cos"), set()),
        (TENSORRT, ("Sin", "Det"), {"If", "Det"}),
        # No control flow, and nothing in it.
        ("QNNExecutionProvider", ("Sin", "Cos"), {"If", "Sin", "Cos"}),
        (COREML, ("Sin", "Cos"), {"If", "Sin", "Cos"}),
        # Single nodes, wherever they lie.
        (CUDA, ("Sin", "Det"), {"Det"}),
        ("WebGpuExecutionProvider", ("Sin", "Det"), {"Det"}),
    ],
)
def test_bodies_are_taken_as_the_provider_takes_them(
    provider: str, operators: tuple[str, str], on_host: set[str]
) -> None:
    facts = facts_of_models({"m": chosen(operators)}, provider)
    assert {kind.operator for kind in facts.host} == on_host
    assert any("pair" in remark for remark in facts.remarks) == ("If" in on_host)


def test_what_bodies_make_is_copied_where_the_host_chooses() -> None:
    facts = facts_of_models({"m": chosen(("Sin", "Det"))}, TENSORRT)
    assert {(copy.value, copy.to, copy.place) for copy in facts.copies} == {
        ("positive", "host", ("If",)),  # for Det
        ("then_branch", "host", ("If",)),
        ("chosen", TENSORRT, ()),
    }


def test_pages_without_types_say_so_and_their_notes_are_told() -> None:
    w = helper.make_tensor("w", TensorProto.FLOAT16, [3, 4], [0.0] * 12)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("MultiHeadAttention", ["y"], ["z"], domain="com.microsoft", num_heads=1),
    ]
    half = [value(name, TensorProto.FLOAT16, (1, 2, 4)) for name in "yz"]
    x = value("x", TensorProto.FLOAT16, (1, 2, 3))
    graph = helper.make_graph(nodes, "g", [x], half[1:], [w], value_info=half[:1])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets))
    facts = facts_of_models({"m": model}, COREML)
    assert not facts.has_types
    (note,) = facts.notes
    assert isinstance(note, KernelNote)
    assert (note.operator, note.count) == ("MatMul", 1)
    assert "transA" in note.text
    assert [kind.operator for kind in facts.host] == ["com.microsoft:MultiHeadAttention"]
    assert any("standard" in remark for remark in facts.remarks)


def test_command_prints_and_refuses(home: Path) -> None:
    path = str(home / "dit.onnx.d")
    for provider in known_providers():
        printed = CliRunner().invoke(app, ["inspect", path, "--provider", provider])
        assert printed.exit_code == 0
        assert provider in printed.output
    as_json = CliRunner().invoke(app, ["inspect", path, "--provider", "directml", "--json"])
    assert json.loads(as_json.output)["provider"] == DML
    with pytest.raises(SubjectError) as refusal:
        provider_facts(home / "dit.onnx.d", "VitisAIExecutionProvider")
    assert CUDA in str(refusal.value.expected)
