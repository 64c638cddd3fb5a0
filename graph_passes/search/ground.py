"""What a plan search stands on: the recorded runs shared out, the captured model, what is done."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from calicache.graph_passes.common.errors import NoSampler, PlanError
from calicache.graph_passes.common.hashing import tensor_bytes
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.step_calls import batch_calls, batch_size, one_call
from calicache.graph_passes.recording.timestep import Run
from calicache.graph_passes.sampler.recover import RecordedSampler, recover_sampler, run_plain
from calicache.graph_passes.sampler.update import SamplerSteps, latent_channels
from calicache.graph_passes.search.journal import Journal
from calicache.graph_passes.settings.recipe import PlanSettings
from calicache.graph_passes.sites.analysis import analyse, fixed_values
from calicache.graph_passes.sites.sites import Sites

LEAST_RUNS, LEAST_STEPS = 3, 5
MOST_OFF = 2e-3  # of a latent made by the recovered update: above rounding in half precision


@dataclass(frozen=True, slots=True)
class SearchProgress:
    """How far a search is.

    Attributes:
        done, total: in calls of the plain model, or their like; the total is an estimate.
        stage: what is being done.
    """

    done: float
    total: float
    stage: str


class Meter:
    """Counts the calls that a search has made, for a progress bar."""

    def __init__(self, total: float, report: Callable[[SearchProgress], None] | None) -> None:
        self.total, self.report = total, report
        self.done, self.name = 0.0, ""

    def stage(self, name: str) -> None:
        """Begin a stage."""
        self.name = name
        self.add(0.0)

    def add(self, calls: float = 1.0) -> None:
        """Count calls of the plain model; a cheap step is a share of one."""
        self.done += calls
        if self.report:
            self.report(SearchProgress(self.done, max(self.total, self.done), self.name))


@dataclass(frozen=True, slots=True)
class Ground:
    """The recorded runs and the model of one search.

    Attributes:
        settings: of the plan to make, in the form of the user's calls.
        captured, sites: in the form with all calls of a step in one.
        recording: the runs to fit and search with, in that form.
        recorded: the same runs with their outputs, and the sampler's update.
        choice: runs to choose with; `report` runs that have no part in the search.
        journal, meter: what is done.
    """

    settings: PlanSettings
    captured: CapturedGraph
    sites: Sites
    recording: Recording
    recorded: RecordedSampler
    choice: RecordedSampler
    report: RecordedSampler
    journal: Journal
    meter: Meter

    @property
    def steps(self) -> int:
        """Steps of a run."""
        return len(self.settings.schedule)

    @property
    def choice_samples(self) -> int:
        """Samples to choose with."""
        latent, parts = self.recorded.steps.latent, self.recorded.steps.parts
        return sum(run[0][latent].shape[0] // parts for run in self.choice.runs)

    @property
    def dependence(self) -> Mapping[str, Dependence]:
        """Class of every tensor argument."""
        return self.settings.dependence


def prepare_ground(
    model: nn.Module,
    recording: Recording,
    settings: PlanSettings,
    journal: Journal,
    meter: Meter,
) -> Ground:
    """Share out the recorded runs, capture the model, recover the sampler.

    Raises:
        CalicacheError: too few runs or steps, runs of several kinds, or a sampler whose update
            cannot be told from the recording; whatever other stage refuses names itself.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise PlanError(
            "model",
            expected="weights, to run the recorded calls with",
            got="a model on the meta device",
            fix="Load the weights.",
        )
    check_runs(recording, settings)
    try:
        return _ground(model, recording, settings, journal, meter)
    except NoSampler as refusal:
        raise PlanError(
            "sampler",
            expected="a deterministic sampler, recorded with this model",
            got=refusal.got,
            fix="Record with the model and the sampler that you are going to use; plan for others "
            "with Plan.from_trajectory.",
        ) from refusal


