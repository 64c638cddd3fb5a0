"""The manifest of an artifact: what the folder holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from pydantic import TypeAdapter

from calicache.export.artifact.open_sizes import Axis, OpenSize, Sizes
from calicache.graph_passes.common.disk.bounds import Calls, Count, Digest, FileName, Number
from calicache.graph_passes.common.disk.documents import DocumentKind
from calicache.graph_passes.common.errors import ArtifactError
from calicache.graph_passes.common.rejection import Rejection
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.settings.choices import BranchKind, Granularity, StepMode, Weighting
from calicache.graph_passes.settings.front import Front
from calicache.graph_passes.settings.recipe import branch_words
from calicache.graph_passes.settings.schedule import Table

FORMAT = 12
MODEL_FILE, WEIGHTS_FILE, MANIFEST_FILE = "model.onnx", "weights.bin", "manifest.json"
GRAPHS_FILE = "graphs.json.gz"  # nothing that runs the model needs it


class Layout(StrEnum):
    """How the variants are packed.

    STEP is one model of a step, PAIR one model for every mode, SAMPLER one model of a whole run.
    """

    STEP = "step"
    PAIR = "pair"
    SAMPLER = "sampler"


class Attention(StrEnum):
    """What attention is written with.

    FUSED is one operator of ONNX Runtime's own, STANDARD are the products that it is made of: then
    a model has operators of ONNX alone, also in calibration branches of integers.
    """

    FUSED = "fused"
    STANDARD = "standard"


class Precision(StrEnum):
    """What the linear layers in residual branches are computed in.

    FLOAT32 leaves them as they were recorded. INT8 has products of integers; WEIGHTS8 and WEIGHTS4
    hold weights in so many bits, and products are of floats.
    """

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"
    WEIGHTS8 = "weights8"
    WEIGHTS4 = "weights4"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file of the artifact."""

    name: FileName
    size: Count
    sha256: Digest


@dataclass(frozen=True, slots=True)
class TargetRecord:
    """One calibration target: layers or a branch, what its factors keep, what it costs.

    `energy` is kept at the target's rank, `kept` at others too, as far as they are known.
    """

    name: str
    granularity: Granularity
    branch: BranchKind
    sites: tuple[str, ...]
    in_features: Count
    out_features: tuple[Count, ...]
    rank: Count
    energy: Number | None
    kept: dict[int, Number]
    full_macs: Count
    calibrate_macs: Count
    full_bytes: Count
    factor_bytes: Count
    cache_bytes: Count

    @property
    def corrects(self) -> bool:
        """Whether it has a calibration branch at all."""
        return self.branch is BranchKind.INT8 or self.rank > 0


@dataclass(frozen=True, slots=True)
class ModeRecord:
    """What one step in a mode costs, which kept values it reads, and which caches it adds to."""

    mode: StepMode
    macs: Count
    reads: tuple[str, ...]
    writes: tuple[str, ...]


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
    parts: Calls
    conditional: int | None
    guidance: Number | None
    scale: Number


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact is, who it belongs to, and what the compiler did.

    Attributes:
        format: version of this record.
        calicache: version that wrote it.
        layout: how the variants are packed.
        attention: what it is written with.
        precision: of the linear layers in residual branches.
        files: all other files of the folder.
        schedule, rank, branch, order, weighting, output_weights, correction, weights_hash: from
            the plan; output weights as in `Recipe.outputs`.
        inputs: the model's own tensors; `outputs` its outputs by name.
        calls_per_step: how often a step calls the model, each call with caches of its own.
        fixed: digests of the values that an input can have, for inputs that decide sizes.
        caches: what steps keep; `history` values of each at the most.
        open_sizes: what grows with sizes that are left open, by tensor; shapes and costs here are
            those of the recorded ones.
        cache_bytes: of all kept values of one call.
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
    attention: Attention
    precision: Precision
    files: tuple[FileRecord, ...]
    schedule: tuple[StepMode, ...]
    rank: Count
    branch: BranchKind
    order: Count
    weighting: Weighting
    output_weights: Table | None
    correction: str
    weights_hash: str
    inputs: tuple[TensorSpec, ...]
    calls_per_step: Calls
    fixed: dict[str, tuple[Digest, ...]]
    outputs: tuple[str, ...]
    caches: tuple[TensorSpec, ...]
    history: Count
    open_sizes: dict[str, tuple[OpenSize, ...]]
    cache_bytes: Count
    plain_macs: Count
    modes: tuple[ModeRecord, ...]
    targets: tuple[TargetRecord, ...]
    branches: tuple[str, ...]
    rejections: tuple[Rejection, ...]
    sampler: SamplerRecord | None
    front: Front | None

    def mode(self, mode: StepMode) -> ModeRecord:
        """The record of a mode that the schedule uses."""
        return next(record for record in self.modes if record.mode is mode)

    def sized(self, spec: TensorSpec, sizes: Sizes) -> TensorSpec:
        """The form of a tensor where the open sizes are these; as recorded where none is open."""
        shape = list(spec.shape)
        for size in self.open_sizes.get(spec.name, ()):
            shape[size.dimension] = size.formula.at(sizes)
        return replace(spec, shape=tuple(shape))

    def sizes_of(self, shapes: Mapping[str, Sequence[int]]) -> dict[Axis, int]:
        """The open sizes, each from the first input that has it alone.

        Args:
            shapes: of a caller's inputs by name; what is missing counts as recorded.
        """
        record = self.sampler
        specs = self.inputs if record is None else (record.noise, *record.inputs)
        sizes: dict[Axis, int] = {}
        for spec in specs:
            shape = shapes.get(spec.name, spec.shape)
            for size in self.open_sizes.get(spec.name, ()):
                axes = size.formula.axes - sizes.keys()
                if len(size.formula.axes) == len(axes) == 1 and len(shape) == len(spec.shape):
                    lengths = (shape[size.dimension], spec.shape[size.dimension])
                    fits = [size.formula.solved(length, {}) for length in lengths]
                    sizes |= {axis: n for axis in axes for n in reversed(fits) if n is not None}
        return sizes

    @property
    def branch_words(self) -> str:
        """The calibration branches that no rule says otherwise of, in words."""
        return branch_words(self.branch, self.rank, self.order, self.weighting)

    @property
    def run_share(self) -> float:
        """MACs of a whole run against the plain model's."""
        used = sum(self.mode(mode).macs for mode in self.schedule)
        return used / (len(self.schedule) * self.plain_macs)


MANIFEST = DocumentKind(
    "artifact",
    FORMAT,
    TypeAdapter(Manifest),
    ArtifactError,
    "a manifest written by export_onnx",
    "Export the model again.",
)


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the manifest into an artifact's folder."""
    (folder / MANIFEST_FILE).write_text(MANIFEST.dumps(manifest))


def model_file(layout: Layout, mode: StepMode) -> str:
    """Name of the file with the model that runs a mode."""
    return f"{mode.name.lower()}.onnx" if layout is Layout.PAIR else MODEL_FILE
