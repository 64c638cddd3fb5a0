"""From an analysis and a recipe to the graphs of all modes: the only caller of the rewrite."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import fx

from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.common.rejection import Rejection
from calicache.graph_passes.factors.factors import Decompositions, Factors, make_factors
from calicache.graph_passes.factors.statistics import Statistics, check_statistics
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.rewriting.checks import verify_variants
from calicache.graph_passes.rewriting.cost import ModelCost, model_cost
from calicache.graph_passes.rewriting.fold import choose_folds
from calicache.graph_passes.rewriting.rewrite import rewrite
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.settings.choices import StepMode, Weighting
from calicache.graph_passes.settings.recipe import Recipe
from calicache.graph_passes.settings.schedule import anchor_table
from calicache.graph_passes.sites.analysis import Analysis
from calicache.graph_passes.sites.sites import require_sites
from calicache.graph_passes.sites.targets import CalibrationTarget, assign


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a recipe's CALIBRATE steps correct.

    Attributes:
        targets: the calibration targets, in graph order.
        rejections: branches that cannot be calibrated as a whole.
    """

    targets: tuple[CalibrationTarget, ...]
    rejections: tuple[Rejection, ...] = ()


@dataclass(frozen=True, slots=True)
class Compiled:
    """A model under a recipe, for calls of one form.

    Attributes:
        analysis: the model as it is.
        recipe: what was made of it.
        assignment: what CALIBRATE steps correct.
        factors: by name of the calibration target.
        variant_set: the graph of every mode, and the caches.
        cost: of one call in every mode.
    """

    analysis: Analysis
    recipe: Recipe
    assignment: Assignment
    factors: Mapping[str, Factors]
    variant_set: VariantSet
    cost: ModelCost

    @property
    def captured(self) -> CapturedGraph:
        """The plain graph."""
        return self.analysis.captured

    @property
    def targets(self) -> tuple[CalibrationTarget, ...]:
        """The calibration targets, in graph order."""
        return self.assignment.targets

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """All that was left alone, with the reasons."""
        return (*self.analysis.sites.rejections, *self.assignment.rejections)


def assign_targets(analysis: Analysis, recipe: Recipe) -> Assignment:
    """What the CALIBRATE steps of a recipe correct.

    Raises:
        SiteError: the recipe has steps that need sites, and there is none.
        PlanError: a rank, a rule or a pattern fits nothing.
    """
    if not {StepMode.CALIBRATE, StepMode.REUSE}.isdisjoint(recipe.schedule):
        require_sites(analysis.sites)
    return Assignment(
        *assign(
            analysis.captured,
            analysis.sites,
            rank=recipe.rank,
            granularity=recipe.granularity,
            branch=recipe.branch,
            rules=recipe.rules,
            joint=recipe.weighting is Weighting.COVARIANCE,
            ranks=recipe.ranks,
        )
    )


def compile_graphs(
    analysis: Analysis,
    recipe: Recipe,
    assignment: Assignment,
    factors: Mapping[str, Factors],
    modes: Collection[StepMode] | None = None,
) -> Compiled:
    """Rewrite, check and count.

    Args:
        analysis: the model; its graph is copied, not changed.
        recipe: what to make of it.
        assignment: from `assign_targets`.
        factors: by name; of all targets where CALIBRATE is among the modes.
        modes: which variants to make; those of the schedule where None.

    Raises:
        CalicacheError: whatever stage refuses names itself.
    """
    itemsize = _itemsize(analysis.captured.module)
    history = recipe.order + 1
    variant_set = rewrite(
        analysis.captured,
        analysis.sites,
        assignment.targets,
        factors,
        frozenset(recipe.schedule if modes is None else modes),
        folded=choose_folds(assignment.targets, recipe.schedule, itemsize, history),
        anchors=anchor_table(recipe.schedule, recipe.order),
        outputs=recipe.outputs,
        latent=recipe.latent,
        run_values=analysis.run_values,
    )
    verify_variants(analysis.captured, variant_set)
    cost = model_cost(analysis, assignment.targets, variant_set)
    return Compiled(analysis, recipe, assignment, factors, variant_set, cost)


def _itemsize(module: fx.GraphModule) -> int:
    """Bytes of a number of the model; its weights may be buffers, or none."""
    weights = chain(module.parameters(), module.buffers())
    sizes = (weight.element_size() for weight in weights if weight.is_floating_point())
    return next(sizes, torch.get_default_dtype().itemsize)


def compile_recipe(
    analysis: Analysis,
    recipe: Recipe,
    statistics: Mapping[str, Statistics],
    decompositions: Decompositions,
    meter: Meter | None = None,
) -> Compiled:
    """Make the factors of a recipe, then its graphs.

    Args:
        analysis: the model.
        recipe: what to make of it.
        statistics: by name of the calibration target.
        decompositions: what has been decomposed of this checkpoint before.
        meter: counts the calibration targets.

    Raises:
        CalicacheError: statistics do not fit, or a stage refuses.
    """
    assignment = assign_targets(analysis, recipe)
    calibrated = assignment.targets if recipe.calibrates else ()
    check_statistics(statistics, recipe.weighting, calibrated)
    if meter:
        meter.expect(len(calibrated))
    factors = make_factors(analysis.captured, calibrated, statistics, decompositions, meter)
    return compile_graphs(analysis, recipe, assignment, factors)
