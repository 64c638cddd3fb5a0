"""An artifact: one folder with the ONNX model, its weights and a manifest that explains both."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath

import onnx_ir as ir
from pydantic import TypeAdapter

from calicache.export.onnx_graph import output_names, step_model
from calicache.graph_passes.assign import Granularity
from calicache.graph_passes.branches import SiteRejection
from calicache.graph_passes.decompose import Weighting
from calicache.graph_passes.errors import ArtifactError, ExportError
from calicache.graph_passes.files import atomic_path, sha256_of
from calicache.graph_passes.runtime import OptimizedModel
from calicache.graph_passes.schedule import StepMode
from calicache.graph_passes.signature import TensorSpec

FORMAT = 2
MODEL_FILE, WEIGHTS_FILE, MANIFEST_FILE = "model.onnx", "weights.bin", "manifest.json"
LAYOUTS = ("step",)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file of the artifact."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TargetRecord:
    """One calibration target: layers or a branch, what its factors keep, what it costs."""

    name: str
    granularity: Granularity
    sites: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    rank: int
    energy: float | None
    full_macs: int
    calibrate_macs: int
    full_bytes: int
    factor_bytes: int
    cache_bytes: int


@dataclass(frozen=True, slots=True)
class ModeRecord:
    """What one step in a mode costs, and which kept values it reads."""

    mode: StepMode
    macs: int
    reads: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact is, who it belongs to, and what the compiler did.

    Attributes:
        format: version of this record.
        calicache: version that wrote it.
        layout: how the variants are packed.
        files: all other files of the folder.
        schedule, rank, order, weighting, correction, weights_hash: from the plan.
        inputs: the model's own tensors; `outputs` its outputs by name.
        caches: what a REFRESH step keeps; `history` refreshes of each.
        cache_bytes: of all kept refreshes.
        plain_macs: of one call of the model as it was.
        modes: every mode that the artifact has.
        targets, rejections: what CALIBRATE replaces, and what was left alone and why.
        branches: residual branches that REUSE skips.
    """

    format: int
    calicache: str
    layout: str
    files: tuple[FileRecord, ...]
    schedule: tuple[StepMode, ...]
    rank: int
    order: int
    weighting: Weighting
    correction: str
    weights_hash: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    caches: tuple[TensorSpec, ...]
    history: int
    cache_bytes: int
    plain_macs: int
    modes: tuple[ModeRecord, ...]
    targets: tuple[TargetRecord, ...]
    branches: tuple[str, ...]
    rejections: tuple[SiteRejection, ...]

    def mode(self, mode: StepMode) -> ModeRecord:
        """The record of a mode that the schedule uses."""
        return next(record for record in self.modes if record.mode is mode)

    @property
    def run_share(self) -> float:
        """MACs of a whole run against the plain model's."""
        used = sum(self.mode(mode).macs for mode in self.schedule)
        return used / (len(self.schedule) * self.plain_macs)


_MANIFEST = TypeAdapter(Manifest)


def export_onnx(optimized: OptimizedModel, directory: Path | str, layout: str = "step") -> Manifest:
    """Write an optimised model as an artifact folder; an existing one is replaced.

    Args:
        optimized: from `optimize`.
        directory: the folder, such as `dit.onnx.d`.
        layout: `step`.

    Raises:
        ExportError: an unknown layout, or torch.onnx refuses an op.
    """
    if layout not in LAYOUTS:
        raise ExportError(
            "layout", expected=" | ".join(LAYOUTS), got=repr(layout), fix="Choose one of these."
        )
    model = step_model(optimized)
    with atomic_path(Path(directory)) as folder:
        folder.mkdir()
        ir.save(model, folder / MODEL_FILE, external_data=WEIGHTS_FILE)
        names = sorted(path.name for path in folder.iterdir())
        files = tuple(
            FileRecord(name, (folder / name).stat().st_size, sha256_of(folder / name))
            for name in names
        )
        manifest = _manifest(optimized, layout, files)
        (folder / MANIFEST_FILE).write_bytes(_MANIFEST.dump_json(manifest, indent=2) + b"\n")
    return manifest


