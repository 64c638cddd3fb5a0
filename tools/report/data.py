"""Everything that a report shows, gathered before anything is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from calicache.export.artifact.graph_file import read_graphs
from calicache.export.artifact.manifest import Layout
from calicache.export.session.session import Session
from calicache.graph_passes.api.optimize import optimize
from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.common.errors import SubjectError
from calicache.graph_passes.common.progress import Meter, OnProgress
from calicache.graph_passes.describe.graphs import ModelGraphs, view_graphs
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.settings.front import Front
from calicache.tools.compare.comparison import Comparison, compare
from calicache.tools.compare.operators import OperatorTime, profile
from calicache.tools.compare.pictures import PictureKind
from calicache.tools.compare.site_errors import SiteErrors, site_errors
from calicache.tools.inspect.artifact import ArtifactFacts
from calicache.tools.inspect.command import inspect_subject
from calicache.tools.inspect.layers import Target
from calicache.tools.inspect.plan import PlanFacts
from calicache.tools.inspect.recording import RecordingFacts

RECORDING, PLAN, MODEL = "--recording RECORDING", "--plan PLAN", "--model FILE.py:FUNCTION"
SEARCHED = "a plan that calicache search made"
ARTIFACT = "an artifact of this plan, in its place"
PROFILED = 1  # recorded runs
_STAGES = 6  # at the most, drawing included


@dataclass(frozen=True, slots=True)
class EnergyCurve:
    """What ranks of one calibration target keep.

    Attributes:
        target: its name; `layer` a linear layer of it.
        rank: that the plan gives it.
        kept: share of the energy of the increments by rank, from 0 to full.
    """

    target: str
    layer: str
    rank: int
    kept: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class PlanPoint:
    """Where this plan is, between the cost of the full run and none.

    Attributes:
        name: what was measured, and how.
        share: of the full run's cost.
        error: relative L2 error of the results.
    """

    name: str
    share: float
    error: float


@dataclass(frozen=True, slots=True)
class ReportData:
    """What a report shows; None where `missing` says why.

    Attributes:
        facts: of the artifact or plan.
        graphs: of the model.
        comparison: full and optimised runs side by side.
        errors: by residual branch and step.
        operators: time of an artifact's operators.
        curves: of the calibration targets.
        front: of the search that the plan is from.
        points: of this plan, by what was measured here.
        missing: why sections of the page are left out, by the name of the section.
    """

    facts: ArtifactFacts | PlanFacts
    graphs: ModelGraphs | None
    comparison: Comparison | None
    errors: SiteErrors | None
    operators: tuple[OperatorTime, ...] | None
    curves: tuple[EnergyCurve, ...] | None
    front: Front | None
    points: tuple[PlanPoint, ...]
    missing: Mapping[str, str]


def gather_report(
    path: Path | str,
    *,
    recording: Recording | None = None,
    plan: Plan | None = None,
    model: nn.Module | None = None,
    runs: int | None = None,
    on_progress: OnProgress | None = None,
) -> ReportData:
    """Look at an artifact or a plan, and measure what the rest allows.

    Args:
        path: an artifact's folder or a plan's.
        recording: recorded runs of the full model.
        plan: that the artifact was made from; the subject itself, where that is a plan.
        model: that was planned for.
        runs: how many of the recorded ones are compared; None takes all.
        on_progress: told what is being done.

    Raises:
        SubjectError: the subject is neither, or a plan goes with another checkpoint.
        CalicacheError: a stage refuses; it names itself.
    """
    meter = Meter(_STAGES, on_progress)
    meter.stage("look at the artifact or plan")
    facts = _subject(path)
    if isinstance(facts, PlanFacts):
        plan, front = Plan.load(path), facts.front
    else:
        _check_plan(plan, facts.manifest.weights_hash)
        front = facts.manifest.front if plan is None else plan.front
    optimized, comparison, operators, errors = None, None, None, None
    if model is not None and plan is not None:
        _next(meter, "optimise the model")
        optimized = optimize(model, plan)
    if recording is not None and isinstance(facts, ArtifactFacts):
        _next(meter, "run full and optimised side by side")
        comparison = compare(facts.path, recording, runs=runs)
        if facts.manifest.layout is not Layout.SAMPLER:
            _next(meter, "time the operators")
            operators = _operator_times(facts, recording)
    if recording is not None and optimized is not None:
        _next(meter, "compare branch by branch")
        errors = site_errors(optimized, recording)
    graphs, curves = _inside(facts, optimized)
    points = tuple(_plan_points(comparison, errors, optimized))
    given = {RECORDING: recording, PLAN: plan, MODEL: model}
    absent = [name for name, value in given.items() if value is None]
    missing = {
        "tradeoff": None if front or points else f"{RECORDING}, or {SEARCHED}",
        "errors": None if errors else _in_words(absent),
        "graphs": None if graphs else MODEL,
        "energy": None if curves else MODEL if curves is None else "a layer that is calibrated",
        "cost": ARTIFACT if isinstance(facts, PlanFacts) else None,
        **_not_measured(facts, comparison),
    }
    why = {name: reason for name, reason in missing.items() if reason}
    return ReportData(facts, graphs, comparison, errors, operators, curves, front, points, why)


def _plan_points(
    comparison: Comparison | None,
    errors: SiteErrors | None,
    optimized: OptimizedModel | None,
) -> Iterator[PlanPoint]:
    """Where this plan is by MACs, and by time where that was measured."""
    if comparison is not None:
        error = comparison.final.mean
        yield PlanPoint("this plan by MACs", comparison.macs_share, error)
        yield PlanPoint("this plan by time, measured", 1 / comparison.speedup, error)
    elif errors is not None and errors.result is not None and optimized is not None:
        share = optimized.compiled.cost.run_share(optimized.plan.schedule)
        yield PlanPoint("this plan by MACs", share, errors.result)


def _in_words(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _subject(path: Path | str) -> ArtifactFacts | PlanFacts:
    facts = inspect_subject(path)
    if isinstance(facts, RecordingFacts):
        raise SubjectError(
            str(path),
            expected="an artifact or a plan, which a report can be made of",
            got=f"a file of the kind {facts.kind}",
            fix=f"Look at it with calicache inspect {path}.",
        )
    return facts


def _next(meter: Meter, stage: str) -> None:
    meter.add()
    meter.stage(stage)


def _inside(
    facts: ArtifactFacts | PlanFacts, optimized: OptimizedModel | None
) -> tuple[ModelGraphs | None, tuple[EnergyCurve, ...] | None]:
    """Graphs, and curves of the targets with known energies; None where nothing knows them."""
    if isinstance(facts, ArtifactFacts):
        graphs = read_graphs(facts.path)
        targets: Sequence[Target] = facts.manifest.targets
        kept = {target.name: target.kept for target in facts.manifest.targets}
    elif optimized is not None:
        compiled = optimized.compiled
        graphs, targets = view_graphs(compiled.captured, compiled.variant_set), compiled.targets
        kept = {name: factors.kept_energy() for name, factors in compiled.factors.items()}
    else:
        return None, None
    own = [target for target in targets if kept.get(target.name)]
    return graphs, tuple(EnergyCurve(t.name, t.sites[0], t.rank, kept[t.name]) for t in own)


def _check_plan(plan: Plan | None, weights_hash: str) -> None:
    if plan is not None and plan.one("plan").binding.weights_hash != weights_hash:
        raise SubjectError(
            "plan",
            expected=f"the plan of the artifact's checkpoint ({weights_hash[:12]})",
            got=f"one of another ({plan.binding.weights_hash[:12]})",
            fix="Give the plan that the artifact was exported from.",
        )


def _not_measured(
    facts: ArtifactFacts | PlanFacts, comparison: Comparison | None
) -> dict[str, str | None]:
    """What is needed to see something of a run, by section."""
    if comparison is None:
        why = RECORDING if isinstance(facts, ArtifactFacts) else f"{ARTIFACT}, and {RECORDING}"
        return dict.fromkeys(("steps", "operators", "images"), why)
    seen = None if comparison.no_steps is None else "another layout: sampler hides its steps"
    pictures = comparison.pictures
    drawn = pictures is not None and pictures.kind is not PictureKind.LATENTS
    return {"steps": seen, "operators": seen, "images": None if drawn else "results in pixels"}


def _operator_times(facts: ArtifactFacts, recording: Recording) -> tuple[OperatorTime, ...]:
    calls = facts.manifest.calls_per_step

    def run_once(session: Session) -> None:
        for k, call in enumerate(recording.denoisings[0]):
            session.step(k // calls, k % calls, **call)

    return tuple(profile(facts.path, run_once, runs=PROFILED))
