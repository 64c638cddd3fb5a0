"""What a plan says by itself: no model is captured, so there are no sites and no MACs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from calicache.export.artifact.manifest import FileRecord
from calicache.graph_passes.api.plan import FORMAT, PLAN_FILE, STATISTICS_FILE, Plan
from calicache.graph_passes.common.hashing import sha256_of
from calicache.graph_passes.factors.statistics import statistics_tensors
from calicache.graph_passes.recording.signature import ConstantSpec
from calicache.graph_passes.recording.timestep import Timestep
from calicache.graph_passes.settings.choices import Granularity, SiteRule, Weighting
from calicache.graph_passes.settings.front import Front
from calicache.tools.inspect.facts import (
    Caution,
    InputFacts,
    ScheduleFacts,
    input_facts,
    same_fields,
    schedule_cautions,
    schedule_facts,
    some_names,
)
from calicache.tools.terminal.subject import PlanSubject


@dataclass(frozen=True, slots=True)
class PlannedTarget:
    """What a plan has for one calibration target, by its name.

    Attributes:
        name: of the target.
        rank: that the plan gives it by name, or None: then rules and the plan's rank count.
        statistics: shapes of its tensors by name, empty without; `bytes` of all of them.
    """

    name: str
    rank: int | None
    statistics: Mapping[str, tuple[int, ...]]
    bytes: int


@dataclass(frozen=True, slots=True)
class PlanFacts:
    """Everything that is shown of a plan; what `Binding` and `Recipe` have too is as there.

    Attributes:
        kind: `plan`.
        path: of its folder.
        format: version of `plan.json`.
        files: the plan's two files.
        inputs, constants: the arguments of a call.
        schedule: modes of the steps.
        targets: all that have statistics or a rank of their own, by name.
        front: as `calicache plan show --json` prints it; None without a search.
        warnings: what a user should know.
    """

    kind: Literal["plan"] = field(default="plan", init=False)
    path: str
    format: int
    files: tuple[FileRecord, ...]
    weights_hash: str
    inputs: tuple[InputFacts, ...]
    constants: tuple[ConstantSpec, ...]
    timestep: Timestep | None
    schedule: ScheduleFacts
    rank: int
    weighting: Weighting
    granularity: Granularity
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    rules: tuple[SiteRule, ...]
    correction: str
    targets: tuple[PlannedTarget, ...]
    front: Front | None
    warnings: tuple[Caution, ...]


def plan_facts(subject: PlanSubject) -> PlanFacts:
    """Facts of a plan that was read from a folder."""
    plan = subject.plan
    binding, recipe = plan.binding, plan.recipe
    own: dict[str, Any] = {
        "path": str(subject.path),
        "format": FORMAT,
        "files": tuple(_file(subject.path / name) for name in (PLAN_FILE, STATISTICS_FILE)),
        "inputs": input_facts(binding.signature.tensors, binding.dependence),
        "constants": binding.signature.constants,
        "schedule": schedule_facts(recipe.schedule, recipe.order),
        "targets": _targets(plan),
        "front": plan.front,
        "warnings": tuple(_cautions(plan)),
    }
    return PlanFacts(**own, **same_fields(PlanFacts, own, binding, recipe))


def _file(path: Path) -> FileRecord:
    return FileRecord(path.name, path.stat().st_size, sha256_of(path))


def _targets(plan: Plan) -> tuple[PlannedTarget, ...]:
    ranks, facts = plan.recipe.ranks, []
    for name in sorted({*plan.statistics, *ranks}):
        tensors = statistics_tensors(plan.statistics.get(name))
        shapes = {part: tuple(value.shape) for part, value in tensors.items()}
        size = sum(value.nbytes for value in tensors.values())
        facts.append(PlannedTarget(name, ranks.get(name), shapes, size))
    return tuple(facts)


def _cautions(plan: Plan) -> Iterator[Caution]:
    recipe, front = plan.recipe, plan.front
    yield from schedule_cautions(recipe.schedule, recipe.order, recipe.correction)
    missing = _without_statistics(plan)
    if missing:
        yield Caution(
            "statistics-missing",
            f"No statistics for {some_names(missing)}: the schedule has CALIBRATE steps, and "
            f"weighting {recipe.weighting.value} needs them.",
        )
    if front is None:
        return
    taken = front.points[front.taken]
    if not math.isfinite(taken.error.mean):
        yield Caution("diverged", "The point that the plan has taken diverged in the search.")
    elif front.held_out is not None and front.held_out.mean > taken.error.bound:
        yield Caution(
            "held-out-error",
            f"The held-out error {front.held_out.mean:.3g} is above the bound "
            f"{taken.error.bound:.3g} of the point: new samples may be further off.",
        )


def _without_statistics(plan: Plan) -> list[str]:
    """Targets that the plan names, and that have none though their factors need some."""
    recipe = plan.recipe
    if not recipe.calibrates or recipe.weighting is Weighting.NONE:
        return []
    named = [name for name, rank in recipe.ranks.items() if rank]
    if not named and not plan.statistics and recipe.rank:
        return ["any target"]
    return [name for name in named if name not in plan.statistics]