def read_manifest(directory: Path | str) -> Manifest:
    """Read the manifest alone, without looking at the other files.

    Raises:
        ArtifactError: there is none, or it is damaged or of another version.
    """
    path = Path(directory) / MANIFEST_FILE
    try:
        text = path.read_bytes()
        found = json.loads(text)["format"]  # first: another format has other fields
        if found != FORMAT:
            raise ValueError(f"format {found}, this version reads {FORMAT}")
        manifest = _MANIFEST.validate_json(text)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            str(path),
            expected="a manifest written by export_onnx",
            got=f"{type(error).__name__}: {error}",
            fix="Export the model again.",
        ) from error
    return manifest


def load_artifact(directory: Path | str) -> Manifest:
    """Read the manifest and check every file against it.

    Raises:
        ArtifactError: a file is missing, cut short, changed, or outside the folder.
    """
    manifest = read_manifest(directory)
    folder = Path(directory)
    if MODEL_FILE not in {record.name for record in manifest.files}:
        raise _damaged(folder / MANIFEST_FILE, f"an entry for {MODEL_FILE}", "none")
    for record in manifest.files:
        path = folder / record.name
        if PurePosixPath(record.name).name != record.name:
            raise _damaged(path, "a file name inside the folder", record.name)
        if not path.is_file():
            raise _damaged(path, f"a file of {record.size} bytes", "no file")
        if path.stat().st_size != record.size:
            raise _damaged(path, f"{record.size} bytes", f"{path.stat().st_size} bytes")
        if sha256_of(path) != record.sha256:
            raise _damaged(path, f"SHA-256 {record.sha256[:12]}", "another content")
    return manifest


def _damaged(path: Path, expected: str, got: str) -> ArtifactError:
    return ArtifactError(
        str(path), expected=expected, got=got, fix="Copy the whole folder again, or export again."
    )


def _manifest(optimized: OptimizedModel, layout: str, files: tuple[FileRecord, ...]) -> Manifest:
    settings, cost = optimized.plan.settings, optimized.cost
    caches = optimized.rewritten.caches
    return Manifest(
        format=FORMAT,
        calicache=version("calicache"),
        layout=layout,
        files=files,
        schedule=settings.schedule,
        rank=settings.rank,
        order=settings.order,
        weighting=settings.weighting,
        correction=settings.correction,
        weights_hash=settings.weights_hash,
        inputs=settings.signature.tensors,
        outputs=output_names(optimized),
        caches=tuple(
            TensorSpec(cache.name, cache.shape, str(cache.dtype).removeprefix("torch."))
            for cache in caches
        ),
        history=optimized.rewritten.history,
        cache_bytes=cost.cache_bytes,
        plain_macs=cost.plain_macs,
        modes=tuple(
            ModeRecord(mode, cost.modes[mode], _kept_reads(optimized, mode))
            for mode in sorted(optimized.rewritten.variants)
        ),
        targets=_target_records(optimized),
        branches=tuple(branch.name for branch in optimized.sites.branches),
        rejections=optimized.sites.rejections,
    )


def _kept_reads(optimized: OptimizedModel, mode: StepMode) -> tuple[str, ...]:
    rewritten = optimized.rewritten
    return tuple(name for name in rewritten.variants[mode].reads if name not in rewritten.tables)


def _target_records(optimized: OptimizedModel) -> tuple[TargetRecord, ...]:
    records = []
    for target in optimized.targets:
        cost, factors = optimized.cost.targets[target.name], optimized.factors.get(target.name)
        records.append(
            TargetRecord(
                name=target.name,
                granularity=target.granularity,
                sites=target.sites,
                in_features=target.in_features,
                out_features=target.out_features,
                rank=target.rank,
                energy=factors.energy if factors else None,
                full_macs=cost.full_macs,
                calibrate_macs=cost.calibrate_macs,
                full_bytes=cost.full_bytes,
                factor_bytes=cost.factor_bytes,
                cache_bytes=cost.cache_bytes,
            )
        )
    return tuple(records)
