"""A plan in a few lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from calicache.graph_passes.settings.choices import BranchKind, Granularity, StepMode
from calicache.graph_passes.settings.front import ErrorSummary, Front
from calicache.graph_passes.settings.latency import BranchChoice, LatencyTable
from calicache.graph_passes.settings.recipe import Recipe
from calicache.graph_passes.settings.schedule import count_modes


def plan_text(
    recipe: Recipe,
    front: Front | None,
    in_sample: ErrorSummary | None,
    latency: LatencyTable | None,
) -> str:
    """Steps, recipe, its error, and what its steps take where that was measured.

    Args:
        recipe: of the plan.
        front: of the search that made it.
        in_sample: error of the recorded samples that it was made from.
        latency: measured seconds of the same checkpoint.
    """
    lines = [f"{len(recipe.schedule)} steps: {count_modes(recipe.schedule)}"]
    if recipe.calibrates:
        lines.append(f"CALIBRATE steps: {recipe.branch_words}")
    lines.append(f"output weights: {recipe.correction}")
    if front is not None:
        point = front.points[front.choice]
        lines.append(f"cost: {point.cost:.3f} of the full run, in {front.unit}")
        lines.append(f"error: {point.error.mean:.3g}, by {front.request}")
    else:
        lines.append(f"error: {in_sample_words(in_sample)}")
    if latency is not None:
        lines += (_mode_line(*mode, latency.runtime) for mode in _mode_shares(recipe, latency))
    return "\n".join(lines)


def in_sample_words(error: ErrorSummary | None) -> str:
    """The error of the samples that a plan was made from, in words."""
    if error is None:
        return "not measured"
    samples = f"{error.samples} recorded sample{'s' * (error.samples > 1)}"
    return f"{error.mean:.3g} in sample, over {samples}"


def _mode_shares(recipe: Recipe, latency: LatencyTable) -> Iterator[tuple[StepMode, float, float]]:
    """The cheap modes of a recipe, and what their steps take at least and most of a plain one.

    Rules for single branches are left out of account: a table adds up over groups of them.
    """
    calibrate = BranchChoice.LINEAR
    if recipe.branch is BranchKind.INT8:
        calibrate = BranchChoice.INT8
    elif recipe.granularity is Granularity.BRANCH:
        calibrate = BranchChoice.BRANCH
    forecast = latency.forecast / latency.plain
    known = {
        StepMode.CALIBRATE: latency.step_shares(calibrate),
        StepMode.REUSE: latency.step_shares(BranchChoice.REUSE),
        StepMode.FORECAST: (forecast, forecast),
    }
    for mode, shares in known.items():
        if mode in recipe.schedule and shares is not None:
            yield mode, *shares


def _mode_line(mode: StepMode, least: float, most: float, runtime: str) -> str:
    """What a step takes, from the smallest rank that was measured to the largest."""
    taken = f"{least:.2f}" if f"{least:.2f}" == f"{most:.2f}" else f"{least:.2f} to {most:.2f}"
    line = f"{mode.name} steps take {taken} of a plain step in {runtime}"
    if least >= 1.0:
        return f"{line}: SLOWER than plain here, choose another mode"
    return f"{line}: slower than plain here at high ranks" if most >= 1.0 else line
