"""Everything that a report shows, gathered before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping
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
from calicache.tools.inspect.plan import PlanFacts
from calicache.tools.inspect.recording import RecordingFacts

NO_RECORDING = "No recording was given: --recording T."
NO_MODEL = "No plan and model were given: --plan PLAN --model FILE.py:FUNCTION."
PROFILED = 1  # recorded runs
_NO_FRONT = "The plan was not searched for: Plan.search, or calicache plan search, gives a front."
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
    facts = inspect_subject(path)
    if isinstance(facts, RecordingFacts):
        raise SubjectError(
            str(path),
            expected="an artifact or a plan, which a report can be made of",
            got=f"a file of the kind {facts.kind}",
            fix=f"Look at it with calicache inspect {path}.",
        )
    if isinstance(facts, PlanFacts):
        plan = Plan.load(path)
        front = plan.front
    else:
        front = facts.manifest.front
        if plan is not None:
            _check_plan(plan, facts.manifest.weights_hash)
            front = plan.front
    optimized = None
    if model is not None and plan is not None:
        _next(meter, "optimise the model")
        optimized = optimize(model, plan)
    missing: dict[str, str] = {}
    comparison, operators = _measured(facts, recording, runs, missing, meter)
    errors = None
    if optimized is None or recording is None:
        missing["errors"] = NO_MODEL if optimized is None else NO_RECORDING
    else:
        _next(meter, "compare branch by branch")
        errors = site_errors(optimized, recording)
    graphs, curves = _graphs(facts, optimized), _energy_curves(facts, optimized)
    missing |= {"graphs": NO_MODEL} if graphs is None else {}
    missing |= {"energy": "No layer is calibrated."} if curves == () else {}
    missing |= {"energy": NO_MODEL} if curves is None else {}
    missing |= {"cost": _NO_COSTS} if isinstance(facts, PlanFacts) else {}
    missing |= {"front": _NO_FRONT} if front is None else {}
    return ReportData(facts, graphs, comparison, errors, operators, curves, front, missing)


def _next(meter: Meter, stage: str) -> None:
    meter.add()
    meter.stage(stage)


def _energy_curves(
    facts: ArtifactFacts | PlanFacts, optimized: OptimizedModel | None
) -> tuple[EnergyCurve, ...] | None:
    """Of every target that has energies by rank; None where nothing knows them."""
    known: list[tuple[str, str, int, Mapping[int, float]]]
    if optimized is not None:
        targets, factors = optimized.compiled.targets, optimized.compiled.factors
        known = [
            (t.name, t.sites[0], t.rank, factors[t.name].kept_energy())
            for t in targets
            if t.name in factors
        ]
    elif isinstance(facts, ArtifactFacts):
        known = [(t.name, t.sites[0], t.rank, t.kept) for t in facts.manifest.targets]
    else:
        return None
    return tuple(EnergyCurve(*entry) for entry in known if entry[-1])


def _check_plan(plan: Plan, weights_hash: str) -> None:
    if plan.binding.weights_hash != weights_hash:
        raise SubjectError(
            "plan",
            expected=f"the plan of the artifact's checkpoint ({weights_hash[:12]})",
            got=f"one of another ({plan.binding.weights_hash[:12]})",
            fix="Give the plan that the artifact was exported from.",
        )


def _graphs(
    facts: ArtifactFacts | PlanFacts, optimized: OptimizedModel | None
) -> ModelGraphs | None:
    if optimized is not None:
        return view_graphs(optimized.compiled.captured, optimized.compiled.variant_set)
    return read_graphs(facts.path) if isinstance(facts, ArtifactFacts) else None


def _measured(
    facts: ArtifactFacts | PlanFacts,
    recording: Recording | None,
    runs: int | None,
    missing: dict[str, str],
    meter: Meter,
) -> tuple[Comparison | None, tuple[OperatorTime, ...] | None]:
    if not isinstance(facts, ArtifactFacts) or recording is None:
        why = NO_RECORDING if isinstance(facts, ArtifactFacts) else _NOWHERE
        missing |= dict.fromkeys(("steps", "operators", "images"), why)
        return None, None
    _next(meter, "run full and optimised side by side")
    comparison = compare(facts.path, recording, runs=runs)
    missing |= {"steps": comparison.no_steps} if comparison.no_steps else {}
    missing |= {"images": comparison.no_measures} if comparison.no_measures else {}
    if facts.manifest.layout is Layout.SAMPLER:
        missing["operators"] = "The layout sampler makes its steps out of sight."
        return comparison, None
    _next(meter, "time the operators")
    calls = facts.manifest.calls_per_step

    def run_once(session: Session) -> None:
        for k, call in enumerate(recording.denoisings[0]):
            session.step(k // calls, k % calls, **call)

    return comparison, tuple(profile(facts.path, run_once, runs=PROFILED))
