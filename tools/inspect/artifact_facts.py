"""What an artifact's manifest and files say: sites, costs by mode, caches, whom it belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from calicache.export.artifact.graph_file import read_graphs
from calicache.export.artifact.manifest import (
    MANIFEST_FILE,
    WEIGHTS_FILE,
    FileRecord,
    Manifest,
    ModeRecord,
    SamplerRecord,
    TargetRecord,
)
from calicache.graph_passes.common.rejection import Rejection
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.rewriting.insertion import slot_name
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.front import Front
from calicache.tools.inspect.facts import (
    LOW_ENERGY,
    Caution,
    LayerFacts,
    ModeFacts,
    ScheduleFacts,
    schedule_cautions,
    schedule_facts,
    some_names,
)
from calicache.tools.inspect.layers import layer_facts
from calicache.tools.terminal.subject import ArtifactSubject
from calicache.tools.terminal.text import format_count


@dataclass(frozen=True, slots=True)
class ArtifactFacts:
    """Everything that is shown of an artifact.

    Attributes:
        kind: `artifact`.
        path: of its folder.
        format: version of the manifest; `calicache` the version that wrote it.
        layout: how the variants are packed.
        files: all but the manifest, checked.
        weights_hash: of the checkpoint that it was made from.
        inputs, outputs, calls_per_step, fixed, sampler: as in `Manifest`.
        schedule: modes of the steps.
        rank, weighting, correction: from the plan.
        plain_macs: of one call of the model as it was.
        modes: costs of one call, for every mode in the artifact.
        run_share: MACs of a whole run against the plain model's.
        caches: how many values a REFRESH keeps, `history` refreshes of each at most.
        cache_bytes: of all kept refreshes, over all calls of a step.
        targets, rejections: what CALIBRATE replaces, and what was left alone and why.
        layers: every linear layer and what the steps do with it.
        front: of the search that the plan is from; None without one.
        warnings: what a user should know.
    """

    kind: Literal["artifact"] = field(default="artifact", init=False)
    path: str
    format: int
    calicache: str
    layout: str
    files: tuple[FileRecord, ...]
    weights_hash: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    calls_per_step: int
    fixed: tuple[str, ...]
    sampler: SamplerRecord | None
    schedule: ScheduleFacts
    rank: int
    weighting: str
    correction: str
    plain_macs: int
    modes: tuple[ModeFacts, ...]
    run_share: float
    caches: int
    history: int
    cache_bytes: int
    targets: tuple[TargetRecord, ...]
    rejections: tuple[Rejection, ...]
    layers: tuple[LayerFacts, ...]
    front: Front | None
    warnings: tuple[Caution, ...]


def artifact_facts(subject: ArtifactSubject) -> ArtifactFacts:
    """Facts of an artifact whose files were checked."""
    manifest = subject.manifest
    return ArtifactFacts(
        path=str(subject.path),
        format=manifest.format,
        calicache=manifest.calicache,
        layout=manifest.layout.value,
        files=manifest.files,
        weights_hash=manifest.weights_hash,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        calls_per_step=manifest.calls_per_step,
        fixed=tuple(manifest.fixed),
        sampler=manifest.sampler,
        schedule=schedule_facts(manifest.schedule, manifest.order),
        rank=manifest.rank,
        weighting=manifest.weighting.value,
        correction=manifest.correction,
        plain_macs=manifest.plain_macs,
        modes=tuple(_mode_facts(manifest, record) for record in manifest.modes),
        run_share=manifest.run_share,
        caches=len(manifest.caches),
        history=manifest.history,
        cache_bytes=_cache_bytes(manifest),
        targets=manifest.targets,
        rejections=manifest.rejections,
        layers=layer_facts(read_graphs(subject.path), manifest.targets),
        front=manifest.front,
        warnings=tuple(_cautions(manifest, subject.path)),
    )


def _cache_bytes(manifest: Manifest) -> int:
    return manifest.cache_bytes * manifest.calls_per_step


def _mode_facts(manifest: Manifest, record: ModeRecord) -> ModeFacts:
    sizes = {cache.name: _nbytes(cache) for cache in manifest.caches}
    slots = {
        slot_name(name, back): size
        for name, size in sizes.items()
        for back in range(manifest.history)
    }
    return ModeFacts(
        mode=record.mode,
        steps=manifest.schedule.count(record.mode),
        macs=record.macs,
        share=record.macs / manifest.plain_macs,
        read_bytes=sum(slots[name] for name in record.reads),
        written_bytes=sum(sizes.values()) if record.mode is StepMode.REFRESH else 0,
    )


def _nbytes(spec: TensorSpec) -> int:
    size = spec.torch_dtype.itemsize
    for length in spec.shape:
        size *= length
    return size


def _cautions(manifest: Manifest, folder: Path) -> Iterator[Caution]:
    yield from schedule_cautions(manifest.schedule, manifest.order, manifest.correction)
    if manifest.run_share >= 1 and set(manifest.schedule) != {StepMode.REFRESH}:
        yield Caution(
            "no-saving", f"A run takes {manifest.run_share:.3f} of the plain model's MACs."
        )
    calibrated = manifest.targets if StepMode.CALIBRATE in manifest.schedule else ()
    low = [t for t in calibrated if t.energy is not None and t.energy < LOW_ENERGY and t.rank]
    if low:
        named = [f"{target.name} ({target.energy:.2f})" for target in low]
        text = f"Energy kept is below {LOW_ENERGY:g} in {some_names(named)}: raise their ranks."
        yield Caution("low-energy", text)
    dear = [target.name for target in calibrated if target.calibrate_macs >= target.full_macs]
    if dear:
        text = f"A calibration branch costs as much as the layers: {some_names(dear)}."
        yield Caution("no-saving", text)
    yield from _size_cautions(manifest)
    recorded = {record.name for record in manifest.files} | {MANIFEST_FILE}
    others = sorted(path.name for path in folder.iterdir() if path.name not in recorded)
    if others:
        text = f"The manifest does not know {some_names(others)}, which lie in the folder."
        yield Caution("other-files", text)


def _size_cautions(manifest: Manifest) -> Iterator[Caution]:
    weights = sum(record.size for record in manifest.files if record.name == WEIGHTS_FILE)
    caches = _cache_bytes(manifest)
    if caches > weights:
        yield Caution(
            "large-caches",
            f"The caches take {format_count(caches, 'B')}, the weights "
            f"{format_count(weights, 'B')}.",
        )
