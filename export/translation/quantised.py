"""Calibration branches in integers, in ONNX: the operations that torch.onnx does not know.

Levels are of 8 bits without a sign, weights of 7 bits with one: that product ONNX Runtime has fast
kernels for on every processor, and none that saturates. Its own operator scales the sums while they
are at hand; standard ones take two more passes over the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from calicache.export.artifact.manifest import Attention
from calicache.export.translation.forms import Form, value_of
from calicache.export.translation.join import IR_VERSION, OPSET, argument, initializer
from calicache.graph_passes.graph.operations import (
    LEAST_SCALE,
    ROW_LEVELS,
    ZERO_LEVEL,
    quantise,
    quantised_product,
    token_scales,
)

CONTRIB = "com.microsoft"
Template = Callable[[Form], ir.Model]


def _token_scales(form: Form) -> ir.Model:
    """max(max, -min) of every token, in levels: one pass less than by magnitudes."""
    new = _Nodes(form)
    (rows,) = new.inputs
    last = new.number("last", np.array([-1], np.int64))
    high = new.node("ReduceMax", [rows, last])
    low = new.node("Neg", [new.node("ReduceMin", [rows, last])])
    peak = new.node("Max", [high, low])
    scale = new.node("Mul", [peak, new.number("level", np.array(1 / ROW_LEVELS, np.float32))])
    least = new.number("least", np.array(LEAST_SCALE, np.float32))
    return new.model(new.node("Max", [scale, least]))


def _quantise(form: Form) -> ir.Model:
    new = _Nodes(form)
    rows, scales = new.inputs
    zeros = np.full(len(value_of(form.tensors[0], form.module)), ZERO_LEVEL, np.uint8)
    flat = new.node("Reshape", [scales, new.number("flat", np.array([-1], np.int64))])
    return new.model(new.node("QuantizeLinear", [rows, flat, new.number("zero", zeros)], axis=0))


def _quantised_product(form: Form) -> ir.Model:
    new = _Nodes(form)
    levels, scales, weight, weight_scales = new.inputs
    zero = new.number("zero", np.array(ZERO_LEVEL, np.uint8))
    one = new.number("one", np.array(1, np.float32))
    product = new.node(
        "MatMulIntegerToFloat", [levels, weight, one, weight_scales, zero], domain=CONTRIB
    )
    return new.model(new.node("Mul", [product, scales]))


def _standard_product(form: Form) -> ir.Model:
    new = _Nodes(form)
    levels, scales, weight, weight_scales = new.inputs
    zero = new.number("zero", np.array(ZERO_LEVEL, np.uint8))
    sums = new.node("MatMulInteger", [levels, weight, zero])
    product = new.node("Mul", [new.node("Cast", [sums], to=ir.DataType.FLOAT), weight_scales])
    return new.model(new.node("Mul", [product, scales]))


_SHARED: Mapping[Any, Template] = {token_scales: _token_scales, quantise: _quantise}
OWN_TEMPLATES: Mapping[Attention, Mapping[Any, Template]] = {
    Attention.FUSED: {**_SHARED, quantised_product: _quantised_product},
    Attention.STANDARD: {**_SHARED, quantised_product: _standard_product},
}


class _Nodes:
    """The nodes of one template."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.nodes: list[ir.Node] = []
        self.numbers: list[ir.Value] = []
        self.inputs: list[ir.Value] = []
        for place, source in enumerate(form.tensors):
            value = value_of(source, form.module)
            self.inputs.append(argument(f"value_{place}", value.shape, value.dtype))

    def number(self, name: str, value: np.ndarray) -> ir.Value:
        """Numbers of the operation itself."""
        self.numbers.append(initializer(name, ir.tensor(value, name=name)))
        return self.numbers[-1]

    def node(
        self, operator: str, inputs: Sequence[ir.Value], *, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """The result of an operator."""
        self.nodes.append(ir.node(operator, inputs, attributes, domain=domain))
        return self.nodes[-1].outputs[0]

    def model(self, result: ir.Value) -> ir.Model:
        """The finished template."""
        value = self.form.node.meta["val"]
        form = argument("result", value.shape, value.dtype)
        result.type, result.shape = form.type, form.shape
        graph = ir.Graph(
            self.inputs,
            [result],
            nodes=self.nodes,
            initializers=self.numbers,
            opset_imports={"": OPSET, CONTRIB: 1},
            name="template",
        )
        return ir.Model(graph, ir_version=IR_VERSION)
