"""What an artifact's manifest and files say: sites, costs by mode, caches, whom it belongs to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from calicache.export.artifact.graph_file import read_graphs
from calicache.export.artifact.manifest import (
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Attention,
    Manifest,
    ModeRecord,
    Precision,
    TargetRecord,
)
from calicache.export.artifact.validity import cache_slots
from calicache.graph_passes.settings.choices import BranchKind, StepMode
from calicache.tools.inspect.facts import (
    Caution,
    Mode,
    ScheduleFacts,
    schedule_cautions,
    schedule_facts,
)
from calicache.tools.inspect.layers import LayerFacts, fold_layers, layer_facts
from calicache.tools.terminal.front import front_lines
from calicache.tools.terminal.text import (
    fact_grid,
    files_in_words,
    format_count,
    plain_table,
    schedule_strip,
    some_names,
    some_of,
    title,
)

LOW_ENERGY = 0.5
COST_COLUMNS = ("mode", "steps", "MACs", "of plain", "reads", "keeps")


@dataclass(frozen=True, slots=True)
class ModeFacts:
    """What one call of the model costs in a mode.

    Attributes:
        mode: of the step; `steps` how many there are in the schedule.
        macs: multiply-accumulates.
        share: of the plain model's MACs.
        read_bytes: of the kept values that it reads.
        written_bytes: of the values that it keeps.
    """

    mode: Mode
    steps: int
    macs: int
    share: float
    read_bytes: int
    written_bytes: int


@dataclass(frozen=True, slots=True)
class ArtifactFacts:
    """Everything that is shown of an artifact.

    Attributes:
        kind: `artifact`.
        path: of its folder.
        manifest: as it lies there.
        schedule: modes of the steps.
        modes: costs of one call, for every mode in the artifact.
        run_share: MACs of a whole run against the plain model's.
        cache_bytes: of all kept refreshes, over all calls of a step.
        layers: every linear layer and what the steps do with it.
        warnings: what a user should know.
    """

    kind: Literal["artifact"] = field(default="artifact", init=False)
    path: str
    manifest: Manifest
    schedule: ScheduleFacts
    modes: tuple[ModeFacts, ...]
    run_share: float
    cache_bytes: int
    layers: tuple[LayerFacts, ...]
    warnings: tuple[Caution, ...]


def artifact_facts(path: Path, manifest: Manifest) -> ArtifactFacts:
    """Facts of an artifact.

    Args:
        path: its folder, whose files were checked.
        manifest: from there.
    """
    cache_bytes = manifest.cache_bytes * manifest.calls_per_step
    return ArtifactFacts(
        path=str(path),
        manifest=manifest,
        schedule=schedule_facts(manifest.schedule, manifest.order),
        modes=tuple(_mode_facts(manifest, record) for record in manifest.modes),
        run_share=manifest.run_share,
        cache_bytes=cache_bytes,
        layers=layer_facts(read_graphs(path), manifest.targets),
        warnings=tuple(_cautions(manifest, path, cache_bytes)),
    )


def _mode_facts(manifest: Manifest, record: ModeRecord) -> ModeFacts:
    sizes = {
        cache.name: cache.torch_dtype.itemsize * math.prod(cache.shape) for cache in manifest.caches
    }
    slots = {slot: sizes[name] for name, own in cache_slots(manifest).items() for slot in own}
    return ModeFacts(
        mode=record.mode,
        steps=manifest.schedule.count(record.mode),
        macs=record.macs,
        share=record.macs / manifest.plain_macs,
        read_bytes=sum(slots[name] for name in record.reads),
        written_bytes=sum(sizes[name] for name in record.writes),
    )


def _cautions(manifest: Manifest, path: Path, cache_bytes: int) -> Iterator[Caution]:
    # Rows that were not fitted have no weight of the latent.
    fitted = any(len(row) > manifest.order + 2 for row in manifest.output_weights or ())
    yield from schedule_cautions(
        manifest.schedule, manifest.order, manifest.correction, fitted=fitted
    )
    # Integers multiply as often: what they save is time.
    low_rank = [t for t in manifest.targets if t.branch is BranchKind.LOW_RANK]
    saves = manifest.run_share < 1 or len(low_rank) < len(manifest.targets)
    if not saves and set(manifest.schedule) != {StepMode.REFRESH}:
        text = f"A run takes {manifest.run_share:.3f} of the plain model's MACs."
        yield Caution("no-saving", text)
    calibrated = low_rank if StepMode.CALIBRATE in manifest.schedule else ()
    low = [t for t in calibrated if t.energy is not None and t.energy < LOW_ENERGY and t.rank]
    if low:
        named = [f"{target.name} ({target.energy:.2f})" for target in low]
        text = f"Energy kept is below {LOW_ENERGY:g} in {some_names(named)}: raise their ranks."
        yield Caution("low-energy", text)
    dear = [target.name for target in calibrated if target.calibrate_macs >= target.full_macs]
    if dear:
        text = f"A calibration branch costs as much as the layers: {some_names(dear)}."
        yield Caution("no-saving", text)
    weights = sum(record.size for record in manifest.files if record.name == WEIGHTS_FILE)
    if cache_bytes > weights:
        sizes = (format_count(size, "B") for size in (cache_bytes, weights))
        yield Caution("large-caches", "The caches take {}, the weights {}.".format(*sizes))
    recorded = {record.name for record in manifest.files} | {MANIFEST_FILE}
    others = sorted(path.name for path in path.iterdir() if path.name not in recorded)
    if others:
        text = f"The manifest does not know {some_names(others)}, which lie in the folder."
        yield Caution("other-files", text)


def describe_artifact(facts: ArtifactFacts) -> Iterator[RenderableType]:
    """What `calicache inspect` prints of an artifact."""
    yield Text(f"calicache artifact, layout {facts.manifest.layout}", style="bold")
    yield fact_grid(_heading(facts))
    yield title(f"Schedule, {facts.schedule.spacing}")
    yield from schedule_strip(facts.schedule.modes)
    if StepMode.CALIBRATE in facts.schedule.modes:
        yield title("Calibration targets, with MACs and cache bytes of one call")
        yield _target_table(facts.manifest.targets)
    yield title("Linear layers by step mode")
    yield _layer_table(facts)
    yield title("Left alone")
    rejections = ((rejection.name, rejection.reason) for rejection in facts.manifest.rejections)
    yield plain_table(["layer", "reason"], rows=rejections)
    yield title("Totals of one call")
    yield _total_table(facts)
    if facts.manifest.front is not None:
        yield from front_lines(facts.manifest.front)


def _heading(facts: ArtifactFacts) -> Iterator[tuple[str, str]]:
    manifest = facts.manifest
    yield "written by", f"calicache {manifest.calicache}"
    yield "weights", manifest.weights_hash[:16]
    yield "files", files_in_words(manifest.files)
    yield "inputs", some_of([f"{spec.name} {spec}" for spec in manifest.inputs])
    if manifest.open_sizes:
        sizes = " and ".join(manifest.sizes_of({}))
        yield "open sizes", f"{sizes}; shapes and figures are those of the recorded ones"
    if manifest.attention is not Attention.FUSED:
        yield "attention", f"in {manifest.attention} operators"
    if manifest.precision is not Precision.FLOAT32:
        yield "precision", f"{manifest.precision} in the linear layers of residual branches"
    if manifest.fixed:
        yield "built in", f"the recorded values of {', '.join(manifest.fixed)}"
    if manifest.calls_per_step > 1:
        yield "calls", f"{manifest.calls_per_step} of the model a step"
    yield "plan", manifest.branch_words
    yield "output weights", manifest.correction
    kept = f"{manifest.history} refresh{'es' if manifest.history > 1 else ''} of each at most"
    yield "caches", f"{len(manifest.caches)} values, {kept}, {format_count(facts.cache_bytes, 'B')}"
    record = manifest.sampler
    if record is not None:
        given = [f"{spec.name} {spec}" for spec in (record.noise, *record.inputs)]
        if record.guidance is not None:
            given.append(f"guidance scale {record.guidance:g}")
        yield "sampler", some_of(given)


def _target_table(targets: Sequence[TargetRecord]) -> Table:
    rows = (
        (
            target.name,
            str(target.in_features),
            str(sum(target.out_features)),
            str(target.rank) if target.branch is BranchKind.LOW_RANK else target.branch,
            "-" if target.energy is None else f"{target.energy:.3f}",
            format_count(target.full_macs),
            format_count(target.calibrate_macs),
            format_count(target.cache_bytes, "B"),
        )
        for target in targets
    )
    right = ("in", "out", "rank", "energy", "full", "calibrate", "cache")
    return plain_table(["target"], right, rows)


def _layer_table(facts: ArtifactFacts) -> Table:
    """What is done where; layers of several blocks that are treated alike in one row."""
    modes = [entry.mode.name for entry in facts.modes]
    rows = [(one.name, tuple(one.work[mode].value for mode in modes)) for one in facts.layers]
    return plain_table(["layer", *modes], rows=((name, *work) for name, work in fold_layers(rows)))


def cost_rows(facts: ArtifactFacts) -> Iterator[tuple[str, ...]]:
    """Costs of one call of the plain model, then by mode: the cells below `COST_COLUMNS`."""
    yield "plain model", "", format_count(facts.manifest.plain_macs), "1.000", "", ""
    for entry in facts.modes:
        yield (
            entry.mode.name,
            str(entry.steps),
            format_count(entry.macs),
            f"{entry.share:.3f}",
            format_count(entry.read_bytes, "B"),
            format_count(entry.written_bytes, "B"),
        )


def _total_table(facts: ArtifactFacts) -> Table:
    whole = ("whole run", str(len(facts.schedule.modes)), "", f"{facts.run_share:.3f}", "", "")
    return plain_table(COST_COLUMNS[:1], COST_COLUMNS[1:], [*cost_rows(facts), whole])
