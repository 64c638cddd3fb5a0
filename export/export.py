"""An artifact: a folder with the ONNX model, its weights, its graphs and a manifest of all."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import onnx_ir as ir

from calicache.export.artifact.folder import ARTIFACT
from calicache.export.artifact.graph_file import write_graphs
from calicache.export.artifact.manifest import (
    FORMAT,
    WEIGHTS_FILE,
    Attention,
    FileRecord,
    Layout,
    Manifest,
    ModeRecord,
    Precision,
    SamplerRecord,
    TargetRecord,
    write_manifest,
)
from calicache.export.artifact.open_sizes import Axis
from calicache.export.artifact.weights import WeightFile, place_outside, plan_weight_file
from calicache.export.layouts.onnx_graph import output_names
from calicache.export.layouts.sampler import noise_spec, run_specs
from calicache.export.models import OpenSizes, Wishes, cache_specs, compiled_for, make_models
from calicache.export.session.opening import checking_options
from calicache.export.session.session import Session
from calicache.export.sizes import tables_at
from calicache.export.translation.precision import check_precision
from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.common.arguments import of_kind, path_of, texts
from calicache.graph_passes.common.disk.files import atomic_path
from calicache.graph_passes.common.disk.hashing import sha256_of
from calicache.graph_passes.common.errors import ExportError
from calicache.graph_passes.common.progress import Meter, OnProgress
from calicache.graph_passes.common.shards import groups_of
from calicache.graph_passes.describe.graphs import view_graphs
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.rewriting.compile import Compiled
from calicache.graph_passes.sampler.tables import SamplerTables
from calicache.graph_passes.settings.front import Front
from calicache.graph_passes.sites.targets import CalibrationTarget

_STAGES = 3


def export_onnx(
    optimized: OptimizedModel,
    path: Path | str,
    *,
    layout: Layout | str = Layout.STEP,
    sampler: SamplerTables | None = None,
    attention: Attention | str = Attention.FUSED,
    dynamic: Sequence[str] = (),
    precision: Precision | str = Precision.FLOAT32,
    check: bool = True,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Write an optimised model as an artifact folder; an existing artifact is replaced.

    Args:
        optimized: from `optimize`.
        path: the folder, such as `dit.onnx.d`.
        layout: `step`, `pair` or `sampler`.
        sampler: for the `sampler` layout alone, from `read_sampler`; None takes the plan's own.
            All calls of a step are one batch there.
        attention: `fused` for ONNX Runtime on CPU and CUDA; with `standard` all operators are
            ONNX's own, for every other runtime and provider.
        dynamic: sizes that are left open. `batch` is the first dimension of the latent, and of
            noise in the `sampler` layout; `prompt` the length of a text (B, length, C), and
            `tokens` that of a latent (B, tokens, C), where the model allows it.
        precision: of the linear layers in residual branches, but those that the plan excludes:
            `float16`, `int8`, or weights alone in 8 or 4 bits (`weights8`, `weights4`), as ONNX
            Runtime's own tools write them. All else stays as it was recorded, caches, inputs and
            outputs too, and everything with `float32`.
        check: open what was written on the CPU provider, as a session does, before it takes its
            place. An operation that this provider has no kernel for is no error: others may.
        on_progress: told how many of the stages are done.

    Raises:
        ExportError: an unknown layout, no sampler where one is needed, or one where none is,
            a precision that the model or its operators cannot have, a model split over processes,
            torch.onnx refuses an op, an op is made for one size where that is to be open,
            something else is in the place of the folder, or ONNX Runtime does not take the models
            for valid.
        PlanError: the plan has several recipes; `optimized.for_grid` gives the model of one.
    """
    of_kind("optimized", optimized, OptimizedModel, ExportError).plan.one("export")
    path = path_of(path, ExportError)
    layout = one_of("layout", layout, Layout)
    attention = one_of("attention", attention, Attention)
    precision = one_of("precision", precision, Precision)
    check_precision(precision, attention)
    tables = _sampler(optimized, layout, sampler)
    meter = Meter(_STAGES, on_progress)
    meter.stage("translate the graphs")
    wishes = Wishes(layout, attention, tables, _axes(dynamic), precision)
    compiled = compiled_for(optimized, layout)
    _check_alone(compiled.captured)
    with atomic_path(path, ARTIFACT) as folder:
        models, sizes = make_models(optimized, wishes)
        meter.add()
        meter.stage("write weights and models")
        weights = plan_weight_file(models.values())
        folder.mkdir()
        if weights.places:  # small tensors are in the models themselves
            weights.write(folder / WEIGHTS_FILE)
        place_outside(models.values(), weights, folder / WEIGHTS_FILE)
        for name, model in models.items():
            ir.save(model, folder / name)
        write_graphs(view_graphs(compiled.captured, compiled.variant_set), folder)
        names = sorted(file.name for file in folder.iterdir())
        files = tuple(_file_record(folder / name, weights) for name in names)
        manifest = _manifest(compiled, wishes, sizes, files, optimized.plan.front)
        write_manifest(manifest, folder)
        meter.add()
        if check:
            meter.stage("open what was written")
            _check_opens(folder)
            meter.add()
    return manifest


