"""What a plan says by itself: no model is captured, so there are no sites and no MACs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from calicache.export.artifact.manifest import FileRecord
from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.plan_file import PLAN_FILE, SAMPLER_FILE, STATISTICS_FILE
from calicache.graph_passes.common.disk.hashing import sha256_of
from calicache.graph_passes.describe.text import in_sample_words
from calicache.graph_passes.factors.statistics import statistics_tensors
from calicache.graph_passes.recording.binding import Binding
from calicache.graph_passes.settings.choices import BranchKind, Weighting
from calicache.graph_passes.settings.front import ErrorSummary, Front
from calicache.graph_passes.settings.recipe import Recipe
from calicache.tools.inspect.facts import (
    Caution,
    InputFacts,
    ScheduleFacts,
    input_facts,
    schedule_cautions,
    schedule_facts,
)
from calicache.tools.terminal.front import front_lines, front_shapes
from calicache.tools.terminal.text import (
    constants_in_words,
    fact_grid,
    files_in_words,
    format_count,
    plain_table,
    schedule_strip,
    some_names,
    some_of,
    title,
)


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
    """Everything that is shown of a plan.

    Attributes:
        kind: `plan`.
        path: of its folder.
        files: of the plan.
        binding, recipe, front: as `plan.json` has them; no front without a search.
        sampler: what its tables are for, or why there are none.
        inputs: the tensor arguments of a call.
        schedule: modes of the steps.
        targets: all that have statistics or a rank of their own, by name.
        in_sample: error of the recorded samples that the plan was made from.
        warnings: what a user should know.
    """

    kind: Literal["plan"] = field(default="plan", init=False)
    path: str
    files: tuple[FileRecord, ...]
    binding: Binding
    recipe: Recipe
    sampler: str
    inputs: tuple[InputFacts, ...]
    schedule: ScheduleFacts
    targets: tuple[PlannedTarget, ...]
    front: Front | None
    in_sample: ErrorSummary | None
    warnings: tuple[Caution, ...]


def plan_facts(path: Path, plan: Plan) -> PlanFacts:
    """Facts of a plan.

    Args:
        path: its folder.
        plan: from there.

    Raises:
        PlanError: the plan has several recipes.
    """
    binding, recipe = plan.one(str(path)).binding, plan.recipe
    sampler, files = plan.sampler, [path / name for name in (PLAN_FILE, STATISTICS_FILE)]
    files += [path / SAMPLER_FILE] if (path / SAMPLER_FILE).is_file() else []
    return PlanFacts(
        path=str(path),
        files=tuple(FileRecord(f.name, f.stat().st_size, sha256_of(f)) for f in files),
        binding=binding,
        recipe=recipe,
        sampler=f"makes {sampler.latent}, {sampler.parts} in a batch"
        if sampler
        else plan.no_sampler,
        inputs=input_facts(binding.signature.tensors, binding.dependence),
        schedule=schedule_facts(recipe.schedule, recipe.order),
        targets=_targets(plan),
        front=plan.front,
        in_sample=plan.in_sample,
        warnings=tuple(_cautions(plan)),
    )


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
    fitted = recipe.output_weights is not None
    yield from schedule_cautions(recipe.schedule, recipe.order, recipe.correction, fitted=fitted)
    missing = _without_statistics(plan)
    if missing:
        yield Caution(
            "statistics-missing",
            f"No statistics for {some_names(missing)}: the schedule has CALIBRATE steps, and "
            f"weighting {recipe.weighting.value} needs them.",
        )
    if front is None:
        return
    chosen = front.points[front.choice]
    if not math.isfinite(chosen.error.mean):
        yield Caution("diverged", "The point that the plan has taken diverged in the search.")
    elif front.held_out is not None and front.held_out.mean > chosen.error.bound:
        yield Caution(
            "held-out-error",
            f"The held-out error {front.held_out.mean:.3g} is above the bound "
            f"{chosen.error.bound:.3g} of the point: new samples may be further off.",
        )


def _without_statistics(plan: Plan) -> list[str]:
    """Targets that the plan names, and that have none though their factors need some."""
    recipe = plan.recipe
    if not recipe.calibrates or recipe.weighting is Weighting.NONE:
        return []
    named = [name for name, rank in recipe.ranks.items() if rank]
    if not named and not plan.statistics and recipe.rank and recipe.branch is BranchKind.LOW_RANK:
        return ["any target"]
    return [name for name in named if name not in plan.statistics]


def describe_plan(facts: PlanFacts) -> Iterator[RenderableType]:
    """What `calicache inspect` prints of a plan."""
    yield Text("calicache plan", style="bold")
    statistics = [target for target in facts.targets if target.statistics]
    size = format_count(sum(target.bytes for target in statistics), "B")
    binding, recipe = facts.binding, facts.recipe
    yield fact_grid(
        [
            ("weights", binding.weights_hash[:16]),
            ("files", files_in_words(facts.files)),
            ("inputs", some_of([str(spec) for spec in facts.inputs])),
            ("arguments", constants_in_words(binding.signature.constants)),
            ("steps told by", binding.timestep.name if binding.timestep else "their number"),
            ("plan", recipe.branch_words),
            ("include", ", ".join(recipe.include)),
            ("exclude", ", ".join(recipe.exclude) or "nothing"),
            ("output weights", recipe.correction),
            *([] if facts.front else [("error", in_sample_words(facts.in_sample))]),
            ("sampler", facts.sampler),
            ("statistics", f"of {len(statistics)} targets, {size}"),
        ]
    )
    yield title(f"Schedule, {facts.schedule.spacing}")
    yield from schedule_strip(facts.schedule.modes)
    if recipe.rules:
        yield title("Rules for CALIBRATE steps, the first that fits counts")
        yield _rule_table(facts)
    if facts.targets and recipe.calibrates:
        yield title("Calibration targets")
        yield _target_table(facts)
    if facts.front is not None:
        yield from front_lines(facts.front)
        yield from front_shapes(facts.front)
    yield Text(
        "\nA plan alone has no model: sites, MACs and energy kept are told by an artifact.",
        style="dim",
    )


def _rule_table(facts: PlanFacts) -> Table:
    rows = (
        (rule.pattern, rule.mode, _number(rule.rank), rule.branch or rule.granularity or "-")
        for rule in facts.recipe.rules
    )
    return plain_table(["pattern", "there"], ["rank", "branches"], rows)


def _target_table(facts: PlanFacts) -> Table:
    rows = (
        (
            target.name,
            ", ".join(f"{name} {shape}" for name, shape in target.statistics.items()) or "none",
            format_count(target.bytes, "B"),
            _number(target.rank),
        )
        for target in facts.targets
    )
    return plain_table(["target", "statistics"], ["bytes", "rank"], rows)


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)
