"""What a plan search stands on: the recorded runs shared out, the captured model, what is done."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from calicache.graph_passes.common.errors import NoSampler, PlanError
from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.common.ranks import Ranks
from calicache.graph_passes.factors.factors import Decompositions
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.recording.binding import Binding
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.timestep import Run
from calicache.graph_passes.rewriting.workspace import PlanningTask
from calicache.graph_passes.sampler.recover import RecordedSampler, recover_sampler, run_plain
from calicache.graph_passes.sampler.reference import aim_at, shared_clock
from calicache.graph_passes.sampler.update import SamplerSteps, latent_channels
from calicache.graph_passes.search.journal import Journal
from calicache.graph_passes.search.rehearse import Span
from calicache.graph_passes.settings.latency import LatencyTable
from calicache.graph_passes.settings.request import SearchRequest
from calicache.graph_passes.sites.analysis import Analysis, analyse_whole

LEAST_RUNS, LEAST_STEPS = 3, 5
LEAST_SAMPLES = 5  # fewer keep less than 95 % of new ones below the bound
MOST_OFF = 2e-3  # of a latent made by the recovered update: above rounding in half precision


@dataclass(frozen=True, slots=True)
class Ground:
    """The recorded runs and the model of one search.

    Attributes:
        binding: what the plan is tied to, in the form of the user's calls.
        analysis: of the model, in the form with all calls of a step in one.
        decompositions: of its calibration targets.
        recording: the runs to fit and search with, in that form.
        sampled: the same runs with their outputs, and the sampler's update.
        recorded: the same, or what the reference has in their place.
        span: the same runs in coordinates, for rehearsals.
        choice: runs to choose with; `report` runs that have no part in the search.
        journal, meter: what is done.
        ranks: the processes that share the runs.
    """

    binding: Binding
    analysis: Analysis
    decompositions: Decompositions
    recording: Recording
    sampled: RecordedSampler
    recorded: RecordedSampler
    span: Span
    choice: RecordedSampler
    report: RecordedSampler
    journal: Journal
    meter: Meter
    ranks: Ranks

    @property
    def steps(self) -> int:
        """Steps of a run."""
        return len(self.recorded.runs[0])

    @property
    def choice_samples(self) -> int:
        """Samples to choose with."""
        latent, parts = self.recorded.steps.latent, self.recorded.steps.parts
        return sum(run[0][latent].shape[0] // parts for run in self.choice.runs)


def prepare_ground(task: PlanningTask, request: SearchRequest, journal: Journal) -> Ground:
    """Share out the recorded runs, capture the model, recover the sampler.

    Args:
        task: of a model with its weights and three runs or more.
        request: what is asked for; where no mode looks inside the model, it is not captured.
        journal: results of an interrupted search.

    Raises:
        CalicacheError: too few runs or steps, runs of several kinds, or a sampler whose update
            cannot be told from the recording; whatever other stage refuses names itself.
    """
    task.check_weights("Load the weights.")
    binding, meter = task.binding, task.meter
    meter.stage("capture the model")
    try:
        whole = task.recording.by_step()
        if request.touches_nothing:
            analysis = analyse_whole(task.model, binding.by_step(), whole.calls[0])
        else:
            patterns = request.include, request.exclude
            analysis = task.workspace.analysis(task.model, binding.by_step(), *patterns)
        shares = share_out(len(whole.runs))
        parts = [whole.take_runs(places) for places in shares]
        meter.stage("run the recorded calls")
        sampled = recover_sampler(
            analysis.captured, parts[0], binding.dependence, whole.steps, meter, task.ranks
        )
    except NoSampler as unknown:
        raise _no_sampler(unknown) from unknown
    others = [_without_outputs(part, sampled, analysis.captured, task.ranks) for part in parts[1:]]
    runs = [sampled, *others]
    if task.reference is not None:
        finer = task.reference.by_step()
        shared_clock(whole, finer)
        runs = [
            aim_at(own, part, finer.take_runs(places))
            for own, part, places in zip(runs, parts, shares, strict=True)
        ]
    recorded, choice, report = runs
    return Ground(
        binding=binding,
        analysis=analysis,
        decompositions=task.workspace.decompositions,
        recording=parts[0],
        sampled=sampled,
        recorded=recorded,
        span=Span.of(recorded),
        choice=choice,
        report=report,
        journal=journal,
        meter=meter,
        ranks=task.ranks,
    )


def check_runs(recording: Recording, binding: Binding) -> None:
    """Refuse what a search cannot be made with.

    Raises:
        PlanError: too few runs or steps, runs without a result, or runs of several kinds.
    """
    runs = len(recording.runs) // recording.calls_per_step
    if runs < LEAST_RUNS:
        raise PlanError(
            "recording",
            expected=f"{LEAST_RUNS} runs or more: to search, to choose and to report with",
            got=f"{runs}",
            fix="Record more runs, with other seeds: `with record(model) as recording:`.",
        )
    shortest = min(len(run) for run in recording.runs)
    if shortest < LEAST_STEPS:
        raise PlanError(
            "recording",
            expected=f"runs of {LEAST_STEPS} steps or more",
            got=f"{shortest}",
            fix="Record whole runs of the sampler that you are going to use.",
        )
    _check_alike(recording, binding)
    if any(end is None for end in recording.ends):
        raise PlanError(
            "recording",
            expected="the result of every run",
            got="none for some",
            fix="Call recording.finish(latents) after every run.",
        )


def _check_alike(recording: Recording, binding: Binding) -> None:
    """Refuse runs of several lengths, or with other values of what depends on the step."""
    runs = recording.runs
    lengths = sorted({len(run) for run in runs})
    names = [n for n, kind in binding.dependence.items() if kind is Dependence.STEP]
    same = len(lengths) == 1 and all(
        first[name].equal(other[name])
        for run in runs[1:]
        for first, other in zip(runs[0], run, strict=True)
        for name in names
    )
    if not same:
        raise PlanError(
            "recording",
            expected="runs of one sampler, with the same steps",
            got=f"runs of {' and '.join(map(str, lengths))} steps"
            if len(lengths) > 1
            else f"runs that differ in {', '.join(names)}",
            fix="Record all runs with the sampler and the steps that you are going to use.",
        )


def check_latency(latency: LatencyTable | None, binding: Binding) -> None:
    """Refuse seconds of another checkpoint.

    Raises:
        PlanError: the table is of one.
    """
    if latency is not None and latency.weights_hash != binding.weights_hash:
        raise PlanError(
            "latency",
            expected=f"a table of this checkpoint ({binding.weights_hash[:12]})",
            got=f"of another ({latency.weights_hash[:12]})",
            fix="Measure this model.",
        )


def check_samples(request: SearchRequest, samples: int) -> None:
    """Refuse an error that is to be kept by samples, where too few tell how they spread.

    Raises:
        PlanError: there are too few.
    """
    if request.max_error is not None and samples < LEAST_SAMPLES:
        raise PlanError(
            "recording",
            expected=f"{LEAST_SAMPLES} samples or more to choose with, for a max_error",
            got=str(samples),
            fix="Record more runs: a third of them is for choosing.",
        )


def check_budget(request: SearchRequest, steps: int) -> None:
    """Refuse, before anything runs, a budget that one REFRESH and FORECAST steps do not keep.

    Where a table has other steps that may take less than these, nothing is known as early.

    Raises:
        PlanError: as `check_least`, which says it of all modes when their costs are known.
    """
    table = request.latency
    forecast = 0.0
    if table is not None and table.least_step >= table.forecast:
        forecast = min(1.0, table.forecast / table.plain)
    check_least(request, (1.0 + (steps - 1) * forecast) / steps)


def check_least(request: SearchRequest, least: float) -> None:
    """Refuse what even the cheapest plan, with a share of `least`, does not keep.

    Raises:
        PlanError: a budget below it, or a plan that saves nothing.
    """
    if request.budget is not None and request.budget < least:
        lowest = math.ceil(least * 1e4) / 1e4  # upwards: what is told can be asked for
        raise PlanError(
            "budget",
            expected=f"{lowest:.4f} or more: one REFRESH step, and the cheapest mode after it",
            got=f"{request.budget:g}",
            fix="Raise the budget, or sample with fewer steps.",
        )
    if least >= 1.0:
        raise PlanError(
            "latency",
            expected="steps of some mode that take less time than the plain model's",
            got=f"{least:.3f} of the full run's time for the fastest plan",
            fix="Run the model as it is, or measure again.",
        )


def share_out(runs: int) -> tuple[range, range, range]:
    """Places of the runs to search, to choose and to report with: disjoint, a third each."""
    each = runs // 3
    return range(runs - 2 * each), range(runs - 2 * each, runs - each), range(runs - each, runs)


def _without_outputs(
    part: Recording, like: RecordedSampler, captured: CapturedGraph, ranks: Ranks
) -> RecordedSampler:
    """Runs of the same sampler on the model's device; their outputs are not needed."""
    device = captured.device
    runs = tuple(
        [{name: value.to(device) for name, value in call.items()} for call in run]
        for run in part.runs
    )
    ends = tuple(None if end is None else end.to(device) for end in part.ends)
    ranks.map(partial(_check_update, captured, like.steps), runs)
    return RecordedSampler(runs, (), ends, like.steps)


def _check_update(captured: CapturedGraph, sampler: SamplerSteps, run: Run) -> None:
    """Refuse a run whose latents are made in another way, as with another guidance scale."""
    step = len(run) // 2
    terms: list[Tensor] = []
    for place in (step, step - 1):
        call = run[place]
        own = latent_channels(run_plain(captured, call), call[sampler.latent])
        terms += sampler.terms(call[sampler.latent], own)
    expected = sampler.next_latent(step, terms, ()).double()
    recorded = run[step + 1][sampler.latent].double()
    off = float((expected - recorded).norm() / recorded.norm())
    if off > MOST_OFF:
        raise PlanError(
            "recording",
            expected="runs of one sampler, with the same settings",
            got=f"a run whose step {step} is off by {off:.2g} of the latent",
            fix="Record all runs with the sampler and the guidance that you are going to use.",
        )


def _no_sampler(unknown: NoSampler) -> PlanError:
    return PlanError(
        "sampler",
        expected="a deterministic sampler, recorded with this model",
        got=unknown.reason,
        fix="Record with the model and the sampler that you are going to use; plan for others "
        "with Plan.from_trajectory.",
    )
