"""What a provider leaves to the host: the published table, the rule of versions, copies."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as runtime
from typer.testing import CliRunner

from calicache.graph_passes.common.errors import SubjectError
from calicache.tools.cli import app
from calicache.tools.inspect.kernel_table import Kernel, kernel_table, operator_name, parse_table
from calicache.tools.inspect.provider import (
    Copy,
    HostOperator,
    facts_of_models,
    provider_facts,
)

CPU, CUDA, DML = "CPUExecutionProvider", "CUDAExecutionProvider", "DmlExecutionProvider"

PAGE = """\
## Operators implemented by CUDAExecutionProvider

| Op Name | Parameters | OpSet Version | Types Supported |
|---------|------------|---------------|-----------------|
|**Operator Domain:** *ai.onnx*||||
|Equal|*in* A:**T**<br> *in* B:**T**<br> *out* C:**tensor(bool)**|13+|**T** = tensor(int64)|
|||[11, 12]|**T** = tensor(int64)|
|Gather|*in* x:**T**<br>*in* i:**I**|13+|**T** = tensor(float), seq(tensor(int8))<br/>**I** = tensor(int64)|
|Slice|*in* x:**T**<br>*in* i:**tensor(int64)**<br><br>or<br><br>*in* x:**T**|[13, 21]|**T** = tensor(float)|
|**Operator Domain:** *com.microsoft*||||
|Gelu|*in* X:**T**<br> *out* Y:**T**|1+|**T** = tensor(float16)|
"""  # noqa: E501


def test_table_keeps_the_kernels_of_the_opset() -> None:
    table = parse_table(PAGE, "9.9")
    assert table.source.endswith("9.9")
    kernels = table.providers[CUDA]
    # Equal of opset 20 is of 19: a kernel of 13 and no end is not known to be right for it.
    assert [*kernels] == ["Gather", "Slice", "com.microsoft:Gelu"]
    assert kernels["Slice"][0].inputs == (("T", "int64"), ("T",))
    (gather,) = kernels["Gather"]
    assert gather.types == {"T": ("float",), "I": ("int64",)}


def test_kernel_takes_types_in_one_of_its_forms() -> None:
    kernel = Kernel((("T", "int64"), ("T",)), {"T": ("float", "float16")})
    assert kernel.takes(("float16", "int64"))
    assert kernel.takes(("float", ""))
    assert not kernel.takes(("float", "float"))
    assert not kernel.takes(("double",))


def test_table_of_the_cpu_is_the_installed_one() -> None:
    """The one provider whose kernels can be asked for here: the page is read right."""
    installed: dict[str, set[str]] = {}
    for kernel in runtime.get_all_opkernel_def():
        if kernel.provider == CPU:
            name = operator_name(
                "" if kernel.domain == "ai.onnx" else kernel.domain, kernel.op_name
            )
            kinds = {kind for types in kernel.type_constraints.values() for kind in types}
            installed.setdefault(name, set()).update(kinds)
    published = kernel_table().providers[CPU]
    assert len(published) > 200
    for name, kernels in published.items():
        kinds = {kind for kernel in kernels for types in kernel.types.values() for kind in types}
        assert {f"tensor({kind})" for kind in kinds} <= installed[name], name


def test_what_an_artifact_leaves_to_the_host(home: Path) -> None:
    facts = provider_facts(home / "dit.onnx.d", CUDA)
    # The layout `step` compares the step's mode: a scalar, made once a step.
    assert {kind.operator for kind in facts.host} == {"Equal"}
    assert all(copy.elements == 1 for copy in facts.copies)
    assert facts.nodes > 100
    assert provider_facts(home / "dit.onnx.d", CPU).host == ()


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


def test_command_prints_and_refuses(home: Path) -> None:
    path = str(home / "dit.onnx.d")
    printed = CliRunner().invoke(app, ["inspect", path, "--provider", CUDA])
    assert printed.exit_code == 0
    assert "Equal" in printed.output
    as_json = CliRunner().invoke(app, ["inspect", path, "--provider", DML, "--json"])
    assert json.loads(as_json.output)["provider"] == DML
    with pytest.raises(SubjectError) as refusal:
        provider_facts(home / "dit.onnx.d", "QNNExecutionProvider")
    assert CUDA in str(refusal.value.expected)
