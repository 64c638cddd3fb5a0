"""The plan: everything `optimize` needs besides the model, as plain data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calicache.graph_passes.assign import CalibrationTarget, Granularity, SiteRule
from calicache.graph_passes.covariance import SecondMoments
from calicache.graph_passes.decompose import ChannelStatistics, Weighting
from calicache.graph_passes.dependence import Dependence, classify_inputs
from calicache.graph_passes.errors import PlanError
from calicache.graph_passes.factors import Statistics
from calicache.graph_passes.files import atomic_path, sha256_of, tensor_bytes
from calicache.graph_passes.reads import find_reads
from calicache.graph_passes.record import Trajectory
from calicache.graph_passes.schedule import (
    StepMode,
    Table,
    anchor_table,
    output_table,
    uniform_schedule,
)
from calicache.graph_passes.signature import CallSignature
from calicache.graph_passes.timestep import Timestep

FORMAT = 3
SETTINGS_FILE, STATISTICS_FILE = "plan.json", "statistics.safetensors"


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """The part of a plan that is written as JSON.

    Attributes:
        schedule: mode of every step; the first is REFRESH.
        rank: r of every calibration branch that no rule gives another.
        order: of the anchors; order + 1 refreshes are kept.
        weighting: what the factors of linear layers are made from.
        granularity: where calibration branches sit.
        rules: exceptions for some sites and branches.
        include, exclude: shell patterns over site names.
        signature: form of the model's calls.
        dependence: class of every tensor argument.
        timestep: the argument that shows the start of a new run, or None.
        weights_hash: of the checkpoint that the plan was made from.
        output_weights: of a step's own output and the kept ones, by step (T, order + 2), or
            None: every output as it is.
        correction: how the output weights were made, or why there are none.
        reads: what the model reads off its tensors in every call, from `find_reads`.
        fixed: the tensor arguments that decide these reads, and the digests of their recorded
            values; no others can be passed.
    """

    schedule: tuple[StepMode, ...]
    rank: int
    order: int
    weighting: Weighting
    granularity: Granularity
    rules: tuple[SiteRule, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    signature: CallSignature
    dependence: dict[str, Dependence]
    timestep: Timestep | None
    weights_hash: str
    output_weights: Table | None = None
    correction: str = "not asked for"
    reads: str = "[]"
    fixed: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_schedule(self.schedule)
        if self.rank < 0:
            raise PlanError("rank", expected="0 or more", got=str(self.rank), fix="Raise the rank.")
        anchor_table(self.schedule, self.order)  # refuses an unknown order
        _check_output_weights(self)

    @property
    def outputs(self) -> Table | None:
        """Output weights by step; None where every output is the step's own."""
        if self.output_weights is None and StepMode.FORECAST in self.schedule:
            return output_table(self.schedule, self.order)
        return self.output_weights


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings and statistics, bound to one checkpoint and one form of call.

    Attributes:
        settings: see `PlanSettings`.
        statistics: by name of the calibration target; empty where none are needed.
    """

    settings: PlanSettings
    statistics: Mapping[str, Statistics]

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
        mode: StepMode = StepMode.CALIBRATE,
        schedule: Sequence[StepMode] | None = None,
        order: int = 2,
        weighting: Weighting | str = Weighting.COVARIANCE,
        granularity: Granularity | str = Granularity.LINEAR,
        rules: Sequence[SiteRule] = (),
        correct: bool = True,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        on_step: Callable[[int, int], None] | None = None,
    ) -> Plan:
        """Plan for a model from what its sampler was seen to do.

        The paper's method is `order=0, correct=False` with its weightings.

        Args:
            model: in eval mode; the one that was recorded.
            trajectory: at least one whole run, from `record`.
            interval: steps from one REFRESH to the next.
            rank: r of every calibration branch, 0 .. the smaller side of each layer.
            mode: of the steps between two REFRESH steps.
            schedule: mode of every step; overrides interval and mode.
            order: of the polynomial that forecasts anchors from kept refreshes: 0, 1 or 2.
            weighting: `none`, `activation`, `increment` or `covariance`.
            granularity: `linear` layers or whole residual branches are calibrated.
            rules: what to do with some sites and branches instead.
            correct: fit output weights along the corrected trajectory; where the sampler's
                update cannot be recovered, `settings.correction` says why.
            include: shell patterns; sites to calibrate.
            exclude: shell patterns; sites to leave alone.
            on_step: called as on_step(done, total) while recorded steps are run.

        Raises:
            CalicacheError: whatever stage refuses names itself.
        """
        # Here, not above: the planner runs the compiler, which takes plans.
        from calicache.graph_passes.planner import make_plan

        if schedule is None:
            schedule = uniform_schedule(trajectory.steps, interval, mode)
        settings = PlanSettings(
            schedule=tuple(schedule),
            rank=rank,
            order=order,
            weighting=_member(Weighting, weighting),
            granularity=_member(Granularity, granularity),
            rules=tuple(rules),
            include=tuple(include),
            exclude=tuple(exclude),
            signature=trajectory.signature,
            dependence=classify_inputs(trajectory),
            timestep=trajectory.timestep,
            weights_hash=hash_weights(model),
            reads=find_reads(model, trajectory),
        )
        return make_plan(model, trajectory, settings, correct=correct, on_step=on_step)

    def with_schedule(self, schedule: Sequence[StepMode]) -> Plan:
        """The same plan with other step modes, and without what was fitted to the old ones.

        Statistics of `covariance` stay those of the old schedule's lags.

        Raises:
            PlanError: the schedule is empty or does not start with REFRESH.
        """
        return self._with(schedule=tuple(schedule))

    def with_rank(self, rank: int) -> Plan:
        """The same plan with another rank, and without what was fitted to the old one.

        Raises:
            PlanError: the rank is negative.
        """
        return self._with(rank=rank)

    def _with(self, **changes: Any) -> Plan:
        unfitted = replace(
            self.settings, output_weights=None, correction="not fitted: the plan was changed"
        )
        return replace(self, settings=replace(unfitted, **changes))

    def save(self, directory: Path | str) -> None:
        """Write `plan.json` and `statistics.safetensors` into a new or replaced folder."""
        with atomic_path(Path(directory)) as folder:
            folder.mkdir()
            tensors: dict[str, Tensor] = {}
            for name, statistics in self.statistics.items():
                for part, value in _tensors(statistics).items():
                    tensors[f"{name}.{part}"] = value.contiguous()
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
            parts: dict[str, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                owner, _, part = name.rpartition(".")
                parts.setdefault(owner, {})[part] = value
            statistics = {name: _statistics(found) for name, found in parts.items()}
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
            digest.update(tensor_bytes(value))
    return digest.hexdigest()


def check_statistics(plan: Plan, targets: Sequence[CalibrationTarget]) -> None:
    """Refuse statistics that do not fit the targets or are not finite.

    Raises:
        PlanError: a target has none, of another width, or with NaN or Inf.
    """
    for target in targets:
        expected = _statistics_shapes(plan.settings.weighting, target)
        if not target.rank or not expected:
            continue
        tensors = _tensors(plan.statistics.get(target.name))
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        finite = all(bool(torch.isfinite(value).all()) for value in tensors.values())
        if shapes != expected or not finite:
            raise PlanError(
                f"statistics of {target.name}",
                expected=f"finite values of shapes {expected}",
                got="NaN or Inf"
                if shapes == expected
                else f"shapes {shapes}"
                if shapes
                else "none",
                fix="Make the plan again from the trajectory, with the steps it will run.",
            )


def _statistics_shapes(
    weighting: Weighting, target: CalibrationTarget
) -> dict[str, tuple[int, ...]]:
    inputs, outputs = target.in_features, sum(target.out_features)
    if target.granularity is Granularity.BRANCH:
        return {"input": (inputs, inputs), "cross": (inputs, outputs)}
    if weighting is Weighting.NONE:
        return {}
    if weighting is not Weighting.COVARIANCE:
        return {"input": (inputs,), "output": (outputs,)}
    return {"output": (outputs,) * 2} if outputs < inputs else {"input": (inputs,) * 2}


def _tensors(statistics: Statistics | None) -> dict[str, Tensor]:
    if statistics is None:
        return {}
    if isinstance(statistics, SecondMoments):
        return statistics.tensors()
    return {"input": statistics.input, "output": statistics.output}


def _statistics(tensors: Mapping[str, Tensor]) -> Statistics:
    if all(value.ndim == 1 for value in tensors.values()):
        return ChannelStatistics(tensors["input"], tensors["output"])
    return SecondMoments(**tensors)


def _check_schedule(schedule: Sequence[StepMode]) -> None:
    if not schedule or schedule[0] is not StepMode.REFRESH:
        raise PlanError(
            "schedule",
            expected="a first step that is REFRESH",
            got=StepMode(schedule[0]).name if schedule else "no steps",
            fix="Start with StepMode.REFRESH: the caches are empty before it.",
        )


def _check_output_weights(settings: PlanSettings) -> None:
    table = settings.output_weights
    if table is None:
        return
    width = settings.order + 2
    fits = len(table) == len(settings.schedule) and all(len(row) == width for row in table)
    if not fits or not all(math.isfinite(value) for row in table for value in row):
        raise PlanError(
            "output_weights",
            expected=f"{len(settings.schedule)} rows of {width} finite numbers",
            got=f"{len(table)} rows of {sorted({len(row) for row in table})}",
            fix="Make the plan again from the trajectory.",
        )


_Member = TypeVar("_Member", bound=StrEnum)


def _member(kind: type[_Member], value: _Member | str) -> _Member:
    try:
        return kind(value)
    except ValueError:
        raise PlanError(
            kind.__name__.lower(),
            expected=" | ".join(kind),
            got=repr(value),
            fix="Choose one of these.",
        ) from None
