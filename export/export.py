"""An artifact: a folder with the ONNX model, its weights, its graphs and a manifest of all."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

from calicache.export.artifact.graph_file import write_graphs
from calicache.export.artifact.manifest import (
    FORMAT,
    MODEL_FILE,
    WEIGHTS_FILE,
    FileRecord,
    Layout,
    Manifest,
    ModeRecord,
    SamplerRecord,
    TargetRecord,
    model_file,
    write_manifest,
)
from calicache.export.layouts.onnx_graph import output_names
from calicache.export.layouts.pair import pair_models, shared_weights
from calicache.export.layouts.sampler import noise_spec, run_specs, sampler_model
from calicache.export.layouts.step import step_model
from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.common.errors import ExportError
from calicache.graph_passes.common.files import atomic_path
from calicache.graph_passes.common.hashing import sha256_of
from calicache.graph_passes.describe.graphs import view_graphs
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.recording.timestep import calls_of
from calicache.graph_passes.sampler.tables import SamplerTables
from calicache.graph_passes.settings.choices import StepMode


def export_onnx(
    optimized: OptimizedModel,
    path: Path | str,
    *,
    layout: Layout | str = Layout.STEP,
    sampler: SamplerTables | None = None,
) -> Manifest:
    """Write an optimised model as an artifact folder; an existing one is replaced.

    Args:
        optimized: from `optimize`.
        path: the folder, such as `dit.onnx.d`.
        layout: `step`, `pair` or `sampler`.
        sampler: for the `sampler` layout alone, from `read_sampler`; None takes the plan's own.
            All calls of a step are one batch there.

    Raises:
        ExportError: an unknown layout, no sampler where one is needed, or one where none is, or
            torch.onnx refuses an op.
    """
    layout = _layout(layout)
    tables = _sampler(optimized, layout, sampler)
    form = optimized.by_step() if layout is Layout.SAMPLER else optimized
    with atomic_path(Path(path)) as folder:
        folder.mkdir()
        if layout is Layout.PAIR:
            _save_pair(pair_models(form), folder)
        else:
            model = step_model(form) if tables is None else sampler_model(form, tables)
            ir.save(model, folder / MODEL_FILE, external_data=WEIGHTS_FILE)
        write_graphs(view_graphs(form.compiled.captured, form.compiled.variant_set), folder)
        names = sorted(file.name for file in folder.iterdir())
        files = tuple(
            FileRecord(name, (folder / name).stat().st_size, sha256_of(folder / name))
            for name in names
        )
        manifest = _manifest(form, layout, files, tables)
        write_manifest(manifest, folder)
    return manifest


def _layout(layout: Layout | str) -> Layout:
    if layout not in set(Layout):
        raise ExportError(
            "layout", expected=" | ".join(Layout), got=repr(layout), fix="Choose one of these."
        )
    return Layout(layout)


def _sampler(
    optimized: OptimizedModel, layout: Layout, sampler: SamplerTables | None
) -> SamplerTables | None:
    """What the `sampler` layout does between two calls; None for the other layouts."""
    plan = optimized.plan
    if layout is not Layout.SAMPLER:
        if sampler is not None:
            raise ExportError(
                "sampler",
                expected=f"none for the layout {layout.value}",
                got="one",
                fix="Leave it out, or export with layout='sampler'.",
            )
        return None
    tables = plan.sampler if sampler is None else sampler
    if tables is None:
        raise ExportError(
            "sampler",
            expected="a plan that knows its sampler",
            got=plan.no_sampler,
            fix="Pass sampler=read_sampler(optimized, recording), or plan with correct=True and "
            "end every recorded run with recording.finish(latents).",
        )
    if len(tables.updates) != len(plan.schedule):
        raise ExportError(
            "sampler",
            expected=f"one of the plan's {len(plan.schedule)} steps",
            got=str(len(tables.updates)),
            fix="Read the sampler with this optimised model and its recording.",
        )
    return tables


def _save_pair(models: dict[StepMode, ir.Model], folder: Path) -> None:
    """Write every model, and what they share once."""
    weights = shared_weights(models)
    tensors = list(weights.values())
    written = ir.external_data.convert_tensors_to_external(tensors, folder, WEIGHTS_FILE)
    outside = dict(zip(weights, written, strict=True))
    for mode, model in models.items():
        for name, value in model.graph.initializers.items():
            value.const_value = outside.get(name, value.const_value)
        ir.save(model, folder / model_file(Layout.PAIR, mode))


def _manifest(
    optimized: OptimizedModel,
    layout: Layout,
    files: tuple[FileRecord, ...],
    sampler: SamplerTables | None,
) -> Manifest:
    plan, compiled = optimized.plan, optimized.compiled
    recipe, binding, cost = plan.recipe, plan.binding, compiled.cost
    caches = optimized.compiled.variant_set.caches
    return Manifest(
        format=FORMAT,
        calicache=version("calicache"),
        layout=layout,
        files=files,
        schedule=recipe.schedule,
        rank=recipe.rank,
        order=recipe.order,
        weighting=recipe.weighting,
        output_weights=recipe.outputs,
        correction=recipe.correction,
        weights_hash=binding.weights_hash,
        inputs=binding.signature.tensors,
        calls_per_step=calls_of(binding.timestep),
        fixed=compiled.analysis.fixed,
        outputs=output_names(optimized),
        caches=tuple(
            TensorSpec(cache.name, cache.shape, str(cache.dtype).removeprefix("torch."))
            for cache in caches
        ),
        history=optimized.compiled.variant_set.history,
        cache_bytes=cost.cache_bytes,
        plain_macs=cost.plain_macs,
        modes=tuple(
            ModeRecord(mode, cost.modes[mode], _kept_reads(optimized, mode))
            for mode in sorted(optimized.compiled.variant_set.variants)
        ),
        targets=_target_records(optimized),
        branches=tuple(branch.name for branch in optimized.compiled.analysis.sites.branches),
        rejections=optimized.compiled.rejections,
        sampler=None if sampler is None else _sampler_record(optimized, sampler),
        front=optimized.plan.front,
    )


def _sampler_record(optimized: OptimizedModel, sampler: SamplerTables) -> SamplerRecord:
    return SamplerRecord(
        noise=noise_spec(optimized, sampler),
        inputs=run_specs(optimized, sampler),
        parts=sampler.parts,
        conditional=sampler.conditional,
        guidance=sampler.guidance,
        scale=sampler.scales[0],
    )


def _kept_reads(optimized: OptimizedModel, mode: StepMode) -> tuple[str, ...]:
    variant_set = optimized.compiled.variant_set
    return tuple(
        name for name in variant_set.variants[mode].reads if name not in variant_set.tables
    )


def _target_records(optimized: OptimizedModel) -> tuple[TargetRecord, ...]:
    records = []
    for target in optimized.compiled.targets:
        cost, factors = (
            optimized.compiled.cost.targets[target.name],
            optimized.compiled.factors.get(target.name),
        )
        records.append(
            TargetRecord(
                name=target.name,
                granularity=target.granularity,
                sites=target.sites,
                in_features=target.in_features,
                out_features=target.out_features,
                rank=target.rank,
                energy=factors.energy if factors else None,
                kept=factors.kept_energy() if factors else {},
                full_macs=cost.full_macs,
                calibrate_macs=cost.calibrate_macs,
                full_bytes=cost.full_bytes,
                factor_bytes=cost.factor_bytes,
                cache_bytes=cost.cache_bytes,
            )
        )
    return tuple(records)
