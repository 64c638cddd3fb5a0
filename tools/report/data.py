"""Everything that a report shows, gathered before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from calicache.export.artifact.graph_file import read_graphs
from calicache.export.artifact.manifest import GRAPHS_FILE, Layout
from calicache.export.session.session import Session
from calicache.graph_passes.api.optimize import optimize
from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.common.errors import SubjectError
from calicache.graph_passes.describe.graphs import ModelGraphs, view_graphs
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.settings.front import Front
from calicache.tools.compare.comparison import Comparison, compare
from calicache.tools.compare.operators import OperatorTime, profile
from calicache.tools.compare.site_errors import SiteErrors, site_errors
from calicache.tools.inspect.artifact_facts import ArtifactFacts
from calicache.tools.inspect.plan_facts import PlanFacts
from calicache.tools.inspect.subject_facts import inspect_subject

NO_RECORDING = "No recording was given: --recording T."
NO_MODEL = "No plan and model were given: --plan PLAN --model FILE.py:FUNCTION."
PROFILED = 1  # recorded runs


@dataclass(frozen=True, slots=True)
class EnergyCurve:
    """What ranks of one calibration target keep.

    Attributes:
        target: its name.
        rank: that the plan gives it.
        kept: share of the energy of the increments by rank, from 0 to full.
    """

    target: str
    rank: int
    kept: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class ReportData:
    """What a report shows; None where `missing` says why, by the name of the attribute.

    Attributes:
        facts: of the artifact or plan.
        graphs: of the model.
        comparison: full and optimised runs side by side.
        errors: by residual branch and step.
        operators: time of an artifact's operators.
        curves: of the calibration targets.
        front: of the search that the plan is from.
        missing: reasons.
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
    target: Path | str,
    *,
    recording: Recording | None = None,
    plan: Plan | None = None,
    model: nn.Module | None = None,
    runs: int | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> ReportData:
    """Look at an artifact or a plan, and measure what the rest allows.

    Args:
        target: an artifact's folder or a plan's.
        recording: recorded runs of the full model.
        plan: that the artifact was made from; the target itself, where that is a plan.
        model: that was planned for.
        runs: how many of the recorded ones are compared; None takes all.
        on_stage: called with what is being done.

    Raises:
        SubjectError: the target is neither, or a plan goes with another checkpoint.
        CalicacheError: a stage refuses; it names itself.
    """
    say = on_stage or (lambda _: None)
    say("look at the target")
    facts = inspect_subject(target)
    if not isinstance(facts, ArtifactFacts | PlanFacts):
        raise SubjectError(
            str(target),
            expected="an artifact or a plan, which a report can be made of",
            got=f"a file of the kind {facts.kind}",
            fix=f"Look at it with calicache inspect {target}.",
        )
    if isinstance(facts, PlanFacts):
        plan = Plan.load(target)
    _check_plan(plan, facts)
    say("optimise the model")
    optimized = optimize(model, plan) if model is not None and plan is not None else None
    missing: dict[str, str] = {}
    graphs = _graphs(facts, optimized)
    if graphs is None:
        missing["graphs"] = NO_MODEL if isinstance(facts, PlanFacts) else _NO_GRAPHS
    comparison, operators = _measured(facts, recording, runs, missing, say)
    errors = None
    if optimized is None or recording is None:
        missing["errors"] = NO_MODEL if optimized is None else NO_RECORDING
    else:
        say("compare branch by branch")
        errors = site_errors(optimized, recording)
    curves = _energy_curves(facts, optimized)
    if curves is None:
        missing["curves"] = NO_MODEL
    front = facts.front if plan is None else plan.front
    if front is None:
        missing["front"] = _NO_FRONT
    return ReportData(
        facts=facts,
        graphs=graphs,
        comparison=comparison,
        errors=errors,
        operators=operators,
        curves=curves,
        front=front,
        missing=missing,
    )


_NO_GRAPHS = "The artifact holds no graphs: export the model again."
_NO_FRONT = "The plan was not searched for: Plan.search, or calicache plan, gives a front."


def _energy_curves(
    facts: ArtifactFacts | PlanFacts, optimized: OptimizedModel | None
) -> tuple[EnergyCurve, ...] | None:
    """Of every target that has energies by rank; None where nothing knows them."""
    if optimized is not None:
        known = [
            (n, made.rank, made.kept_energy()) for n, made in optimized.compiled.factors.items()
        ]
    elif isinstance(facts, ArtifactFacts):
        known = [(target.name, target.rank, target.kept) for target in facts.targets]
    else:
        return None
    return tuple(EnergyCurve(*entry) for entry in known if entry[2])


def _check_plan(plan: Plan | None, facts: ArtifactFacts | PlanFacts) -> None:
    if plan is None or plan.binding.weights_hash == facts.weights_hash:
        return
    raise SubjectError(
        "plan",
        expected=f"the plan of the artifact's checkpoint ({facts.weights_hash[:12]})",
        got=f"one of another ({plan.binding.weights_hash[:12]})",
        fix="Give the plan that the artifact was exported from.",
    )


def _graphs(
    facts: ArtifactFacts | PlanFacts, optimized: OptimizedModel | None
) -> ModelGraphs | None:
    if optimized is not None:
        return view_graphs(optimized.compiled.captured, optimized.compiled.variant_set)
    if isinstance(facts, ArtifactFacts) and any(f.name == GRAPHS_FILE for f in facts.files):
        return read_graphs(facts.path)
    return None


def _measured(
    facts: ArtifactFacts | PlanFacts,
    recording: Recording | None,
    runs: int | None,
    missing: dict[str, str],
    say: Callable[[str], None],
) -> tuple[Comparison | None, tuple[OperatorTime, ...] | None]:
    if not isinstance(facts, ArtifactFacts):
        missing["comparison"] = missing["operators"] = (
            "A plan runs nowhere by itself: export it, and report on the artifact."
        )
        return None, None
    if recording is None:
        missing["comparison"] = missing["operators"] = NO_RECORDING
        return None, None
    say("run full and optimised side by side")
    comparison = compare(facts.path, recording, runs=runs)
    if facts.layout == Layout.SAMPLER.value:
        missing["operators"] = "The layout sampler makes its steps out of sight."
        return comparison, None
    say("time the operators")
    calls = facts.calls_per_step

    def run_once(session: Session) -> None:
        for k, call in enumerate(recording.runs[0]):
            session.step(k // calls, k % calls, **call)

    return comparison, tuple(profile(facts.path, run_once, runs=PROFILED))
