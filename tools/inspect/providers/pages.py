"""Reading what ONNX Runtime and its providers publish of their kernels.

Every provider has a page of its own kind; each function reads one kind and yields operators with
their kernels, those of the opset that calicache exports.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache

import onnx.defs

from calicache.tools.inspect.providers.tables import OPSET, Kernel, operator_name

Row = tuple[str, Kernel]

_CONTRIB = "com.microsoft"
_DOMAINS = {"ai.onnx": "", _CONTRIB: _CONTRIB, "kOnnxDomain": "", "kMSDomain": _CONTRIB}
_TENSOR = re.compile(r"(?<!\()tensor\((\w+)\)")  # not those in sequences and optional values
_COMMENT = re.compile(r"//.*")

# OperatorKernels.md
_PROVIDER = re.compile(r"^## Operators implemented by (\w+)")
_DOMAIN = re.compile(r"^\|\*\*Operator Domain:\*\* \*([\w.]+)\*")
_PARAMETER = re.compile(r"\*in\* \w+:\*\*([^*]+)\*\*")
_TYPES = re.compile(r"\*\*(\w+)\*\* = ([^*<]+)")
_RANGE = re.compile(r"^\[?(\d+)(?:, (\d+)\])?(\+?)$")
# Tables of operators and notes
_NOTED = re.compile(r"^\|(ai\.onnx|com\.microsoft)[:.](\w+)\|(.*)\|$", re.MULTILINE)
_MATRIX_TYPES = {"fp4": "float4e2m1", "fp8": "float8e4m3fn", "fp16": "float16", "fp32": "float"}
_MATRIX_TYPES |= {"bf16": "bfloat16"}
# Sources that register kernels
_CLASS = re.compile(
    r"KERNEL_CLASS_NAME\(kWebGpuExecutionProvider, (\w+), (\d+)(?:, (\d+))?(?:, [A-Za-z]\w*)?,"
    r" (\w+)\)"
)
_INFO = re.compile(r"KERNEL_CREATE_INFO(?:_VERSIONED)?\((\d+)(?:, (\d+))?, (\w+)\)")
_CREATED = re.compile(r"Create([A-Z]\w+?)(?:Versioned)?KernelInfo\((\d+)(?:, (\d+))?, \w+\)")
_BINARY = re.compile(r'RegisterBinaryOp\(\w+, "(\w+)",[^{]*\{(.*)\}')
_BOUNDS = re.compile(r"\{(\d+), (?:(\d+)|[\w:]+)\}")
_GENERATED = re.compile(r"\bRegister(\w+)Kernels\(\*")
# data_ops.cc
_SUPPORTED = re.compile(r'^ *\{"(\w+)", V_\w+, \{([^}]+)\}\},', re.MULTILINE)
_SUPPORTED_TYPES = re.compile(
    r"supported_types_(cpu|gpu)_\.insert\(\s*std::make_pair\(\w+,[\w\s:]+DataType_(\w+)\)\)"
)


def read_operator_kernels(text: str, provider: str) -> Iterator[Row]:
    """Of one provider in ONNX Runtime's `docs/OperatorKernels.md`: CPU, CUDA and DirectML."""
    section, operator = "", ""
    domain: str | None = None
    inputs: tuple[tuple[str, ...], ...] = ()
    for line in text.splitlines():
        if found := _PROVIDER.match(line):
            section = found[1]
        elif found := _DOMAIN.match(line):
            domain = _DOMAINS.get(found[1])
        elif section == provider and domain is not None and line.count("|") == 5:
            _, name, parameters, versions, kinds, _ = line.split("|")
            if name:
                operator = name
                forms = parameters.split("<br><br>or<br><br>")
                inputs = tuple(tuple(map(_bare, _PARAMETER.findall(form))) for form in forms)
            bounds = _RANGE.match(versions)
            if bounds and _holds(domain, operator, bounds[1], bounds[2]):
                types = {name: tuple(_TENSOR.findall(of)) for name, of in _TYPES.findall(kinds)}
                yield operator_name(domain, operator), Kernel(inputs, types)


def read_notes(text: str) -> Iterator[Row]:
    """Of a table of operators and notes: CoreML's and QNN's."""
    for domain, written, note in _NOTED.findall(text):
        name = operator_name(_CONTRIB, written) if _DOMAINS[domain] else _onnx_name(written)
        if name:
            yield name, Kernel(note=_plain(note))


