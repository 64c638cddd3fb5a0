"""Plans for a subject: record its calls, probe the machine, search, time the whole."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from torch import nn

from calicache.graph_passes.api.optimize import optimize
from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.api.speed.eager import measure_eager, runtime_of
from calicache.graph_passes.api.speed.runs import RunTimes, record_parts, time_runs
from calicache.graph_passes.api.speed.store import Kept, Work
from calicache.graph_passes.api.speed.subject import Request, Subject
from calicache.graph_passes.api.speed.summary import PartSummary, Promise
from calicache.graph_passes.common.errors import CalicacheError, CalicacheWarning, PlanError
from calicache.graph_passes.common.progress import Meter, OnProgress, Progress
from calicache.graph_passes.common.rejection import Rejection
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.rewriting.workspace import Workspace
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.latency import BranchChoice, LatencyTable
from calicache.graph_passes.settings.request import SearchRequest
from calicache.graph_passes.settings.schedule import count_modes

ASKED = ("budget", "max_error", "effort", "reference")  # errors about these are the user's to mend
SHARES = {"record": 3.0, "probe": 1.0, "search": 8.0, "time": 2.0}  # of the work, in plain runs


class Stages:
    """Several pieces of work, each with its own progress, told as one.

    Args:
        on_progress: the listener; None for none.
    """

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._listener = Meter(0.0, on_progress).on_progress  # refused where it is none
        self._begun, self._done, self.total = 0.0, 0.0, sum(SHARES.values())

    def of(self, name: str, parts: int = 1) -> OnProgress:
        """The listener of the next piece.

        Args:
            name: in `SHARES`.
            parts: pieces of that name.
        """
        begun, share = self._begun, SHARES[name] / parts
        self._begun += share

        def tell(progress: Progress) -> None:
            done = begun + share * progress.done / max(progress.total, 1e-9)
            self._done = max(self._done, done)
            if self._listener:
                self._listener(Progress(self._done, self.total, progress.stage))

        return tell


@dataclass(frozen=True, slots=True)
class PartPlan:
    """A plan for one model, or why there is none, and what steps take here if that is known."""

    plan: Plan | None
    fallback: str = ""
    latency: LatencyTable | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """Plans that are to be made.

    Attributes:
        subject: what is sped up.
        requests: to be fast.
        request: what is asked of a search.
        work: what is done already.
        stages: told how far it is.
        longer: the requests in more steps, which weights aim at; none for the requests themselves.
    """

    subject: Subject
    requests: Sequence[Request]
    request: SearchRequest
    work: Work
    stages: Stages
    longer: Sequence[Request] = ()

    def run(self) -> tuple[Kept, dict[str, OptimizedModel]]:
        """Record, plan every part, time the whole."""
        recordings = self._recordings("recording", self.requests)
        references = self._recordings("reference", self.longer)
        found = {name: self._plan(name, recordings, references.get(name)) for name in recordings}
        plans = {name: part.plan for name, part in found.items() if part.plan is not None}
        models = {name: optimize(self.subject.plain[name], plan) for name, plan in plans.items()}
        last = len(self.requests) - 1
        meter = Meter(1.0, self.stages.of("time"))
        meter.stage("time whole runs")
        times = time_runs(self.subject, self.requests[last], last, models)
        meter.add()
        for model in models.values():
            model.reset()
        parts = tuple(
            _part_summary(n, part, models.get(n), references.get(n)) for n, part in found.items()
        )
        runtime = runtime_of(next(iter(self.subject.plain.values())))
        promise = Promise(parts, times.plain, times.fast, times.error, runtime, _left(parts, times))
        return Kept(promise, plans), models

    def _recordings(self, kind: str, requests: Sequence[Request]) -> dict[str, Recording]:
        """Runs of some requests, by part; of an earlier start if they are there."""
        if not requests:
            return {}
        names = list(self.subject.plain)
        known = {name: self.work.load(f"{name}.{kind}", Recording.load) for name in names}
        loaded = {name: recording for name, recording in known.items() if recording is not None}
        meter = Meter(float(len(requests)), self.stages.of("record", 1 + bool(self.longer)))
        meter.stage("run the calls" if kind == "recording" else "run the calls in more steps")
        if len(loaded) == len(names):
            return loaded
        recordings = record_parts(self.subject, requests, meter)
        for name, recording in recordings.items():
            self.work.save(f"{name}.{kind}", recording)
        return recordings

    def _plan(
        self, name: str, recordings: Mapping[str, Recording], reference: Recording | None
    ) -> PartPlan:
        model, recording = self.subject.plain[name], recordings[name]
        workspace, parts = Workspace(), len(recordings)
        tell = self.stages.of("probe", parts), self.stages.of("search", parts)
        latency: LatencyTable | None = None
        try:
            latency = self.work.load(f"{name}.latency", LatencyTable.load)
            if latency is None:
                latency = measure_eager(model, recording, workspace=workspace, on_progress=tell[0])
                self.work.save(f"{name}.latency", latency)
            search = partial(
                Plan.search,
                model,
                recording,
                budget=self.request.budget,
                max_error=self.request.max_error,
                latency=latency,
                effort=self.request.effort,
                reference=reference,
                workspace=workspace,
                on_progress=tell[1],
            )
            return PartPlan(self._searched(f"{name}.search", search), "", latency)
        except CalicacheError as error:
            return self._instead(model, recording, reference, error, latency)

    def _searched(self, name: str, search: partial[Plan]) -> Plan:
        """The plan of a search, which goes on where it was interrupted."""
        try:
            return search(path=self.work.place(name))
        except CalicacheError as error:
            if not self.work.owns(error):
                raise
            self.work.drop(name, error)
            return search()

    def _instead(
        self,
        model: nn.Module,
        recording: Recording,
        reference: Recording | None,
        error: CalicacheError,
        latency: LatencyTable | None,
    ) -> PartPlan:
        """A plan of forecasts, which needs no graph, where the search refuses.

        It is searched for where the sampler can be followed, and an even one where it cannot and
        the wish is a budget.
        """
        if isinstance(error, PlanError) and error.where == "latency":
            return PartPlan(None, str(error), latency)
        if error.where in ASKED:
            raise error
        if error.where != "sampler":  # which no search can follow, and each would run the calls
            with suppress(CalicacheError):  # the first reason is told
                plan = Plan.search(
                    model,
                    recording,
                    budget=self.request.budget,
                    max_error=self.request.max_error,
                    effort=self.request.effort,
                    modes=(StepMode.FORECAST,),
                    reference=reference,
                )
                return PartPlan(plan, str(error))
        if self.request.budget is None:
            raise error
        warnings.warn(
            f"No plan could be searched for; steps are forecast evenly instead. {error}",
            CalicacheWarning,
            stacklevel=2,
        )
        interval = math.ceil(1 / self.request.budget)
        try:
            plan = Plan.from_trajectory(
                model, recording, schedule=interval, mode=StepMode.FORECAST, order=1
            )
        except CalicacheError as other:  # such as runs of one step
            return PartPlan(None, str(other), latency)
        return PartPlan(plan, str(error), latency)


def _part_summary(
    name: str, part: PartPlan, model: OptimizedModel | None, reference: Recording | None
) -> PartSummary:
    plan, front = part.plan, part.plan.front if part.plan else None
    aims = reference is not None and plan is not None and plan.recipe.output_weights is not None
    steps, macs = "", 1.0
    rejections: tuple[Rejection, ...] = ()
    if plan is not None and model is not None:
        steps = count_modes(plan.schedule)
        if plan.recipe.touches_nothing:
            macs = plan.schedule.count(StepMode.REFRESH) / len(plan.schedule)
        else:
            macs = model.compiled.cost.run_share(plan.schedule)
            rejections = model.compiled.rejections
    return PartSummary(
        name=name,
        steps=steps,
        macs=macs,
        seconds=front.points[front.choice].cost if front and part.latency else None,
        error=front.held_out if front else None,
        fallback=part.fallback,
        slower=_slower(part.latency),
        rejections=rejections,
        aim=plan.recipe.correction if plan and aims else "",
    )


def _slower(latency: LatencyTable | None) -> dict[BranchChoice, float]:
    """Treatments that save no time here, by their share of a plain step at the least rank."""
    treated = [choice for choice in BranchChoice if choice is not BranchChoice.FULL]
    known = {choice: latency.step_shares(choice) for choice in treated} if latency else {}
    return {choice: shares[0] for choice, shares in known.items() if shares and shares[0] >= 1.0}


def _left(parts: Sequence[PartSummary], times: RunTimes) -> str:
    """Why everything stays as it was; empty where it does not."""
    if not any(part.steps for part in parts):
        return next((part.fallback for part in parts), "no model was called")
    if times.error is not None and not math.isfinite(times.error):
        return "the run under the plan diverged"
    if times.fast >= times.plain:
        return f"the plan takes {times.fast / times.plain:.2f} of the time here"
    return ""
