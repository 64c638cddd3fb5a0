"""Which operators an execution provider has kernels for, from ONNX Runtime's published table.

`kernels.json` is made from `docs/OperatorKernels.md` of a version of ONNX Runtime:

    python -m calicache.tools.inspect.kernel_table OperatorKernels.md VERSION
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx.defs
from pydantic import TypeAdapter

OPSET = 20  # of the graphs that calicache exports
TABLE = Path(__file__).with_name("kernels.json")
# Inputs that CUDA kernels read from the host's memory, for they decide sizes and control flow:
# `InputMemoryType` in onnxruntime/core/providers/cuda of the same version.
HOST_INPUTS: Mapping[str, tuple[int, ...]] = {
    "CumSum": (1,),
    "Expand": (1,),
    "If": (0,),
    "Loop": (0, 1),
    "OneHot": (1, 2),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Scan": (0,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
}
_DOMAINS = {"ai.onnx": "", "com.microsoft": "com.microsoft"}  # what calicache exports
_PROVIDER = re.compile(r"^## Operators implemented by (\w+)")
_DOMAIN = re.compile(r"^\|\*\*Operator Domain:\*\* \*([\w.]+)\*")
_PARAMETER = re.compile(r"\*in\* \w+:\*\*([^*]+)\*\*")
_TYPES = re.compile(r"\*\*(\w+)\*\* = ([^*<]+)")
_TENSOR = re.compile(r"(?<!\()tensor\((\w+)\)")  # not those in sequences and optional values
_RANGE = re.compile(r"^\[?(\d+)(?:, (\d+)\])?(\+?)$")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel: what its inputs may be.

    Attributes:
        inputs: a name of `types` for every input, or a type itself; by form of the call.
        types: element types by name, such as `float16`.
    """

    inputs: tuple[tuple[str, ...], ...]
    types: Mapping[str, tuple[str, ...]]

    def takes(self, types: Sequence[str]) -> bool:
        """Whether inputs of these types, '' for one that is left out, suit it."""
        # Where no form has as many, the last input of one stands for a list of them.
        forms = [form for form in self.inputs if len(form) >= len(types)] or self.inputs
        return any(self._suits(form, types) for form in forms)

    def _suits(self, form: Sequence[str], types: Sequence[str]) -> bool:
        if types and not form:
            return False
        names = (form[min(place, len(form) - 1)] for place in range(len(types)))
        return all(
            not kind or kind in self.types.get(name, (name,))
            for kind, name in zip(types, names, strict=True)
        )


@dataclass(frozen=True, slots=True)
class KernelTable:
    """Kernels of some providers for the operators of one opset.

    Attributes:
        source: where the table was published, with its version.
        opset: of the domain ai.onnx; those of com.microsoft are version 1.
        providers: by provider, kernels by operator, `Gemm` or `com.microsoft:Gelu`.
    """

    source: str
    opset: int
    providers: Mapping[str, Mapping[str, tuple[Kernel, ...]]]


_ADAPTER = TypeAdapter(KernelTable)


@cache
def kernel_table() -> KernelTable:
    """The table that ships with calicache."""
    return _ADAPTER.validate_json(TABLE.read_bytes())


def operator_name(domain: str, operator: str) -> str:
    """As the table and `calicache inspect` call an operator."""
    return f"{domain}:{operator}" if domain else operator


def parse_table(text: str, version: str) -> KernelTable:
    """Read `OperatorKernels.md`, of which the kernels for one opset are kept."""
    providers: dict[str, dict[str, tuple[Kernel, ...]]] = {}
    for provider, domain, operator, kernel in _rows(text):
        name = operator_name(domain, operator)
        kernels = providers.setdefault(provider, {})
        kernels[name] = (*kernels.get(name, ()), kernel)
    source = f"docs/OperatorKernels.md of ONNX Runtime {version}"
    return KernelTable(source, OPSET, providers)


def _rows(text: str) -> Iterator[tuple[str, str, str, Kernel]]:
    """Provider, domain, operator and kernel of every row that holds for the opset."""
    provider, operator = "", ""
    domain: str | None = None
    inputs: tuple[tuple[str, ...], ...] = ()
    for line in text.splitlines():
        if found := _PROVIDER.match(line):
            provider = found[1]
        elif found := _DOMAIN.match(line):
            domain = _DOMAINS.get(found[1])
        elif provider and domain is not None and line.startswith("|") and line.count("|") == 5:
            _, name, parameters, versions, kinds, _ = line.split("|")
            if name:
                operator = name
                forms = parameters.split("<br><br>or<br><br>")
                inputs = tuple(tuple(map(_bare, _PARAMETER.findall(form))) for form in forms)
            if _holds(domain, operator, versions):
                types = {name: tuple(_TENSOR.findall(of)) for name, of in _TYPES.findall(kinds)}
                yield provider, domain, operator, Kernel(inputs, types)


def _bare(parameter: str) -> str:
    """`int64` where a parameter is one type, tensor(int64); else the name of its types."""
    found = _TENSOR.fullmatch(parameter)
    return found[1] if found else parameter


def _holds(domain: str, operator: str, versions: str) -> bool:
    """ONNX Runtime's own rule: the first version of an open range, any of a closed one."""
    found = _RANGE.match(versions)
    if found is None:
        return False
    try:
        since = onnx.defs.get_schema(operator, OPSET, domain).since_version if not domain else 1
    except onnx.defs.SchemaError:
        return False
    first, last = int(found[1]), int(found[2] or found[1])
    return first <= since <= last


if __name__ == "__main__":
    table = parse_table(Path(sys.argv[1]).read_text(), sys.argv[2])
    content = _ADAPTER.dump_python(table, mode="json")
    TABLE.write_text(json.dumps(content, separators=(",", ":")) + "\n")
