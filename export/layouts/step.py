"""The `step` layout: one model whose `If` picks the variant of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch

from calicache.export.artifact.manifest import Attention
from calicache.export.artifact.names import STEP_INPUT, next_name
from calicache.export.layouts.onnx_graph import (
    LOOK_UP_NAMES,
    InitializerPool,
    check_names,
    choose_by_mode,
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
from calicache.graph_passes.rewriting.variants import Variant
from calicache.graph_passes.settings.choices import StepMode


def step_model(compiled: Compiled, attention: Attention = Attention.FUSED) -> ir.Model:
    """Pack the variants in the `step` layout.

    The model's inputs, `step` (int64 scalar) and the kept values of every cache go in; the
    model's outputs and the caches' newest values come out. Where a step keeps none of a cache,
    that is the one that went in, so that all branches of the `If` have results of one form.

    Args:
        compiled: the variants.
        attention: what it is written with.

    Raises:
        ExportError: torch's exporter refuses a variant; its reason is passed on.
    """
    variant_set, signature = compiled.variant_set, compiled.analysis.binding.signature
    arguments = [argument(spec.name, spec.shape, spec.torch_dtype) for spec in signature.tensors]
    step = argument(STEP_INPUT, (), torch.int64)
    slots = {
        name: argument(name, cache.shape, cache.dtype)
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
    modules = {mode: variant.module for mode, variant in sorted(variant_set.variants.items())}
    newest = {cache.name: slots[cache.name] for cache in variant_set.caches}
    for mode, model in translate(modules, attention).items():
        variant = variant_set.variants[mode]
        reads = [values[name] for name in variant.reads]
        branches[mode] = _branch(model, variant, [*arguments, *reads], pool, newest)
    body = choose_by_mode(branches, step, compiled.recipe.schedule, pool)
    outputs = list(body.outputs)
    for value, name in zip(outputs, results, strict=True):
        value.name = name
    inputs = [*arguments, step, *slots.values()]
    return pack("step", inputs, outputs, [*weights, *take_nodes(body)], pool, model)


def _branch(
    model: ir.Model,
    variant: Variant,
    inputs: Sequence[ir.Value],
    pool: InitializerPool,
    newest: Mapping[str, ir.Value],
) -> ir.Graph:
    """A variant as the body of an `If`: inputs and weights come from the outer graph.

    Args:
        model: the variant in ONNX.
        variant: the same, which says what it keeps.
        inputs: of it, from the outer graph.
        pool: the outer graph's initializers.
        newest: values of all caches before the step.
    """
    prefix = variant.mode.name.lower()
    nodes, results = inline(model, prefix, inputs, pool)
    outputs, kept = results[: len(results) - len(variant.writes)], variant.writes
    after = {**newest, **dict(zip(kept, results[len(outputs) :], strict=True))}
    own = own_outputs([*outputs, *after.values()], nodes, prefix)
    return ir.Graph([], own, nodes=nodes, name=prefix)