def read_matrix(text: str) -> Iterator[Row]:
    """Of onnx-tensorrt's `docs/operators.md`, which names types of operators, not of inputs."""
    for line in text.splitlines():
        operator, supported, kinds, note, *_ = (
            *map(str.strip, line.split("|")[1:]),
            "",
            "",
            "",
            "",
        )
        name = _onnx_name(operator)
        if name and supported.startswith("Y"):
            named = [kind.strip().lower() for kind in kinds.split(",") if kind.strip()]
            types = tuple(_MATRIX_TYPES.get(kind, kind) for kind in named)
            yield name, Kernel(_typed_inputs(name, types), {"T": types}, _plain(note))


def read_registrations(text: str) -> Iterator[Row]:
    """Of the C++ sources in which the WebGPU provider registers its kernels, one after another."""
    code = _COMMENT.sub("", text)
    found = [*_CLASS.findall(code)]
    found += [("kOnnxDomain", *bounds, name) for *bounds, name in _INFO.findall(code)]
    found += [("kOnnxDomain", *bounds, name) for name, *bounds in _CREATED.findall(code)]
    for name, ranges in _BINARY.findall(code):
        found += [("kOnnxDomain", *bounds, name) for bounds in _BOUNDS.findall(f"{{{ranges}}}")]
    # Some functions register one operator at its own version.
    found += [("kOnnxDomain", str(_since(name)), "", name) for name in _GENERATED.findall(code)]
    for symbol, first, last, operator in found:
        domain = _DOMAINS.get(symbol)
        if domain is not None and _holds(domain, operator, first, last):
            yield operator_name(domain, operator), Kernel()


def read_supported(text: str) -> Iterator[Row]:
    """Of the OpenVINO provider's `data_ops.cc`, with a note where one device alone has one."""
    devices: dict[str, set[str]] = {}
    for name, listed in _SUPPORTED.findall(_COMMENT.sub("", text)):
        devices.setdefault(name, set()).update(re.findall(r"\w+", listed))
    for written, where in devices.items():
        note = "" if where >= {"CPU", "GPU"} else f"{', '.join(sorted(where))} alone"
        # The provider looks at names alone; what ONNX does not have is one of ONNX Runtime's own.
        name = _onnx_name(written) or operator_name(_CONTRIB, written)
        yield name, Kernel(note=note)


def read_supported_types(text: str) -> tuple[str, ...]:
    """Of the same file: the types of values that both devices, CPU and GPU, take."""
    kinds: dict[str, set[str]] = {"cpu": set(), "gpu": set()}
    for device, kind in _SUPPORTED_TYPES.findall(text):
        kinds[device].add(kind.lower())
    return tuple(sorted(kinds["cpu"] & kinds["gpu"]))


def _bare(parameter: str) -> str:
    """`int64` where a parameter is one type, tensor(int64); else the name of its types."""
    found = _TENSOR.fullmatch(parameter)
    return found[1] if found else parameter


def _plain(note: str) -> str:
    """Without marks and line breaks."""
    return " ".join(re.sub(r"<br ?/>", " ", note).replace("`", "").split())


def _holds(domain: str, operator: str, first: str, last: str | None) -> bool:
    """ONNX Runtime's own rule: the first version of an open range, any of a closed one."""
    since = 1 if domain else _since(operator)
    return since > 0 and int(first) <= since <= int(last or first)


def _since(operator: str) -> int:
    """The version in the opset that calicache exports; 0 where ONNX has no such operator."""
    try:
        return int(onnx.defs.get_schema(operator, OPSET, "").since_version)
    except onnx.defs.SchemaError:
        return 0


@cache
def _names() -> dict[str, str]:
    return {schema.name.casefold(): schema.name for schema in onnx.defs.get_all_schemas()}


def _onnx_name(written: str) -> str:
    """As ONNX spells an operator that a page spells `Argmax`; '' where the opset has none."""
    name = _names().get(written.casefold(), "")
    return name if _since(name) else ""


def _typed_inputs(operator: str, types: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """For a page that names types of an operator: which of its inputs have them.

    Those of the type of the first output, such as the values of a Gather and not its indices;
    or of the first input, such as what an Equal compares. None of them, where ONNX allows that
    input none of the types.
    """
    schema = onnx.defs.get_schema(operator, OPSET, "")
    kinds = [parameter.type_str for parameter in schema.inputs]
    output = schema.outputs[0].type_str
    said = output if output in kinds else next(iter(kinds), "")
    allowed = {
        _bare(kind)
        for constraint in schema.type_constraints
        if constraint.type_param_str == said
        for kind in constraint.allowed_type_strs
    }
    typed = bool(allowed.intersection(types))
    return (tuple("T" if typed and kind == said else "" for kind in kinds),)
