"""Linear layers in fewer bits, as ONNX Runtime's own quantisers write them.

A layer at a time is handed to a quantiser, as a model of one product; what comes back takes the
layer's place. So a weight is quantised once for all graphs that use it, layers inside of If and
Loop are as any other, and nothing but the layers that are named changes.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper
from onnx_ir import convenience

from calicache.export.artifact.manifest import Attention, Precision
from calicache.export.translation.join import IR_VERSION, OPSET, initializer
from calicache.graph_passes.common.errors import ExportError

CONTRIB, CONTRIB_VERSION = "com.microsoft", 1
BLOCK = 32  # numbers of a weight with a scale of their own, along its inputs
ROWS, PRODUCT = "rows", "product"
PLAIN_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0}
BLOCKED = (Precision.WEIGHTS8, Precision.WEIGHTS4)
Quantiser = Callable[[onnx.ModelProto], onnx.ModelProto]


def check_precision(precision: Precision, attention: Attention) -> None:
    """Refuse operators of ONNX Runtime's own where they are not wished for.

    Raises:
        ExportError: the precision has no other.
    """
    if precision in BLOCKED and attention is Attention.STANDARD:
        raise ExportError(
            f"precision {precision}",
            expected="a precision in operators of ONNX alone, as attention='standard' has them",
            got="MatMulNBits, which is ONNX Runtime's own",
            fix="Choose float16 or int8, or export with attention='fused'.",
        )


def lower_precision(
    models: Iterable[ir.Model], precision: Precision, weights: Collection[str]
) -> None:
    """Write the linear layers of some weights in fewer bits, in place.

    Args:
        models: whose weights of one name are one tensor.
        precision: another than float32.
        weights: names of the initializers.

    Raises:
        ExportError: there is no such layer, one is not in float32, or a weight is used for
            something else.
    """
    layers = _Layers(precision)
    for model in models:
        _lower_model(model, weights, layers)
    if not layers.known:
        raise ExportError(
            f"precision {precision}",
            expected="linear layers in residual branches",
            got="none",
            fix="Leave precision out: there is nothing to write in fewer bits.",
        )


def _lower_model(model: ir.Model, weights: Collection[str], layers: _Layers) -> None:
    outer = model.graph
    named = {name: outer.initializers[name] for name in weights if name in outer.initializers}
    for name, weight in named.items():
        for node, place in weight.uses():
            if place != 1 or not _is_linear(node):
                raise ExportError(
                    f"{name} in {node.name}",
                    expected="a linear layer, which a quantiser can write in fewer bits",
                    got=f"{node.op_type} that reads the weight as input {place}",
                    fix="Exclude the layer from the plan (exclude=), or leave precision out.",
                )
    shared: dict[_Key, ir.Node] = {}
    lower = frozenset(named.values())
    for node in list(ir.traversal.RecursiveGraphIterator(outer)):
        if len(node.inputs) > 1 and node.inputs[1] in lower:
            _replace(node, outer, layers, shared)


def _is_linear(node: ir.Node) -> bool:
    if node.op_type == "MatMul":
        return True
    given = {name: node.attributes.get(name) for name in PLAIN_GEMM}
    return node.op_type == "Gemm" and all(
        one is None or one.value == PLAIN_GEMM[name] for name, one in given.items()
    )


_Key = tuple[ir.Graph, str, ir.Value]


def _replace(node: ir.Node, outer: ir.Graph, layers: _Layers, shared: dict[_Key, ir.Node]) -> None:
    """Put a layer's quantised form in its place.

    Args:
        node: a plain linear layer.
        outer: the outermost graph, which holds the weights.
        layers: the forms.
        shared: nodes that prepare an input, which other layers may read too.
    """
    source, weight, *bias = node.inputs
    (result,) = node.outputs
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    assert source is not None
    assert weight is not None
    form = layers.form(weight, turned=_is_turned(node)).clone()
    for name, value in list(form.initializers.items()):
        if name not in outer.initializers:
            outer.register_initializer(initializer(name, layers.tensors[name]))
        convenience.replace_all_uses_with(value, outer.initializers[name])
    (rows,), (product,) = form.inputs, form.outputs
    convenience.replace_all_uses_with(rows, source)
    form.outputs.clear()
    parts = list(form)
    form.remove(parts)
    if bias and bias[0] is not None:
        parts.append(ir.node("Add", [product, bias[0]]))
        (product,) = parts[-1].outputs
    for place, part in enumerate(parts):
        key = graph, part.op_type, source
        if tuple(part.inputs) == (source,) and shared.setdefault(key, part) is not part:
            convenience.replace_all_uses_with(part.outputs, shared[key].outputs)
            continue
        part.name = f"{node.name}/{part.op_type}_{place}"
        for number, value in enumerate(part.outputs):
            value.name = f"{part.name}/{number}"
        graph.insert_before(node, part)
        outer.opset_imports.setdefault(part.domain, CONTRIB_VERSION)
    product.name, product.type, product.shape = result.name, result.type, result.shape
    convenience.replace_all_uses_with(result, product, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _is_turned(node: ir.Node) -> bool:
    turned = node.attributes.get("transB")
    return turned is not None and bool(turned.value)


@dataclass(slots=True)
class _Layers:
    """The quantised forms of linear layers, each made once.

    Attributes:
        precision: of all.
        known: by name of the weight, and whether it lies turned around.
        tensors: that the forms read, by names that no other tensor has.
    """

    precision: Precision
    known: dict[tuple[str, bool], ir.Graph] = field(default_factory=dict)
    tensors: dict[str, ir.TensorProtocol] = field(default_factory=dict)

    def form(self, weight: ir.Value, *, turned: bool) -> ir.Graph:
        """Rows times a weight, without the bias.

        Raises:
            ExportError: the weight is not in float32.
        """
        name = str(weight.name)
        if (name, turned) not in self.known:
            assert weight.const_value is not None
            values = weight.const_value.numpy()
            if values.dtype != np.float32:
                raise ExportError(
                    f"precision {self.precision}",
                    expected="a model in float32",
                    got=f"{name} in {values.dtype}",
                    fix="Leave precision out: the layers stay as they were recorded. Or record and "
                    "plan the model in float32.",
                )
            matrix = np.ascontiguousarray(values.T if turned else values)
            own = f"{name}/{self.precision}"
            model = QUANTISERS[self.precision](_product(matrix, own))
            graph = ir.from_proto(model).graph
            graph.sort()
            self.known[name, turned] = graph
            for key, value in graph.initializers.items():
                assert value.const_value is not None
                self.tensors[key] = value.const_value
        return self.known[name, turned]


def _product(matrix: np.ndarray, name: str) -> onnx.ModelProto:
    """A model of one product with a weight (in, out)."""
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", [ROWS, name], [PRODUCT], name=name)],
        "layer",
        [helper.make_tensor_value_info(ROWS, kind, ["rows", matrix.shape[0]])],
        [helper.make_tensor_value_info(PRODUCT, kind, ["rows", matrix.shape[1]])],
        [numpy_helper.from_array(matrix, name)],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opsets)


def _in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights and product in float16, between casts."""
    with _logging_as_found():
        from onnxruntime.transformers.float16 import convert_float_to_float16

    half: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True)
    return half


