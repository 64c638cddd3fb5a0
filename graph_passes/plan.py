"""The plan: everything `optimize` needs besides the model, as plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calicache.graph_passes.capture import capture
from calicache.graph_passes.decompose import ChannelStatistics, Weighting
from calicache.graph_passes.dependence import Dependence, classify_inputs, classify_nodes
from calicache.graph_passes.errors import PlanError
from calicache.graph_passes.files import atomic_path, sha256_of
from calicache.graph_passes.observe import observe
from calicache.graph_passes.record import Timestep, Trajectory
from calicache.graph_passes.signature import CallSignature
from calicache.graph_passes.sites import LinearSite, find_sites

FORMAT = 1
SETTINGS_FILE, STATISTICS_FILE = "plan.json", "statistics.safetensors"


class StepMode(IntEnum):
    """What a step of the sampler does.

    REFRESH computes everything and overwrites the caches, CALIBRATE corrects the cached
    outputs of linear layers with low-rank branches, REUSE returns the cached outputs of whole
    residual branches.
    """

    REFRESH = 0
    CALIBRATE = 1
    REUSE = 2


def uniform_schedule(
    steps: int, interval: int, mode: StepMode = StepMode.CALIBRATE
) -> tuple[StepMode, ...]:
    """A REFRESH every `interval` steps and `mode` between: 5, 3 gives R C C R C.

    Raises:
        PlanError: steps or interval are below 1.
    """
    for name, value in (("steps", steps), ("interval", interval)):
        if value < 1:
            raise PlanError(name, expected="1 or more", got=str(value), fix=f"Raise {name}.")
    return tuple(mode if k % interval else StepMode.REFRESH for k in range(steps))


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """The part of a plan that is written as JSON.

    Attributes:
        schedule: mode of every step; the first is REFRESH.
        rank: r of every calibration branch.
        weighting: what the factors are made from.
        include, exclude: shell patterns over site names.
        signature: form of the model's calls.
        dependence: class of every tensor argument.
        timestep: the argument that shows the start of a new run, or None.
        weights_hash: of the checkpoint that the plan was made from.
    """

    schedule: tuple[StepMode, ...]
    rank: int
    weighting: Weighting
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    signature: CallSignature
    dependence: dict[str, Dependence]
    timestep: Timestep | None
    weights_hash: str

    def __post_init__(self) -> None:
        _check_schedule(self.schedule)
        if self.rank < 0:
            raise PlanError("rank", expected="0 or more", got=str(self.rank), fix="Raise the rank.")


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings and statistics, bound to one checkpoint and one form of call.

    Attributes:
        settings: see `PlanSettings`.
        statistics: by site name; empty for weighting `none`.
    """

    settings: PlanSettings
    statistics: Mapping[str, ChannelStatistics]

    @property
    def schedule(self) -> tuple[StepMode, ...]:
        """Mode of every step."""
        return self.settings.schedule

    @property
    def interval(self) -> int:
        """Longest distance from one REFRESH to the next (or to the end)."""
        marks = [k for k, mode in enumerate(self.schedule) if mode is StepMode.REFRESH]
        return max(b - a for a, b in zip(marks, [*marks[1:], len(self.schedule)], strict=True))

    @staticmethod
    def from_trajectory(
        model: nn.Module,
        trajectory: Trajectory,
        *,
        interval: int = 3,
        rank: int = 128,
        weighting: Weighting | str = Weighting.INCREMENT,
        mode: StepMode = StepMode.CALIBRATE,
        schedule: Sequence[StepMode] | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        on_step: Callable[[int, int], None] | None = None,
    ) -> Plan:
        """Plan for a model from what its sampler was seen to do.

        Args:
            model: in eval mode; the one that was recorded.
            trajectory: at least one whole run, from `record`.
            interval: steps from one REFRESH to the next.
            rank: r of every calibration branch, 0 .. the smaller side of each layer.
            weighting: `none`, `activation` or `increment`.
            mode: of the steps between two REFRESH steps.
            schedule: mode of every step; overrides interval and mode.
            include: shell patterns; sites to calibrate.
            exclude: shell patterns; sites to leave alone.
            on_step: called as on_step(done, total) while statistics are collected.

        Raises:
            CalicacheError: whatever stage refuses names itself.
        """
        settings = PlanSettings(
            schedule=uniform_schedule(trajectory.steps, interval, mode)
            if schedule is None
            else tuple(schedule),
            rank=rank,
            weighting=_weighting(weighting),
            include=tuple(include),
            exclude=tuple(exclude),
            signature=trajectory.signature,
            dependence=classify_inputs(trajectory),
            timestep=trajectory.timestep,
            weights_hash=hash_weights(model),
        )
        captured = capture(model, settings.signature)
        classes = classify_nodes(captured, settings.dependence)
        sites = find_sites(captured, classes, include, exclude)
        check_rank(rank, sites.linears)
        statistics = observe(captured, sites, trajectory, settings.weighting, on_step)
        return Plan(settings, statistics)

    def with_schedule(self, schedule: Sequence[StepMode]) -> Plan:
        """The same plan with other step modes.

        Raises:
            PlanError: the schedule is empty or does not start with REFRESH.
        """
        return replace(self, settings=replace(self.settings, schedule=tuple(schedule)))

    def with_rank(self, rank: int) -> Plan:
        """The same plan with another rank.

        Raises:
            PlanError: the rank is negative.
        """
        return replace(self, settings=replace(self.settings, rank=rank))

    def save(self, directory: Path | str) -> None:
        """Write `plan.json` and `statistics.safetensors` into a new or replaced folder."""
        with atomic_path(Path(directory)) as folder:
            folder.mkdir()
            tensors: dict[str, Tensor] = {}
            for name, statistics in self.statistics.items():
                tensors[f"{name}.input"] = statistics.input.contiguous()
                tensors[f"{name}.output"] = statistics.output.contiguous()
            save_file(tensors, folder / STATISTICS_FILE)
            written = PlanFile(FORMAT, sha256_of(folder / STATISTICS_FILE), self.settings)
            (folder / SETTINGS_FILE).write_text(
                json.dumps(_PLAN_FILE.dump_python(written, mode="json"), indent=2) + "\n"
            )

    @staticmethod
    def load(directory: Path | str) -> Plan:
        """Read what `save` wrote.

        Raises:
            PlanError: a file is missing, damaged, of another version, or not a plan.
        """
        folder = Path(directory)
        try:
            text = (folder / SETTINGS_FILE).read_bytes()
            found = json.loads(text)["format"]  # first: another format has other fields
            if found != FORMAT:
                raise ValueError(f"format {found}, this version reads {FORMAT}")
            written = _PLAN_FILE.validate_json(text)
            if sha256_of(folder / STATISTICS_FILE) != written.statistics_sha256:
                raise ValueError(f"{STATISTICS_FILE} is not the file the plan was saved with")
            tensors = load_file(folder / STATISTICS_FILE)
            names = sorted({name.rpartition(".")[0] for name in tensors})
            statistics = {
                name: ChannelStatistics(tensors[f"{name}.input"], tensors[f"{name}.output"])
                for name in names
            }
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, PlanError) as error:
            raise PlanError(
                str(directory),
                expected="a folder written by Plan.save",
                got=f"{type(error).__name__}: {error}",
                fix="Make the plan again from the trajectory.",
            ) from error
        return Plan(written.settings, statistics)


