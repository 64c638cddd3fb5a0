"""The manifest of an artifact: what the folder holds, read without trust."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath

from pydantic import TypeAdapter

from calicache.graph_passes.common.errors import ArtifactError
from calicache.graph_passes.common.hashing import sha256_of
from calicache.graph_passes.common.rejection import Rejection
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.settings.choices import Granularity, StepMode, Weighting
from calicache.graph_passes.settings.front import Front
from calicache.graph_passes.settings.schedule import Table

FORMAT = 6
MODEL_FILE, WEIGHTS_FILE, MANIFEST_FILE = "model.onnx", "weights.bin", "manifest.json"
GRAPHS_FILE = "graphs.json.gz"  # nothing that runs the model needs it


class Layout(StrEnum):
    """How the variants are packed.

    STEP is one model of a step, PAIR one model for every mode, SAMPLER one model of a whole run.
    """

    STEP = "step"
    PAIR = "pair"
    SAMPLER = "sampler"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file of the artifact."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TargetRecord:
    """One calibration target: layers or a branch, what its factors keep, what it costs.

    `energy` is kept at the target's rank, `kept` at others too, as far as they are known.
    """

    name: str
    granularity: Granularity
    sites: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    rank: int
    energy: float | None
    kept: dict[int, float]
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
class SamplerRecord:
    """What goes into a whole run.

    Attributes:
        latent: the model's input that holds x.
        noise: (B, ...) float32, the start; the latents that come out are alike.
        inputs: the model's tensors that stay the same over a run, all guidance parts at once.
        parts: of the guided batch; 1 without guidance.
        conditional: the part that guidance moves towards, if the scale is an input.
        guidance: the recorded scale, used where the caller names none.
        scale: what the noise is multiplied with for the first call of the model.
    """

    latent: str
    noise: TensorSpec
    inputs: tuple[TensorSpec, ...]
    parts: int
    conditional: int | None
    guidance: float | None
    scale: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact is, who it belongs to, and what the compiler did.

    Attributes:
        format: version of this record.
        calicache: version that wrote it.
        layout: how the variants are packed.
        files: all other files of the folder.
        schedule, rank, order, weighting, output_weights, correction, weights_hash: from the plan;
            output weights as in `Recipe.outputs`.
        inputs: the model's own tensors; `outputs` its outputs by name.
        calls_per_step: how often a step calls the model, each call with caches of its own.
        fixed: digests of the values that an input can have, for inputs that decide sizes.
        caches: what a REFRESH step keeps; `history` refreshes of each.
        cache_bytes: of all kept refreshes of one call.
        plain_macs: of one call of the model as it was.
        modes: every mode that the artifact has.
        targets, rejections: what CALIBRATE replaces, and what was left alone and why.
        branches: residual branches that REUSE skips.
        sampler: of the `sampler` layout alone.
        front: of the search that the plan is from.
    """

    format: int
    calicache: str
    layout: Layout
    files: tuple[FileRecord, ...]
    schedule: tuple[StepMode, ...]
    rank: int
    order: int
    weighting: Weighting
    output_weights: Table | None
    correction: str
    weights_hash: str
    inputs: tuple[TensorSpec, ...]
    calls_per_step: int
    fixed: dict[str, tuple[str, ...]]
    outputs: tuple[str, ...]
    caches: tuple[TensorSpec, ...]
    history: int
    cache_bytes: int
    plain_macs: int
    modes: tuple[ModeRecord, ...]
    targets: tuple[TargetRecord, ...]
    branches: tuple[str, ...]
    rejections: tuple[Rejection, ...]
    sampler: SamplerRecord | None
    front: Front | None

    def mode(self, mode: StepMode) -> ModeRecord:
        """The record of a mode that the schedule uses."""
        return next(record for record in self.modes if record.mode is mode)

    @property
    def run_share(self) -> float:
        """MACs of a whole run against the plain model's."""
        used = sum(self.mode(mode).macs for mode in self.schedule)
        return used / (len(self.schedule) * self.plain_macs)


_MANIFEST = TypeAdapter(Manifest)


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the manifest into an artifact's folder."""
    (folder / MANIFEST_FILE).write_bytes(_MANIFEST.dump_json(manifest, indent=2) + b"\n")


def model_file(layout: Layout, mode: StepMode) -> str:
    """Name of the file with the model that runs a mode."""
    return f"{mode.name.lower()}.onnx" if layout is Layout.PAIR else MODEL_FILE


def read_manifest(path: Path | str) -> Manifest:
    """Read the manifest of an artifact's folder alone, without looking at the other files.

    Raises:
        ArtifactError: there is none, or it is damaged or of another version.
    """
    file = Path(path) / MANIFEST_FILE
    try:
        text = file.read_bytes()
        number = json.loads(text)["format"]  # first: another format has other fields
        if number != FORMAT:
            raise ValueError(f"format {number}, this version reads {FORMAT}")
        manifest = _MANIFEST.validate_json(text)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            str(file),
            expected="a manifest written by export_onnx",
            got=f"{type(error).__name__}: {error}",
            fix="Export the model again.",
        ) from error
    return manifest


def load_artifact(path: Path | str) -> Manifest:
    """Read the manifest of an artifact's folder and check every file against it.

    Raises:
        ArtifactError: a file is missing, cut short, changed, or outside the folder.
    """
    manifest = read_manifest(path)
    folder = Path(path)
    for mode in set(manifest.schedule):
        name = model_file(manifest.layout, mode)
        if name not in {record.name for record in manifest.files}:
            raise _damaged(folder / MANIFEST_FILE, f"an entry for {name}", "none")
    for record in manifest.files:
        check_file(folder, record)
    return manifest


def check_file(folder: Path, record: FileRecord) -> None:
    """Check one file of an artifact against its record.

    Raises:
        ArtifactError: it is missing, cut short, changed, or outside the folder.
    """
    path = folder / record.name
    if PurePosixPath(record.name).name != record.name:
        raise _damaged(path, "a file name inside the folder", record.name)
    if not path.is_file():
        raise _damaged(path, f"a file of {record.size} bytes", "no file")
    if path.stat().st_size != record.size:
        raise _damaged(path, f"{record.size} bytes", f"{path.stat().st_size} bytes")
    if sha256_of(path) != record.sha256:
        raise _damaged(path, f"SHA-256 {record.sha256[:12]}", "another content")


def _damaged(path: Path, expected: str, got: str) -> ArtifactError:
    return ArtifactError(
        str(path), expected=expected, got=got, fix="Copy the whole folder again, or export again."
    )
