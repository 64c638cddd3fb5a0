"""The `step` layout: one model whose `If` picks the variant of a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from calicache.export.artifact.names import STEP_INPUT, next_name
from calicache.export.layouts.onnx_graph import (
    LOOK_UP_NAMES,
    InitializerPool,
    check_names,
    choose_by_mode,
    describe,
    inline,
    output_names,
    own_outputs,
    pack,
    take_nodes,
    weight_nodes,
)
from calicache.export.translation.join import argument
from calicache.export.translation.translate import translate
from calicache.graph_passes.rewriting.compile import Compiled
from calicache.graph_passes.rewriting.variants import CacheSpec
from calicache.graph_passes.settings.choices import StepMode


def step_model(compiled: Compiled) -> ir.Model:
    """Pack the variants in the `step` layout.

    The model's inputs, `step` (int64 scalar) and the kept refreshes of every cache go in; the
    model's outputs and the caches' new values come out.
    On a step that is not REFRESH the new values have zero size: the caller keeps the old ones.
    Refreshes that a step's mode does not read may have zero size, see `Manifest.reads`.

    Raises:
        ExportError: torch's exporter refuses a variant; its reason is passed on.
    """
    variant_set, signature = compiled.variant_set, compiled.analysis.binding.signature
    arguments = [argument(spec.name, spec.shape, spec.torch_dtype) for spec in signature.tensors]
    step = argument(STEP_INPUT, (), torch.int64)
    slots = {
        name: argument(name, (f"{name}_size", *cache.shape[1:]), cache.dtype)
        for name, (cache, _) in variant_set.slots().items()
    }
    results = [*output_names(compiled.captured)]
    results += [next_name(cache.name) for cache in variant_set.caches]
    added = {STEP_INPUT: "the step", **dict.fromkeys([*slots, *results], "another value")}
    check_names(signature, added)
    own = (spec.name for spec in signature.tensors)
    pool = InitializerPool({*added, *own, *LOOK_UP_NAMES, *variant_set.tables})
    weights = weight_nodes(variant_set, step, pool)
    values = {
        **slots,
        **dict(zip(variant_set.tables, (n.outputs[0] for n in weights), strict=True)),
    }
    branches: dict[StepMode, ir.Graph] = {}
    models = translate(
        {mode: variant.module for mode, variant in sorted(variant_set.variants.items())}
    )
    for mode, model in models.items():
        reads = [values[name] for name in variant_set.variants[mode].reads]
        branches[mode] = _branch(model, mode, [*arguments, *reads], pool, variant_set.caches)
    body = choose_by_mode(branches, step, compiled.recipe.schedule, pool)
    outputs = list(body.outputs)
    for value, name in zip(outputs, results, strict=True):
        value.name = name
    inputs = [*arguments, step, *slots.values()]
    return pack("step", inputs, outputs, [*weights, *take_nodes(body)], pool, model)


def _branch(
    model: ir.Model,
    mode: StepMode,
    inputs: Sequence[ir.Value],
    pool: InitializerPool,
    caches: Sequence[CacheSpec],
) -> ir.Graph:
    """A variant as the body of an `If`: inputs and weights come from the outer graph."""
    prefix = mode.name.lower()
    nodes, results = inline(model, prefix, inputs, pool)
    if mode is not StepMode.REFRESH:
        empties = [_empty_cache(cache, prefix) for cache in caches]
        nodes += empties
        results += [node.outputs[0] for node in empties]
    return ir.Graph([], own_outputs(results, nodes, prefix), nodes=nodes, name=prefix)


def _empty_cache(cache: CacheSpec, prefix: str) -> ir.Node:
    shape = (0, *cache.shape[1:])
    dtype = tensor_adapters.from_torch_dtype(cache.dtype)
    tensor = ir.tensor(np.zeros(shape, dtype.numpy()), dtype=dtype)
    name = f"{prefix}/{cache.name}_empty"
    node = ir.node("Constant", [], {"value": tensor}, name=name)
    describe(node, name, dtype, ir.Shape(shape))
    return node
