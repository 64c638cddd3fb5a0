"""The `pair` layout: one model for every mode, over one file of weights; no control flow."""

from __future__ import annotations

import onnx_ir as ir
import torch

from calicache.export.artifact.manifest import Attention
from calicache.export.artifact.names import STEP_INPUT, next_name
from calicache.export.layouts.onnx_graph import (
    ContentNames,
    InitializerPool,
    check_names,
    inline,
    output_names,
    own_outputs,
    pack,
    weight_nodes,
)
from calicache.export.translation.join import argument
from calicache.export.translation.translate import translate
from calicache.graph_passes.rewriting.compile import Compiled
from calicache.graph_passes.settings.choices import StepMode


def pair_models(
    compiled: Compiled, attention: Attention = Attention.FUSED
) -> dict[StepMode, ir.Model]:
    """One model for every mode of the schedule.

    The model's inputs, `step` where the mode reads weights of its step, and the kept values
    that the mode reads go in; the model's outputs come out, and what the mode keeps.
    A weight has one name in all models.

    Args:
        compiled: the variants.
        attention: what it is written with.

    Raises:
        ExportError: torch's exporter refuses a variant; its reason is passed on.
    """
    names = ContentNames()
    variants = sorted(compiled.variant_set.variants.items())
    models = translate({mode: variant.module for mode, variant in variants}, attention)
    return {mode: _mode_model(compiled, mode, model, names) for mode, model in models.items()}


def _mode_model(
    compiled: Compiled, mode: StepMode, model: ir.Model, names: ContentNames
) -> ir.Model:
    variant_set, signature = compiled.variant_set, compiled.analysis.binding.signature
    variant, slots = variant_set.variants[mode], variant_set.slots()
    arguments = [argument(spec.name, spec.shape, spec.torch_dtype) for spec in signature.tensors]
    kept = {
        name: argument(name, slots[name][0].shape, slots[name][0].dtype)
        for name in variant.reads
        if name in slots
    }
    results = list(output_names(compiled.captured))
    results += [next_name(name) for name in variant.writes]
    added = {STEP_INPUT: "the step", **dict.fromkeys([*slots, *results], "another value")}
    check_names(signature, added)
    own = (spec.name for spec in signature.tensors)
    pool = InitializerPool({*added, *own, *variant_set.tables}, names)
    step = argument(STEP_INPUT, (), torch.int64)
    tables = [name for name in variant_set.tables if name in variant.reads]
    looked_up = weight_nodes(variant_set, step, pool, tables)
    values = {**kept, **dict(zip(tables, (n.outputs[0] for n in looked_up), strict=True))}
    reads = [values[name] for name in variant.reads]
    nodes, outputs = inline(model, mode.name.lower(), [*arguments, *reads], pool)
    outputs = own_outputs(outputs, nodes, mode.name.lower())
    for value, name in zip(outputs, results, strict=True):
        value.name = name
    inputs = [*arguments, *([step] if tables else []), *kept.values()]
    return pack(mode.name.lower(), inputs, outputs, [*looked_up, *nodes], pool, model)