@dataclass(frozen=True, slots=True)
class PlanFile:
    """What `plan.json` holds."""

    format: int
    statistics_sha256: str
    settings: PlanSettings


_PLAN_FILE = TypeAdapter(PlanFile)


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of all parameters and saved buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):  # extra state of a module's own making
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        if not value.is_meta:
            flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(flat.numpy().data)
    return digest.hexdigest()


def check_rank(rank: int, linears: Sequence[LinearSite]) -> None:
    """Refuse a rank that some site cannot have.

    Raises:
        PlanError: with the site's name and the largest rank.
    """
    for site in linears:
        largest = min(site.in_features, site.out_features)
        if not 0 <= rank <= largest:
            raise PlanError(
                f"rank of {site.name}",
                expected=f"0 .. {largest} for a layer {site.in_features} -> {site.out_features}",
                got=str(rank),
                fix="Choose a smaller rank, or exclude the layer.",
            )


def check_statistics(plan: Plan, linears: Sequence[LinearSite]) -> None:
    """Refuse statistics that do not fit the sites or are not finite.

    Raises:
        PlanError: a site has none, of another width, or with NaN or Inf.
    """
    if plan.settings.weighting is Weighting.NONE:
        return
    for site in linears:
        statistics = plan.statistics.get(site.name)
        shapes = statistics and (tuple(statistics.input.shape), tuple(statistics.output.shape))
        finite = statistics and all(
            bool(torch.isfinite(v).all()) for v in (statistics.input, statistics.output)
        )
        if shapes != ((site.in_features,), (site.out_features,)) or not finite:
            raise PlanError(
                f"statistics of {site.name}",
                expected=f"finite values for {site.in_features} -> {site.out_features} channels",
                got="NaN or Inf" if statistics and not finite else f"shapes {shapes}",
                fix="Make the plan again from the trajectory.",
            )


def _weighting(value: Weighting | str) -> Weighting:
    try:
        return Weighting(value)
    except ValueError:
        raise PlanError(
            "weighting",
            expected=" | ".join(Weighting),
            got=repr(value),
            fix="Choose one of these.",
        ) from None


def _check_schedule(schedule: Sequence[StepMode]) -> None:
    if not schedule or schedule[0] is not StepMode.REFRESH:
        raise PlanError(
            "schedule",
            expected="a first step that is REFRESH",
            got=StepMode(schedule[0]).name if schedule else "no steps",
            fix="Start with StepMode.REFRESH: the caches are empty before it.",
        )