def _ground(
    model: nn.Module,
    recording: Recording,
    settings: PlanSettings,
    journal: Journal,
    meter: Meter,
) -> Ground:
    meter.stage("capture the model")
    captured, sites, _ = analyse(model, settings)
    settings = replace(settings, fixed=fixed_values(captured, recording, settings.dependence))
    whole = recording
    if recording.calls_per_step > 1:
        whole = batch_calls(recording, batch_size(settings.signature, settings.dependence))
        form = replace(
            settings, signature=whole.signature, timestep=one_call(settings.timestep), fixed={}
        )
        captured, sites, _ = analyse(model, form)
    parts = [whole.take_runs(places) for places in share_out(len(whole.runs))]
    meter.stage("run the recorded calls")
    recorded = recover_sampler(
        captured, parts[0], settings.dependence, len(settings.schedule), lambda *_: meter.add()
    )
    choice, report = (_without_outputs(part, recorded, captured) for part in parts[1:])
    return Ground(settings, captured, sites, parts[0], recorded, choice, report, journal, meter)


def check_runs(recording: Recording, settings: PlanSettings) -> None:
    """Refuse what a search cannot be made with.

    Raises:
        PlanError: too few runs or steps, runs without a result, or runs of several kinds.
    """
    runs, calls = recording.runs, recording.calls_per_step
    count = len(runs) // calls
    if count < LEAST_RUNS:
        raise PlanError(
            "recording",
            expected=f"{LEAST_RUNS} runs or more: to search, to choose and to report with",
            got=f"{count}",
            fix="Record more runs, with other seeds: `with record(model) as recording:`.",
        )
    lengths = {len(run) for run in runs}
    if min(lengths) < LEAST_STEPS:
        raise PlanError(
            "recording",
            expected=f"runs of {LEAST_STEPS} steps or more",
            got=f"{min(lengths)}",
            fix="Record whole runs of the sampler that you are going to use.",
        )
    names = [n for n, kind in settings.dependence.items() if kind is Dependence.STEP]
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
            got=f"runs of {' and '.join(map(str, sorted(lengths)))} steps"
            if len(lengths) > 1
            else f"runs that differ in {', '.join(names)}",
            fix="Record all runs with the sampler and the steps that you are going to use.",
        )
    if any(end is None for end in recording.ends):
        raise PlanError(
            "recording",
            expected="the result of every run",
            got="none for some",
            fix="Call recording.finish(latents) after every run.",
        )


def share_out(runs: int) -> tuple[range, range, range]:
    """Places of the runs to search, to choose and to report with: disjoint, a third each."""
    each = runs // 3
    return range(runs - 2 * each), range(runs - 2 * each, runs - each), range(runs - each, runs)


def search_key(recording: Recording, settings: PlanSettings, request: object) -> str:
    """What the results of a search depend on, as text."""
    digest = hashlib.sha256()
    for tensors in (*recording.calls, {str(k): v for k, v in recording.results.items()}):
        for name, value in tensors.items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            digest.update(tensor_bytes(value))
    return f"{settings.weights_hash} {digest.hexdigest()} {request}"


def _without_outputs(
    part: Recording, like: RecordedSampler, captured: CapturedGraph
) -> RecordedSampler:
    def there(value: Tensor) -> Tensor:
        return value.to(captured.device)

    runs = [[{n: there(v) for n, v in call.items()} for call in run] for run in part.runs]
    ends: Sequence[Tensor | None] = [None if e is None else there(e) for e in part.ends]
    for run in runs:
        _check_update(captured, run, like.steps)
    return RecordedSampler(tuple(runs), (), tuple(ends), like.steps)


def _check_update(captured: CapturedGraph, run: Run, sampler: SamplerSteps) -> None:
    """Refuse a run whose latents are made in another way, as with another guidance scale."""
    step = len(run) // 2
    terms: list[Tensor] = []
    for place in (step, step - 1):
        call = run[place]
        own = latent_channels(run_plain(captured, call), call[sampler.latent])
        terms += sampler.terms(call[sampler.latent], own)
    made = sampler.next_latent(step, terms, ()).double()
    found = run[step + 1][sampler.latent].double()
    off = float((made - found).norm() / found.norm())
    if off > MOST_OFF:
        raise PlanError(
            "recording",
            expected="runs of one sampler, with the same settings",
            got=f"a run whose step {step} is off by {off:.2g} of the latent",
            fix="Record all runs with the sampler and the guidance that you are going to use.",
        )
