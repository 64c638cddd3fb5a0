"""Kernels that are published: the rule of types, names of providers, the tables that ship."""

from __future__ import annotations

import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from calicache.graph_passes.common.errors import SubjectError
from calicache.tools.inspect.providers.tables import (
    Kernel,
    KernelTable,
    find_provider,
    kernel_table,
    known_providers,
    operator_name,
)

CPU = "CPUExecutionProvider"
OF_ARM = ("Gemm", "MatMul")  # in float16, which other processors have no kernels for


def test_kernel_takes_types_in_one_of_its_forms() -> None:
    kernel = Kernel((("T", "int64"), ("T",)), {"T": ("float", "float16")})
    assert kernel.takes(("float16", "int64"))
    assert kernel.takes(("float", ""))
    assert not kernel.takes(("float", "float"))
    assert not kernel.takes(("double",))
    any_index = Kernel((("T", ""),), {"T": ("float",)})
    assert any_index.takes(("float", "int32"))
    assert not any_index.takes(("int32", "float"))


def test_table_without_types_takes_any_and_one_of_all_values_its_own() -> None:
    kernels = {"Relu": (Kernel(),)}
    anything = KernelTable("", 20, kernels)
    assert not anything.has_types
    assert anything.takes("Relu", ("double",))
    assert not anything.takes("Sin", ("float",))
    of_values = KernelTable("", 20, kernels, ("float",))
    assert of_values.has_types
    assert of_values.takes("Relu", ("float", ""))
    assert not of_values.takes("Relu", ("double",))


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
    published = kernel_table(CPU).kernels
    assert len(published) > 200
    for name, kernels in published.items():
        kinds = {kind for kernel in kernels for types in kernel.types.values() for kind in types}
        if name in OF_ARM:
            kinds.discard("float16")
        assert {f"tensor({kind})" for kind in kinds} <= installed[name], name


def test_every_provider_has_what_a_transformer_is_made_of() -> None:
    names = {name.removesuffix("ExecutionProvider") for name in known_providers()}
    assert names == {"CPU", "CUDA", "CoreML", "Dml", "OpenVINO", "QNN", "Tensorrt", "WebGpu"}
    for provider in known_providers():
        table = kernel_table(provider)
        assert table.source.split()[-1][0].isdigit(), "the version of the page"
        half = ("float16", "float16")
        for operator in ("MatMul", "Add", "Mul", "Softmax", "LayerNormalization", "Conv"):
            # CPU kernels are in float32, but for a few.
            kinds = half if provider != CPU else ("float", "float")
            assert table.takes(operator, kinds), (provider, operator)
        no_loop = provider.removesuffix("ExecutionProvider") in ("CoreML", "Dml", "QNN", "WebGpu")
        assert table.takes("Loop", ("int64", "bool")) is not no_loop


@pytest.mark.parametrize(
    ("name", "provider"),
    [
        ("CUDAExecutionProvider", "CUDAExecutionProvider"),
        ("cuda", "CUDAExecutionProvider"),
        ("TensorRT", "TensorrtExecutionProvider"),
        ("DirectML", "DmlExecutionProvider"),
        ("webgpu", "WebGpuExecutionProvider"),
        ("openvino", "OpenVINOExecutionProvider"),
    ],
)
def test_providers_are_found_by_short_names(name: str, provider: str) -> None:
    assert find_provider(name) == provider


@pytest.mark.parametrize("name", ["", "ExecutionProvider", "cud", "Vitis"])
def test_other_names_are_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(SubjectError) as refusal:
        find_provider(name)
    assert str(refusal.value.expected).split(" | ") == known_providers()
    assert repr(name) in str(refusal.value.got)
