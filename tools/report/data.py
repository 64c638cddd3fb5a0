"""Everything that a report shows, gathered before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from calicache.tools.compare.site_errors import SiteErrors, site_errors
from calicache.tools.inspect.artifact import ArtifactFacts
from calicache.tools.inspect.command import inspect_subject
from calicache.tools.inspect.layers import Target
from calicache.tools.inspect.plan import PlanFacts
from calicache.tools.inspect.recording import RecordingFacts

NO_RECORDING = "No recording was given: --recording T."
NO_MODEL = "No plan and model were given: --plan PLAN --model FILE.py:FUNCTION."
PROFILED = 1  # recorded runs
_NO_FRONT = "The plan was not searched for: Plan.search, or calicache search, gives a front."
_NO_COSTS = "A plan alone has no costs: report on an artifact."
_NOWHERE = "A plan runs nowhere by itself: export it, and report on the artifact."
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
        missing: why sections of the page show nothing, by the name of the section.
    """

    facts: ArtifactFacts | PlanFacts
    graphs: ModelGraphs | None
    comparison: Comparison | None
    errors: SiteErrors | None
    operators: tuple[OperatorTime, ...] | None
    curves: tuple[EnergyCurve, ...] | None
    front: Front | None
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
    missing = {
        **_not_measured(facts, comparison),
        "errors": None if errors else NO_MODEL if optimized is None else NO_RECORDING,
        "graphs": None if graphs else NO_MODEL,
        "energy": NO_MODEL if curves is None else None if curves else "No layer is calibrated.",
        "cost": _NO_COSTS if isinstance(facts, PlanFacts) else None,
        "front": None if front else _NO_FRONT,
    }
    why = {name: reason for name, reason in missing.items() if reason}
    return ReportData(facts, graphs, comparison, errors, operators, curves, front, why)


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
    if plan is not None and plan.binding.weights_hash != weights_hash:
        raise SubjectError(
            "plan",
            expected=f"the plan of the artifact's checkpoint ({weights_hash[:12]})",
            got=f"one of another ({plan.binding.weights_hash[:12]})",
            fix="Give the plan that the artifact was exported from.",
        )


def _not_measured(
    facts: ArtifactFacts | PlanFacts, comparison: Comparison | None
) -> dict[str, str | None]:
    """Why there is nothing of a run, by section."""
    if comparison is None:
        why = NO_RECORDING if isinstance(facts, ArtifactFacts) else _NOWHERE
        return dict.fromkeys(("steps", "operators", "images"), why)
    unseen = "The layout sampler makes its steps out of sight." if comparison.no_steps else None
    return {"steps": comparison.no_steps, "operators": unseen, "images": comparison.no_measures}


def _operator_times(facts: ArtifactFacts, recording: Recording) -> tuple[OperatorTime, ...]:
    calls = facts.manifest.calls_per_step

    def run_once(session: Session) -> None:
        for k, call in enumerate(recording.denoisings[0]):
            session.step(k // calls, k % calls, **call)

    return tuple(profile(facts.path, run_once, runs=PROFILED))