def _in_integers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights of 7 bits with a scale for every output, rows of 8 bits with one for them all.

    Processors without VNNI add two products in 16 bits, which 8 bits of weights would overflow.
    """
    with _logging_as_found():
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    add_pre_process_metadata(model)  # or it asks for it
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "layer.onnx"
        quantize_dynamic(
            model, file, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8
        )
        return onnx.load(file)


def _weights_of(bits: int) -> Quantiser:
    """Weights alone of so many bits, with a scale for every block of inputs of an output."""

    def quantise(model: onnx.ModelProto) -> onnx.ModelProto:
        with _logging_as_found():
            from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantiser = MatMulNBitsQuantizer(
            model, bits=bits, block_size=BLOCK, is_symmetric=bits == 8, accuracy_level=1
        )
        quantiser.process()
        quantised: onnx.ModelProto = quantiser.model.model
        return quantised

    return quantise


QUANTISERS: Mapping[Precision, Quantiser] = {
    Precision.FLOAT16: _in_half,
    Precision.INT8: _in_integers,
    Precision.WEIGHTS8: _weights_of(8),
    Precision.WEIGHTS4: _weights_of(4),
}


@contextmanager
def _logging_as_found() -> Iterator[None]:
    """Undo what ONNX Runtime's tools do to the root logger when they are loaded."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
