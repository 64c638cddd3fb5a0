"""Steps timed in ONNX Runtime: what each treatment of each group of branches costs and saves."""

from __future__ import annotations

import glob
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import nn

from calicache.export.export import export_onnx
from calicache.export.session.session import Session
from calicache.graph_passes.api.optimize import optimize
from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.common.environment import environment
from calicache.graph_passes.common.errors import BenchError, ExportError
from calicache.graph_passes.factors.statistics import SecondMoments
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.timestep import Run
from calicache.graph_passes.settings.choices import Granularity, SiteMode, SiteRule, StepMode
from calicache.graph_passes.settings.latency import (
    EVERY,
    BranchChoice,
    LatencyRow,
    LatencyTable,
    group_of,
)
from calicache.graph_passes.settings.schedule import anchor_table, uniform_schedule
from calicache.graph_passes.sites.sites import LinearSite, Sites
from calicache.graph_passes.sites.targets import CalibrationTarget, assign

INTERVAL = 3  # of the schedule that is planned for; it decides which caches are folded
LOW_SHARE, HIGH_SHARE = 16, 5  # of the width, in a rank
_LEVELS = {BranchChoice.LINEAR: Granularity.LINEAR, BranchChoice.BRANCH: Granularity.BRANCH}


def measure_latency(
    model: nn.Module,
    recording: Recording,
    *,
    order: int = 2,
    ranks: Sequence[int] | None = None,
    provider: str = "CPUExecutionProvider",
    repeats: int = 7,
    folder: Path | str | None = None,
    on_row: Callable[[int, int], None] | None = None,
) -> LatencyTable:
    """Measure on this machine what single steps take, by group of branches and treatment.

    Every row is an artifact of its own in the layout `step`, timed in turn with the plain model
    and scaled by it, so that a change of the machine meets both. Seconds do not depend on the
    values of factors: no statistics are collected, whatever a plan will use.

    Args:
        model: in eval mode; the one that was recorded.
        recording: a run of `order` + 2 steps or more, which is what the steps are fed with.
        order: of the anchors: 0, 1 or 2.
        ranks: of the calibration branches; a smaller and a larger one by the width where None.
        provider: an ONNX Runtime execution provider.
        repeats: timed steps of every kind, of which the median counts.
        folder: where artifacts are written, two at a time; a temporary one if None.
        on_row: called as on_row(done, total) after every row.

    Returns:
        Seconds of one call, of the first one where a step has several. `plain_spread` in its
        environment is how far the plain step moved between rows, as a share: far above 0.1,
        something else ran on the machine.

    Raises:
        CalicacheError: ranks or repeats below 1, a run that is too short, a provider that is not
            there, or a stage refuses; it names itself.
    """
    _check(ranks, repeats, provider)
    run = max(recording.runs, key=len)
    schedule = _schedule(len(run), order)
    plan = Plan.from_trajectory(
        model, recording, schedule=schedule, order=order, rank=0, correct=False
    )
    analysis = plan.workspace.analysis(model, plan.binding)
    keeps = bool(analysis.run_values)
    cases = list(_cases(analysis.captured, analysis.sites, ranks, keeps=keeps))
    forecast = [mode if mode is StepMode.REFRESH else StepMode.FORECAST for mode in schedule]
    # One at a time: the moments of a large model take as much memory as its weights.
    plans = chain([plan.with_schedule(forecast)], (_plan(plan, case) for case in cases))
    times: list[_Times] = []
    with tempfile.TemporaryDirectory() as scratch:
        stand = _Stand(model, run, Path(folder or scratch), provider, repeats)
        plain = stand.open("plain", plan.with_schedule(uniform_schedule(len(schedule), 1)))
        for row_plan in plans:
            times.append(stand.measure(plain, row_plan))
            if on_row:
                on_row(len(times), 1 + len(cases))
    return _table(plan, provider, cases, times)


def _table(
    plan: Plan, provider: str, cases: Sequence[_Case], times: Sequence[_Times]
) -> LatencyTable:
    """What was measured, the forecast first, as if the plain step had always taken as long."""
    beside = [taken.plain for taken in times]
    plain = statistics.median(beside)
    forecast, *rows = (taken.scaled(plain) for taken in times)
    return LatencyTable(
        weights_hash=plan.binding.weights_hash,
        runtime=f"ONNX Runtime {ort.__version__}, {provider}",
        order=plan.recipe.order,
        plain=plain,
        forecast=forecast.step,
        rows=tuple(
            LatencyRow(case.group, case.choice, case.macs, taken.refresh, taken.step)
            for case, taken in zip(cases, rows, strict=True)
        ),
        environment=_environment(beside),
    )


@dataclass(frozen=True, slots=True)
class _Case:
    """What one row treats, and how."""

    group: str
    choice: BranchChoice
    rank: int
    rules: tuple[SiteRule, ...]
    targets: tuple[CalibrationTarget, ...]

    @property
    def macs(self) -> int:
        return sum(target.calibrate_macs for target in self.targets)


@dataclass(frozen=True, slots=True)
class _Times:
    """Median seconds of a plain step, and of a row's steps in turn with it."""

    plain: float
    refresh: float
    step: float

    def scaled(self, plain: float) -> _Times:
        """What they would have been where a plain step takes `plain` seconds."""
        ratio = plain / self.plain
        return _Times(plain, self.refresh * ratio, self.step * ratio)


