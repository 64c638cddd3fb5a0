"""The ONNX models of an artifact, for the recorded sizes or for every batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from calicache.export.artifact.manifest import (
    MODEL_FILE,
    Attention,
    Layout,
    OpenSize,
    Precision,
    model_file,
)
from calicache.export.batches import at_rows, check_operations, open_sizes, tables_at, two_sizes
from calicache.export.layouts.onnx_graph import settle_constants
from calicache.export.layouts.open_batch import open_batch
from calicache.export.layouts.pair import pair_models
from calicache.export.layouts.sampler import noise_spec, sampler_model
from calicache.export.layouts.step import step_model
from calicache.export.session.runtime import onnx_runtime
from calicache.export.translation.precision import lower_precision
from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.rewriting.compile import Compiled
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.sampler.tables import SamplerTables

Models = dict[str, ir.Model]
OpenSizes = Mapping[str, tuple[OpenSize, ...]]


@dataclass(frozen=True, slots=True)
class Wishes:
    """How models are written.

    Attributes:
        layout: how the variants are packed.
        attention: what it is written with.
        tables: of the `sampler` layout alone.
        dynamic: whether the batch is left open.
        precision: of the linear layers in residual branches.
    """

    layout: Layout
    attention: Attention
    tables: SamplerTables | None
    dynamic: bool
    precision: Precision = Precision.FLOAT32


def make_models(optimized: OptimizedModel, wishes: Wishes) -> tuple[Models, OpenSizes]:
    """The models of a layout by the names of their files, and which of their sizes are open.

    Raises:
        ExportError: an operation has no ONNX form, or is made for one batch size.
    """
    if wishes.dynamic:
        models, sizes = _open_models(optimized, wishes)
    else:
        models, sizes = _models(compiled_for(optimized, wishes.layout), wishes), {}
    if wishes.precision is not Precision.FLOAT32:
        onnx_runtime()  # says what to install
        sites = optimized.compiled.analysis.sites.linears
        lower_precision(models.values(), wishes.precision, {site.weight for site in sites})
    for model in models.values():
        settle_constants(model)
    return models, sizes


def compiled_for(optimized: OptimizedModel, layout: Layout) -> Compiled:
    """The graphs that a layout packs."""
    return (optimized.by_step() if layout is Layout.SAMPLER else optimized).compiled


def cache_specs(variant_set: VariantSet) -> tuple[TensorSpec, ...]:
    """What a REFRESH step keeps."""
    return tuple(
        TensorSpec(cache.name, cache.shape, str(cache.dtype).removeprefix("torch."))
        for cache in variant_set.caches
    )


def _models(compiled: Compiled, wishes: Wishes, samples: int = 1) -> Models:
    layout, attention = wishes.layout, wishes.attention
    if layout is Layout.PAIR:
        models = pair_models(compiled, attention)
        return {model_file(layout, mode): model for mode, model in models.items()}
    if wishes.tables is None:
        return {MODEL_FILE: step_model(compiled, attention)}
    return {MODEL_FILE: sampler_model(compiled, wishes.tables, attention, samples)}


def _open_models(optimized: OptimizedModel, wishes: Wishes) -> tuple[Models, OpenSizes]:
    tables = wishes.tables
    rows = 1 if tables is None else tables.parts // optimized.plan.binding.calls  # of a sample
    sizes = two_sizes(optimized, rows)
    made: list[Models] = []
    specs: list[tuple[TensorSpec, ...]] = []
    others = [at_rows(optimized, size * rows) for size in sizes]
    check_operations(optimized, [at_rows(optimized, rows), *others])
    for size, other in zip(sizes, others, strict=True):
        compiled = compiled_for(other, wishes.layout)
        inputs = compiled.analysis.binding.signature.tensors
        own = tables and tables_at(tables, inputs)
        made.append(_models(compiled, replace(wishes, tables=own), size))
        noise = () if own is None else (noise_spec(compiled, own),)
        specs.append((*inputs, *cache_specs(compiled.variant_set), *noise))
    one, two = made
    models = {name: open_batch(one[name], two[name], sizes) for name in one}
    return models, open_sizes(specs[0], specs[1], sizes[0])
