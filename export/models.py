"""The ONNX models of an artifact, for the recorded sizes or for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from calicache.export.artifact.manifest import (
    MODEL_FILE,
    Attention,
    Layout,
    Precision,
    model_file,
)
from calicache.export.artifact.open_sizes import Axis, OpenSize
from calicache.export.layouts.onnx_graph import settle_constants
from calicache.export.layouts.open_model import open_model
from calicache.export.layouts.pair import pair_models
from calicache.export.layouts.sampler import noise_spec, sampler_model
from calicache.export.layouts.step import step_model
from calicache.export.session.runtime import onnx_runtime
from calicache.export.sizes import (
    at_sizes,
    at_words,
    check_operations,
    open_axes,
    open_sizes,
    points_of,
    refused,
    tables_at,
)
from calicache.export.translation.precision import lower_precision
from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.common.errors import CalicacheError, reason_of
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
        dynamic: sizes that are left open.
        precision: of the linear layers in residual branches.
    """

    layout: Layout
    attention: Attention
    tables: SamplerTables | None
    dynamic: tuple[Axis, ...]
    precision: Precision = Precision.FLOAT32


def make_models(optimized: OptimizedModel, wishes: Wishes) -> tuple[Models, OpenSizes]:
    """The models of a layout by the names of their files, and which of their sizes are open.

    Raises:
        ExportError: an operation has no ONNX form, or is made for one size that is to be open.
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
    """What steps keep."""
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
    samples = 1 if tables is None else tables.parts // optimized.plan.binding.calls
    axes = open_axes(optimized, wishes.dynamic, samples)
    points = points_of(optimized, axes)
    models_by_point: list[Models] = []
    forms: list[tuple[TensorSpec, ...]] = []
    others = [at_sizes(optimized, axes, sizes) for sizes in points]
    alone = [at_sizes(optimized, axes, {axis: 1}) for axis in axes.axes if axis is Axis.BATCH]
    check_operations(optimized, [*alone, *others])
    for sizes, other in zip(points, others, strict=True):
        compiled = compiled_for(other, wishes.layout)
        inputs = compiled.analysis.binding.signature.tensors
        own = tables and tables_at(tables, inputs)
        batch = sizes.get(Axis.BATCH, 1)
        try:
            models_by_point.append(_models(compiled, replace(wishes, tables=own), batch))
        except CalicacheError:
            raise
        except Exception as error:  # sizes that the recorded calls do not have, such as none left
            raise refused(f"{at_words(sizes)}: {reason_of(error)}") from error
        noise = () if own is None else (noise_spec(compiled, own),)
        forms.append((*inputs, *cache_specs(compiled.variant_set), *noise))
    names = models_by_point[0]
    models = {
        name: open_model([models[name] for models in models_by_point], points) for name in names
    }
    return models, open_sizes(forms, points)