def _check_opens(folder: Path) -> None:
    """Refuse an artifact that no session could open.

    Raises:
        ExportError: it is none, or one of its models is not valid.
    """
    try:
        Session(folder, options=checking_options())
    except ExportError as error:
        # Of ONNX Runtime's own: another provider may have the kernel.
        if type(error.__cause__).__name__ != "NotImplemented":
            raise


def _file_record(path: Path, weights: WeightFile) -> FileRecord:
    known = path.name == WEIGHTS_FILE
    return FileRecord(path.name, path.stat().st_size, weights.sha256 if known else sha256_of(path))


Choice = TypeVar("Choice", bound=StrEnum)


def one_of(name: str, value: object, choices: type[Choice]) -> Choice:
    """The choice of that name.

    Raises:
        ExportError: there is none.
    """
    known = next((choice for choice in choices if choice == value), None)
    if known is None:
        raise ExportError(
            name, expected=" | ".join(choices), got=repr(value), fix="Choose one of these."
        )
    return known


def _check_alone(captured: CapturedGraph) -> None:
    """Refuse the graph of one process of several."""
    groups = groups_of(captured.graph)
    if groups:
        raise ExportError(
            "model",
            expected="a model that one process runs by itself",
            got="one that talks to other processes in every call",
            fix="Export the model before it is split over them: the plan is of its weights, and "
            "holds.",
        )


def _axes(dynamic: Sequence[str]) -> tuple[Axis, ...]:
    names = texts("dynamic", dynamic, ExportError)
    return tuple(dict.fromkeys(one_of("dynamic", name, Axis) for name in names))


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
    if sampler is not None:
        of_kind("sampler", sampler, SamplerTables, ExportError)
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
    return tables_at(tables, optimized.by_step().plan.binding.signature.tensors)


def _manifest(
    compiled: Compiled,
    wishes: Wishes,
    sizes: OpenSizes,
    files: tuple[FileRecord, ...],
    front: Front | None,
) -> Manifest:
    recipe, analysis = compiled.recipe, compiled.analysis
    binding, cost, variant_set = analysis.binding, compiled.cost, compiled.variant_set
    return Manifest(
        format=FORMAT,
        calicache=version("calicache"),
        layout=wishes.layout,
        attention=wishes.attention,
        precision=wishes.precision,
        files=files,
        schedule=recipe.schedule,
        rank=recipe.rank,
        branch=recipe.branch,
        order=recipe.order,
        weighting=recipe.weighting,
        output_weights=recipe.outputs,
        correction=recipe.correction,
        weights_hash=binding.weights_hash,
        inputs=binding.signature.tensors,
        calls_per_step=binding.calls,
        fixed=analysis.fixed,
        outputs=output_names(compiled.captured),
        caches=cache_specs(variant_set),
        open_sizes=dict(sizes),
        history=variant_set.history,
        cache_bytes=cost.cache_bytes,
        plain_macs=cost.plain_macs,
        modes=_mode_records(compiled),
        targets=tuple(_target_record(compiled, target) for target in compiled.targets),
        branches=tuple(branch.name for branch in analysis.sites.branches),
        rejections=compiled.rejections,
        sampler=None if wishes.tables is None else _sampler_record(compiled, wishes.tables),
        front=front,
    )


def _sampler_record(compiled: Compiled, sampler: SamplerTables) -> SamplerRecord:
    return SamplerRecord(
        latent=sampler.latent,
        noise=noise_spec(compiled, sampler),
        inputs=run_specs(compiled, sampler),
        parts=sampler.parts,
        conditional=sampler.conditional,
        guidance=sampler.guidance,
        scale=sampler.scales[0],
    )


def _mode_records(compiled: Compiled) -> tuple[ModeRecord, ...]:
    variant_set, macs = compiled.variant_set, compiled.cost.modes
    records = []
    for mode, variant in sorted(variant_set.variants.items()):
        kept = tuple(name for name in variant.reads if name not in variant_set.tables)
        records.append(ModeRecord(mode, macs[mode], kept, variant.writes))
    return tuple(records)


def _target_record(compiled: Compiled, target: CalibrationTarget) -> TargetRecord:
    cost, factors = compiled.cost.targets[target.name], compiled.factors.get(target.name)
    return TargetRecord(
        name=target.name,
        granularity=target.granularity,
        branch=target.branch,
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
