"""What an artifact's manifest and files say: sites, costs by mode, caches, whom it belongs to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from calicache.export.artifact.graph_file import read_graphs
from calicache.export.artifact.manifest import (
    MANIFEST_FILE,
    WEIGHTS_FILE,
    FileRecord,
    Layout,
    Manifest,
    ModeRecord,
    SamplerRecord,
    TargetRecord,
)
from calicache.graph_passes.common.rejection import Rejection
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.rewriting.insertion import slot_name
from calicache.graph_passes.settings.choices import StepMode, Weighting
from calicache.graph_passes.settings.front import Front
from calicache.tools.inspect.facts import (
    LOW_ENERGY,
    Caution,
    LayerFacts,
    ModeFacts,
    ScheduleFacts,
    same_fields,
    schedule_cautions,
    schedule_facts,
    some_names,
)
from calicache.tools.inspect.layers import layer_facts
from calicache.tools.terminal.subject import ArtifactSubject
from calicache.tools.terminal.text import format_count


@dataclass(frozen=True, slots=True)
class ArtifactFacts:
    """Everything that is shown of an artifact; what `Manifest` has under the same name is as there.

    Attributes:
        kind: `artifact`.
        path: of its folder.
        fixed: inputs whose recorded values are built in.
        schedule: modes of the steps.
        modes: costs of one call, for every mode in the artifact.
        run_share: MACs of a whole run against the plain model's.
        caches: how many values a REFRESH keeps, `history` refreshes of each at most.
        cache_bytes: of all kept refreshes, over all calls of a step.
        layers: every linear layer and what the steps do with it.
        warnings: what a user should know.
    """

    kind: Literal["artifact"] = field(default="artifact", init=False)
    path: str
    format: int
    calicache: str
    layout: Layout
    files: tuple[FileRecord, ...]
    weights_hash: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    calls_per_step: int
    fixed: tuple[str, ...]
    sampler: SamplerRecord | None
    schedule: ScheduleFacts
    rank: int
    weighting: Weighting
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
    own: dict[str, Any] = {
        "path": str(subject.path),
        "fixed": tuple(manifest.fixed),
        "schedule": schedule_facts(manifest.schedule, manifest.order),
        "modes": tuple(_mode_facts(manifest, record) for record in manifest.modes),
        "run_share": manifest.run_share,
        "caches": len(manifest.caches),
        "cache_bytes": _cache_bytes(manifest),
        "layers": layer_facts(read_graphs(subject.path), manifest.targets),
        "warnings": tuple(_cautions(manifest, subject.path)),
    }
    return ArtifactFacts(**own, **same_fields(ArtifactFacts, own, manifest))


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
    return spec.torch_dtype.itemsize * math.prod(spec.shape)


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