@dataclass(frozen=True, slots=True)
class _Stand:
    """Makes sessions and times their steps; two of them are open at a time."""

    model: nn.Module
    run: Run
    folder: Path
    provider: str
    repeats: int

    def open(self, name: str, plan: Plan) -> Session:
        """A session of an artifact; one of the same name is replaced."""
        export_onnx(optimize(self.model, plan), self.folder / name)
        return Session(self.folder / name, provider=self.provider)

    def measure(self, plain: Session, plan: Plan) -> _Times:
        """Time the last REFRESH of a plan and the step after it."""
        session = self.open("row", plan)
        marks = [k for k, mode in enumerate(plan.schedule) if mode is StepMode.REFRESH]
        last = marks[-1]
        for mark in marks:  # from here on as many refreshes are kept as in the middle of a run
            self._seconds(session, mark)
        rounds = []
        for _ in range(1 + self.repeats):
            # Each after another step of its own session, as in a run: its weights are at hand.
            self._seconds(plain, last)
            beside = self._seconds(plain, last + 1)
            self._seconds(session, last)
            refresh = self._seconds(session, last)
            rounds.append((beside, refresh, self._seconds(session, last + 1)))
        return _Times(*(statistics.median(column) for column in zip(*rounds[1:], strict=True)))

    def _seconds(self, session: Session, step: int) -> float:
        inputs: dict[str, Any] = dict(self.run[step])
        start = time.perf_counter()
        session.step(step, **inputs)
        return time.perf_counter() - start


def _schedule(steps: int, order: int) -> tuple[StepMode, ...]:
    """A short schedule with as many REFRESH steps as are kept, and one that is cheap at the end."""
    anchor_table((StepMode.REFRESH,), order)  # refuses an unknown order
    kept = order + 1
    if steps <= kept:
        raise BenchError(
            "recording",
            expected=f"a run of {kept + 1} steps or more",
            got=str(steps),
            fix="Record a longer run, or measure at a lower order.",
        )
    interval = min(INTERVAL, steps // kept)
    if interval == 1:
        return (*uniform_schedule(kept, 1), StepMode.CALIBRATE)
    return uniform_schedule(kept * interval, interval)


def _cases(
    captured: CapturedGraph, sites: Sites, ranks: Sequence[int] | None, *, keeps: bool
) -> Iterator[_Case]:
    """All treatments of every group; first none, where keeping values of a run saves by itself."""
    groups: dict[str, list[str]] = {}
    for branch in sites.branches:
        groups.setdefault(group_of(branch.name), []).append(branch.name)
    if keeps:
        yield _case(captured, sites, EVERY, BranchChoice.FULL, 0, ())
    for group, names in groups.items():
        chosen = ranks or _ranks([site for site in sites.linears if site.branch in names])
        for choice, level in _LEVELS.items():
            seen: set[int] = set()  # ranks above what the layers allow come to the same
            for rank in chosen:
                case = _case(captured, sites, group, choice, rank, names)
                whole = all(target.granularity is level for target in case.targets)
                if whole and case.macs not in seen:
                    yield case
                seen.add(case.macs)
        yield _case(captured, sites, group, BranchChoice.REUSE, 0, names)


def _case(
    captured: CapturedGraph,
    sites: Sites,
    group: str,
    choice: BranchChoice,
    rank: int,
    names: Sequence[str],
) -> _Case:
    mode = SiteMode.REUSE if choice is BranchChoice.REUSE else SiteMode.CALIBRATE
    others = [branch.name for branch in sites.branches if branch.name not in names]
    stream = [site.name for site in sites.linears if site.branch is None]
    rules = (
        *(SiteRule(glob.escape(name), SiteMode.FULL) for name in (*others, *stream)),
        *(SiteRule(glob.escape(name), mode, None, _LEVELS.get(choice)) for name in names),
    )
    # `joint` as in a plan: q, k and v together take less time than apart.
    targets, _ = assign(captured, sites, rank=rank, rules=rules, joint=True)
    return _Case(group, choice, rank, rules, targets)


def _ranks(inside: Sequence[LinearSite]) -> tuple[int, int]:
    """A smaller and a larger rank for some layers; multiples of 8 but for narrow ones."""
    width = max(min(site.in_features, site.out_features) for site in inside)
    low = max(4, 8 * round(width / LOW_SHARE / 8))
    high = max(2 * low, 8 * round(width / HIGH_SHARE / 8))
    return min(low, width), min(high, width)


def _plan(plan: Plan, case: _Case) -> Plan:
    recipe = replace(plan.recipe, rank=case.rank, rules=case.rules)
    moments = {target.name: _unit_moments(target) for target in case.targets if target.rank}
    return replace(plan, recipe=recipe, statistics=moments)


def _unit_moments(target: CalibrationTarget) -> SecondMoments:
    """What a plan holds for a target, with the unit matrix in the place of what is observed."""
    inputs, outputs = target.in_features, sum(target.out_features)
    if target.granularity is Granularity.BRANCH:
        cross = torch.eye(inputs, outputs)
        return SecondMoments(input=torch.eye(inputs), cross=cross, energy=cross.sum())
    if outputs < inputs:
        return SecondMoments(output=torch.eye(outputs))
    return SecondMoments(input=torch.eye(inputs))


def _check(ranks: Sequence[int] | None, repeats: int, provider: str) -> None:
    for name, least in (("repeats", repeats), ("ranks", min(ranks or (1,)))):
        if least < 1:
            raise BenchError(name, expected="1 or more", got=str(least), fix=f"Raise {name}.")
    valid = ort.get_available_providers()
    if provider not in valid:  # before the work, not after it as the session would
        raise ExportError(
            "provider",
            expected=" | ".join(valid),
            got=repr(provider),
            fix="Choose one of these, or install the onnxruntime package that has it.",
        )


def _environment(plain: Sequence[float]) -> dict[str, str]:
    """The machine and the versions that were measured on, and how steady the machine was."""
    facts = {name: str(value) for part in environment().values() for name, value in part.items()}
    spread = (max(plain) - min(plain)) / statistics.median(plain)
    return {**facts, "plain_spread": f"{spread:.3f}"}
