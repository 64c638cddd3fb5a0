"""Makes the table of a provider from its pages.

    python -m calicache.tools.inspect.providers.remake PROVIDER VERSION PAGE...

| provider | pages |
|---|---|
| CPU, CUDA, Dml | `docs/OperatorKernels.md` of ONNX Runtime |
| CoreML | `tools/ci_build/github/apple/coreml_supported_mlprogram_ops.md` of ONNX Runtime |
| OpenVINO | `onnxruntime/core/providers/openvino/ov_versions/data_ops.cc` of ONNX Runtime |
| WebGpu | `webgpu_execution_provider.cc` and `math/binary_elementwise_ops.cc` in |
| | `onnxruntime/core/providers/webgpu`, and `contrib_ops/webgpu/webgpu_contrib_kernels.cc` |
| QNN | `docs/execution_providers/QNN-ExecutionProvider.md` of onnxruntime-qnn |
| Tensorrt | `docs/operators.md` of onnx-tensorrt |

Of OpenVINO and WebGPU ONNX Runtime's site has lists too, which are not used: that of OpenVINO is
years behind what the provider takes, and `js/web/docs/webgpu-operators.md` is of another provider.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from calicache.tools.inspect.providers import pages
from calicache.tools.inspect.providers.tables import (
    ADAPTER,
    OPSET,
    Kernel,
    KernelTable,
    table_file,
)


@dataclass(frozen=True, slots=True)
class Page:
    """Where a provider says what it has kernels for.

    Attributes:
        source: in words that a version ends.
        read: gives the operators and kernels of a text.
        types: gives those that a value may have, where the page says so for all operators.
    """

    source: str
    read: Callable[[str], Iterator[pages.Row]]
    types: Callable[[str], tuple[str, ...]] = lambda _: ()


def _of_onnx_runtime(provider: str) -> Page:
    read = partial(pages.read_operator_kernels, provider=provider)
    return Page("docs/OperatorKernels.md of ONNX Runtime", read)


PAGES: Mapping[str, Page] = {
    "CPUExecutionProvider": _of_onnx_runtime("CPUExecutionProvider"),
    "CUDAExecutionProvider": _of_onnx_runtime("CUDAExecutionProvider"),
    "DmlExecutionProvider": _of_onnx_runtime("DmlExecutionProvider"),
    "CoreMLExecutionProvider": Page(
        "coreml_supported_mlprogram_ops.md of ONNX Runtime", pages.read_notes
    ),
    "OpenVINOExecutionProvider": Page(
        "data_ops.cc of the OpenVINO provider in ONNX Runtime",
        pages.read_supported,
        pages.read_supported_types,
    ),
    "WebGpuExecutionProvider": Page(
        "kernels that the WebGPU provider registers in ONNX Runtime", pages.read_registrations
    ),
    "QNNExecutionProvider": Page("QNN-ExecutionProvider.md of onnxruntime-qnn", pages.read_notes),
    "TensorrtExecutionProvider": Page(
        "docs/operators.md of onnx-tensorrt for TensorRT", pages.read_matrix
    ),
}


def make_table(provider: str, version: str, text: str) -> KernelTable:
    """The table of a provider from the text of its pages."""
    page = PAGES[provider]
    kernels: dict[str, tuple[Kernel, ...]] = {}
    for name, kernel in page.read(text):
        known = kernels.get(name, ())
        kernels[name] = known if kernel in known else (*known, kernel)
    return KernelTable(
        f"{page.source} {version}", OPSET, dict(sorted(kernels.items())), page.types(text)
    )


def written(table: KernelTable) -> str:
    """As JSON, an operator a line."""
    content = ADAPTER.dump_python(table, mode="json", exclude_defaults=True)
    kernels = content.pop("kernels")
    compact = partial(json.dumps, separators=(",", ":"), ensure_ascii=False)
    lines = (f"{compact(name)}:{compact(of)}" for name, of in kernels.items())
    return compact(content)[:-1] + ',"kernels":{\n' + ",\n".join(lines) + "\n}}\n"


def main(arguments: Sequence[str]) -> None:
    """Write the file of a provider."""
    provider, version, *files = arguments
    text = "\n".join(Path(file).read_text() for file in files)
    table_file(provider).write_text(written(make_table(provider, version, text)))


if __name__ == "__main__":
    main(sys.argv[1:])
