"""Pages of providers, each of its own kind, to kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from calicache.tools.inspect.providers import remake, tables
from calicache.tools.inspect.providers.pages import (
    read_matrix,
    read_notes,
    read_operator_kernels,
    read_registrations,
    read_supported,
    read_supported_types,
)
from calicache.tools.inspect.providers.tables import Kernel, kernel_table

KERNELS = """\
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
## Operators implemented by DmlExecutionProvider
|**Operator Domain:** *ai.onnx*||||
|Sin|*in* X:**T**|7+|**T** = tensor(float16)|
"""  # noqa: E501

NOTES = """\
|Operator|Note|
|--------|------|
|ai.onnx:Argmax||
|ai.onnx.Conv|Only 1D/2D `Conv`.<br/>Bias must be constant.|
|ai.onnx:Nothing||
|com.microsoft:QuickGelu||
"""

MATRIX = """\
| Operator   | Supported  | Supported Types | Restrictions |
|------------|------------|-----------------|--------------|
| Add        | Y          | FP32, FP16, BF16, INT32 |
| And        | Y          | BOOL | |
| ConstantOfShape | Y     | FP32 |
| Det        | N          |
| Gather     | Y          | FP32, FP8, | `axis`<br />is given.
| OneHot     | Y          | FP16 |
"""

REGISTRATIONS = """\
#define KERNEL_CREATE_INFO(Start, Op) \\
  class ONNX_OPERATOR_KERNEL_CLASS_NAME(kWebGpuExecutionProvider, kOnnxDomain, Start, Op)>
    KERNEL_CREATE_INFO_VERSIONED(6, 12, Abs),
    KERNEL_CREATE_INFO(13, Abs),
    KERNEL_CREATE_INFO(22, Softplus),
    BuildKernelCreateInfo<class ONNX_OPERATOR_TYPED_KERNEL_CLASS_NAME(kWebGpuExecutionProvider, kOnnxDomain, 13, float, Clip)>,
    // BuildKernelCreateInfo<class ONNX_OPERATOR_KERNEL_CLASS_NAME(kWebGpuExecutionProvider, kMSDomain, 1, MoE)>,
    BuildKernelCreateInfo<class ONNX_OPERATOR_VERSIONED_KERNEL_CLASS_NAME(kWebGpuExecutionProvider, kMSInternalNHWCDomain, 11, 21, Conv)>,
    BuildKernelCreateInfo<class ONNX_OPERATOR_KERNEL_CLASS_NAME(kWebGpuExecutionProvider, kMSDomain, 1, BiasAdd)>};
  registry->Register(CreateCastVersionedKernelInfo(19, 20, enable_int64));
  RegisterRangeKernels(*kernel_registry, enable_int64);
  RegisterClipInt64Kernels(*kernel_registry, enable_int64);
  RegisterBinaryOp(kernel_registry, "Add", CreateBinaryOpKernel<Add>, some, {{7, 12}, {14, std::nullopt}});
  RegisterBinaryOp(kernel_registry, "Sub", CreateBinaryOpKernel<Sub>, some, {{7, 12}});
"""  # noqa: E501

SUPPORTED = """\
    {"Abs", V_2020_4, {"CPU", "GPU"}},
    {"Cos", V_2020_4, {"CPU"}},
    {"Cos", V_2022_1, {"GPU"}},
    {"EyeLike", V_2022_1, {"CPU"}},
    // {"Sin", V_2022_3, {"CPU"}},
    {"BiasGelu", V_2023_0, {"CPU", "GPU"}},
  no_dimension_supported_.push_back({"Tan", V_2022_1, {"CPU"}});
  supported_types_cpu_.insert(
      std::make_pair(V_2020_4, ONNX_NAMESPACE::TensorProto_DataType::TensorProto_DataType_FLOAT));
  supported_types_cpu_.insert(
      std::make_pair(V_2020_4, ONNX_NAMESPACE::TensorProto_DataType::TensorProto_DataType_INT16));
  supported_types_gpu_.insert(
      std::make_pair(V_2020_4, ONNX_NAMESPACE::TensorProto_DataType::TensorProto_DataType_FLOAT));
"""


def test_operator_kernels_of_the_opset_are_kept() -> None:
    rows = [*read_operator_kernels(KERNELS, "CUDAExecutionProvider")]
    # Equal of opset 20 is of 19: a kernel of 13 and no end is not known to be right for it.
    assert [name for name, _ in rows] == ["Gather", "Slice", "com.microsoft:Gelu"]
    kernels = dict(rows)
    assert kernels["Slice"].inputs == (("T", "int64"), ("T",))
    assert kernels["Gather"].types == {"T": ("float",), "I": ("int64",)}
    assert [*dict(read_operator_kernels(KERNELS, "DmlExecutionProvider"))] == ["Sin"]


def test_notes_are_told_without_marks() -> None:
    assert dict(read_notes(NOTES)) == {
        "ArgMax": Kernel(),
        "Conv": Kernel(note="Only 1D/2D Conv. Bias must be constant."),
        "com.microsoft:QuickGelu": Kernel(),
    }


def test_types_of_operators_are_those_of_the_inputs_that_may_have_them() -> None:
    kernels = dict(read_matrix(MATRIX))
    assert [*kernels] == ["Add", "And", "ConstantOfShape", "Gather", "OneHot"]
    assert kernels["Add"].takes(("float16", "float16"))
    assert not kernels["Add"].takes(("int64", "int64"))
    assert not kernels["And"].takes(("float", "float"))
    # The shape is in int64, whatever the constant is.
    assert kernels["ConstantOfShape"].takes(("int64",))
    assert kernels["Gather"].takes(("float8e4m3fn", "int64"))
    assert not kernels["Gather"].takes(("float16", "int64"))
    assert kernels["Gather"].note == "axis is given."
    assert kernels["OneHot"].takes(("int64", "int64", "float16"))


def test_registered_kernels_are_those_of_the_opset() -> None:
    names = {name for name, _ in read_registrations(REGISTRATIONS)}
    assert names == {"Abs", "Add", "Cast", "Clip", "Range", "com.microsoft:BiasAdd"}


def test_supported_operators_name_the_device_that_has_them_alone() -> None:
    assert dict(read_supported(SUPPORTED)) == {
        "Abs": Kernel(),
        "Cos": Kernel(),
        "EyeLike": Kernel(note="CPU alone"),
        "com.microsoft:BiasGelu": Kernel(),
    }
    assert read_supported_types(SUPPORTED) == ("float",)


def test_a_table_is_made_from_its_page_by_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(NOTES)
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    remake.main(["QNNExecutionProvider", "9.9", str(page)])
    made = kernel_table.__wrapped__("QNNExecutionProvider")
    assert (made.source.split()[-1], made.opset) == ("9.9", 20)
    assert [*made.kernels] == ["ArgMax", "Conv", "com.microsoft:QuickGelu"]


@pytest.mark.parametrize("provider", tables.known_providers())
def test_tables_that_ship_are_as_the_command_writes_them(provider: str) -> None:
    table = kernel_table(provider)
    assert provider in remake.PAGES
    assert tables.table_file(provider).read_text() == remake.written(table)
