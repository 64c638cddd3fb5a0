"""Steps timed in ONNX Runtime: what each treatment of each group of branches costs and saves."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from calicache.export.export import export_onnx
from calicache.export.session.runtime import named_provider, onnx_runtime
from calicache.export.session.session import Session
from calicache.graph_passes.api.optimize import optimize
from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.speed.cases import (
    Case,
    StepTimes,
    case_plan,
    latency_cases,
    latency_schedule,
)
from calicache.graph_passes.common.arguments import of_kind, path_of, whole_number
from calicache.graph_passes.common.environment import environment
from calicache.graph_passes.common.errors import BenchError
from calicache.graph_passes.common.progress import Meter, OnProgress, check_listener
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.timestep import Run
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.latency import LatencyRow, LatencyTable
from calicache.graph_passes.settings.schedule import uniform_schedule


def measure_latency(
    model: nn.Module,
    recording: Recording,
    *,
    order: int = 2,
    ranks: Sequence[int] | None = None,
    provider: str = "CPUExecutionProvider",
    repeats: int = 7,
    path: Path | str | None = None,
    on_progress: OnProgress | None = None,
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
        path: the folder where artifacts are written, two at a time; a temporary one if None.
        on_progress: told how many rows are measured.

    Returns:
        Seconds of one call, of the first one where a step has several. `plain_spread` in its
        environment is how far the plain step moved between rows, as a share: far above 0.1,
        something else ran on the machine.

    Raises:
        CalicacheError: ranks or repeats below 1, a run that is too short, an unknown provider,
            or a stage refuses; it names itself.
    """
    of_kind("recording", recording, Recording, BenchError)
    check_listener(on_progress)
    _check(ranks, repeats, provider)
    folder = None if path is None else path_of(path, BenchError)
    run = max(recording.runs, key=len)
    schedule = latency_schedule(len(run), order)
    plan = Plan.from_trajectory(
        model, recording, schedule=schedule, order=order, rank=0, correct=False
    )
    analysis = plan.workspace.analysis(model, plan.binding)
    keeps = bool(analysis.run_values)
    cases = list(latency_cases(analysis.captured, analysis.sites, ranks, keeps=keeps))
    forecast = [mode if mode is StepMode.REFRESH else StepMode.FORECAST for mode in schedule]
    # One at a time: the moments of a large model take as much memory as its weights.
    plans = chain([plan.with_schedule(forecast)], (case_plan(plan, case) for case in cases))
    times: list[StepTimes] = []
    rows = 1 + len(cases)
    meter = Meter(rows, on_progress)
    meter.stage("export the plain model")
    with tempfile.TemporaryDirectory() as scratch:
        stand = _Stand(model, run, folder or Path(scratch), provider, repeats)
        plain = stand.open("plain", plan.with_schedule(uniform_schedule(len(schedule), 1)))
        for number, row_plan in enumerate(plans, 1):
            meter.stage(f"time steps, row {number} of {rows}")
            times.append(stand.measure(plain, row_plan))
            meter.add()
    return _table(plan, provider, cases, times)


def _table(
    plan: Plan, provider: str, cases: Sequence[Case], times: Sequence[StepTimes]
) -> LatencyTable:
    """What was measured, the forecast first, as if all plain steps were equally long."""
    beside = [row.plain for row in times]
    plain = statistics.median(beside)
    forecast, *rows = (row.scaled(plain) for row in times)
    return LatencyTable(
        weights_hash=plan.binding.weights_hash,
        runtime=f"ONNX Runtime {onnx_runtime().__version__}, {provider}",
        order=plan.recipe.order,
        plain=plain,
        forecast=forecast.cheap,
        rows=tuple(
            LatencyRow(case.group, case.choice, case.macs, row.refresh, row.cheap)
            for case, row in zip(cases, rows, strict=True)
        ),
        environment=_environment(beside),
    )


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
        export_onnx(optimize(self.model, plan), self.folder / name, check=False)
        return Session(self.folder / name, provider=self.provider)

    def measure(self, plain: Session, plan: Plan) -> StepTimes:
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
        return StepTimes(*(statistics.median(column) for column in zip(*rounds[1:], strict=True)))

    def _seconds(self, session: Session, step: int) -> float:
        inputs: dict[str, Any] = dict(self.run[step])
        start = time.perf_counter()
        session.step(step, **inputs)
        return time.perf_counter() - start


def _check(ranks: Sequence[int] | None, repeats: int, provider: str) -> None:
    whole_number("repeats", repeats, BenchError, 1)
    if ranks is not None:
        for rank in of_kind("ranks", ranks, Sequence, BenchError):  # type: ignore[type-abstract]
            whole_number("ranks", rank, BenchError, 1)
    named_provider(provider)  # before the work, not after it as the session would


def _environment(plain: Sequence[float]) -> dict[str, str]:
    """The machine and the versions that were measured on, and how steady the machine was."""
    facts = {name: str(value) for part in environment().values() for name, value in part.items()}
    spread = (max(plain) - min(plain)) / statistics.median(plain)
    return {**facts, "plain_spread": f"{spread:.3f}"}
