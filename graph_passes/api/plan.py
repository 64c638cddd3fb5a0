"""The plan: everything `optimize` needs besides the model, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed, nn

from calicache.graph_passes.api.plan_grids import (
    check_schedule,
    recordings_for,
    recordings_of,
)
from calicache.graph_passes.api.plan_recipes import PlanRecipes
from calicache.graph_passes.api.planner import planned, rebound, searched
from calicache.graph_passes.common.arguments import of_kind, texts, whole_number
from calicache.graph_passes.common.disk.hashing import hash_weights
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.common.progress import OnProgress, part_of
from calicache.graph_passes.common.ranks import Ranks
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.rewriting.workspace import Workspace
from calicache.graph_passes.settings.choices import (
    BranchKind,
    Granularity,
    SiteRule,
    StepMode,
    Weighting,
    member,
)
from calicache.graph_passes.settings.latency import LatencyTable
from calicache.graph_passes.settings.recipe import Recipe
from calicache.graph_passes.settings.request import ALL_MODES, SearchRequest, search_modes
from calicache.graph_passes.settings.schedule import MAX_ORDER, named_schedule

OTHER_WEIGHTS = "then given other weights, with which the error was not measured"


@dataclass(frozen=True, slots=True, repr=False)
class Plan(PlanRecipes):
    """A recipe and its statistics, bound to one checkpoint and one form of call.

    A plan may hold several recipes, one for each grid of timesteps; it is then made from several
    recordings, or by `join`. `for_grid` gives the plan of one of them, which everything takes
    that is not for several; `describe`, `save`, `rebind` and `with_rank` are for all of them. The
    attributes that hold a recipe, and what was found out for it, are those of the first:
    `plan.for_grid(28).front` is that of 28 steps.

    Attributes:
        binding: the checkpoint and the calls that the plan is tied to.
        recipe: what is done at every step, and the weights that were fitted.
        statistics: by name of the calibration target; empty where none are needed.
        sampler: what the sampler does between two calls of the model, as it was recorded; None
            where that is not known.
        no_sampler: why it is not known.
        front: what a search found beside this plan; None for a plan that was not searched.
        in_sample: error of the recorded samples that the plan was made from; None where that was
            not measured, or where the plan was changed since.
        workspace: what was made of the model on the way, in memory alone; no part of the value.
        others: plans of the other recipes.
    """

    @staticmethod
    def from_trajectory(
        model: nn.Module,
        recording: Recording | Mapping[int, Recording],
        *,
        schedule: int | Sequence[StepMode | str] = 3,
        mode: StepMode | str | None = None,
        rank: int = 128,
        order: int = 2,
        weighting: Weighting | str = Weighting.COVARIANCE,
        granularity: Granularity | str = Granularity.LINEAR,
        branch: BranchKind | str = BranchKind.LOW_RANK,
        rules: Sequence[SiteRule] = (),
        correct: bool = True,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        reference: Recording | None = None,
        workspace: Workspace | None = None,
        on_progress: OnProgress | None = None,
        group: distributed.ProcessGroup | None = None,
    ) -> Plan:
        """Plan for a model from what its sampler was seen to do.

        The paper's method is `order=0, correct=False` with its weightings.

        Args:
            model: in eval mode; the one that was recorded.
            recording: at least one whole run, from `record`. Several, by their numbers of steps,
                make one plan with a recipe for each.
            schedule: steps from one REFRESH to the next, or the mode of every step: modes, their
                names, or letters as in "RCCRCC".
            mode: of the steps between two REFRESH steps of an interval; CALIBRATE where None.
            rank: r of every calibration branch, 0 .. the smaller side of each layer.
            order: of the polynomial that forecasts anchors from kept refreshes: 0, 1 or 2.
            weighting: `none`, `activation`, `increment` or `covariance`.
            granularity: `linear` layers or whole residual branches are calibrated.
            branch: calibration branches are `low_rank`, as in the paper, or all of a layer's
                weight in `int8`, which needs neither rank nor weighting.
            rules: what to do with some sites and branches instead.
            correct: fit output weights along the corrected trajectory; where the sampler's
                update cannot be recovered, `recipe.correction` says why.
            include: shell patterns; sites to calibrate.
            exclude: shell patterns; sites to leave alone.
            reference: the same runs in more steps, three times as many or more: weights then aim
                at its latents, and errors are against its results. None for those of `recording`.
            workspace: of an earlier plan for this model: what was made there is not made again.
            on_progress: told how many calls of the model were run.
            group: processes that share the recorded runs: all call this with the same arguments,
                and all get the plan. None for this one alone.

        Raises:
            CalicacheError: whatever stage refuses names itself.
        """
        of_kind("model", model, nn.Module, PlanError)
        recordings = recordings_of(recording)
        check_schedule(schedule, len(recordings))
        settings = partial(
            Recipe,
            rank=whole_number("rank", rank, PlanError, 0),
            order=whole_number("order", order, PlanError, 0, MAX_ORDER),
            weighting=member(Weighting, weighting),
            granularity=member(Granularity, granularity),
            branch=member(BranchKind, branch),
            rules=tuple(rules),
            include=texts("include", include, PlanError),
            exclude=texts("exclude", exclude, PlanError),
        )
        names, plans, ranks = [f"{one.steps} steps" for one in recordings], [], Ranks.of(group)
        for number, one in enumerate(recordings):
            recipe, told = (
                settings(named_schedule(schedule, one.steps, mode)),
                part_of(on_progress, names, number),
            )
            space = workspace or Workspace()
            content = planned(
                model, one, recipe, space, told, correct=correct, ranks=ranks, reference=reference
            )
            plans.append(Plan.of(content, space))
        return Plan.join(*plans)

    @staticmethod
    def search(
        model: nn.Module,
        recording: Recording | Mapping[int, Recording],
        *,
        budget: float | None = None,
        max_error: float | None = None,
        latency: LatencyTable | None = None,
        effort: int = 1,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        modes: Iterable[StepMode | str] = ALL_MODES,
        reference: Recording | None = None,
        path: Path | str | None = None,
        workspace: Workspace | None = None,
        on_progress: OnProgress | None = None,
        group: distributed.ProcessGroup | None = None,
    ) -> Plan:
        """The best plan under a budget, or the cheapest one under an error.

        Errors are the relative L2 error of a sample's final latents against the full run's.
        The recorded runs are shared out: some to fit and search, some to choose, some to report.

        Args:
            model: in eval mode; the one that was recorded.
            recording: three whole runs or more, each ended by `finish`. Several such, by their
                numbers of steps, make one plan with a recipe for each, every one under the request.
            budget: share of the full run's cost, above 0 and below 1.
            max_error: that 99 % of new samples stay below.
            latency: measured seconds, which the cost is then counted in; MACs without.
            effort: 1 or more; how many candidates are run for every one at effort 1.
            include: shell patterns; sites that may be calibrated.
            exclude: shell patterns; sites to leave alone.
            modes: that steps may have, FORECAST among them. With ("FORECAST",) the model is run
                whole and not captured: it may be any module, and a cost is a share of steps.
            reference: the same runs in more steps, three times as many or more: weights then aim
                at its latents, and errors are against its results. None for those of `recording`.
            path: a folder for what is done already; an interrupted search goes on from there.
            workspace: of an earlier plan for this model: what was made there is not made again.
            on_progress: told how much is done and how much is still to do.
            group: processes that share the recorded runs: all call this with the same arguments,
                and all get the plan. None for this one alone.

        Returns:
            A plan with the search's front, whose other points `take` gives.

        Raises:
            CalicacheError: the request cannot be met, or a stage refuses; it names itself.
        """
        patterns = texts("include", include, PlanError), texts("exclude", exclude, PlanError)
        request = SearchRequest(budget, max_error, latency, effort, *patterns, search_modes(modes))
        recordings = recordings_of(recording)
        names, plans, ranks = [f"{one.steps} steps" for one in recordings], [], Ranks.of(group)
        for number, one in enumerate(recordings):
            space, told = workspace or Workspace(), part_of(on_progress, names, number)
            place = path if path is None or len(names) == 1 else Path(path) / str(one.steps)
            content = searched(model, one, request, space, place, told, ranks, reference)
            plans.append(Plan.of(content, space))
        return Plan.join(*plans)

    def take(self, place: int) -> Plan:
        """The plan of another point of the front.

        Args:
            place: of the point, from 0: points stand by rising cost, and so by falling error.

        Raises:
            PlanError: the plan has no front, or no such point.
        """
        self.one(f"point {place}")
        if self.front is None:
            raise PlanError(
                f"point {place}",
                expected="a plan that a search made, with its front",
                got="a plan without a front",
                fix="Search for one: Plan.search, or calicache search.",
            )
        return replace(
            self,
            recipe=self.front.recipe(place, self.recipe),
            front=replace(self.front, choice=place),
            in_sample=None,
        )

    def with_schedule(self, schedule: Sequence[StepMode | str]) -> Plan:
        """The same plan with other step modes, and without what was fitted to the old ones.

        Statistics of `covariance` stay those of the old schedule's lags.

        Raises:
            PlanError: the schedule is empty or does not start with REFRESH.
        """
        changed = self.one("schedule")._with(schedule=named_schedule(schedule, len(schedule)))
        if len(changed.schedule) == len(self.schedule):
            return changed
        grid = self.binding.grid.counted(len(changed.schedule))
        return replace(
            changed,
            binding=replace(self.binding, grid=grid),
            sampler=None,
            no_sampler="the plan was given another length",
        )

    def with_rank(self, rank: int) -> Plan:
        """The same plan with another rank, and without what was fitted to the old one.

        Raises:
            PlanError: the rank is negative.
        """
        rank = whole_number("rank", rank, PlanError, 0)
        return Plan.join(*(plan._with(rank=rank, ranks={}) for plan in self.plans))

    def rebind(
        self,
        model: nn.Module,
        recording: Recording | Mapping[int, Recording] | None = None,
        *,
        reference: Recording | None = None,
        on_progress: OnProgress | None = None,
        group: distributed.ProcessGroup | None = None,
    ) -> Plan:
        """The plan for other weights of the same architecture: fine-tuned, or with a LoRA fused.

        Schedule, ranks and rules stay; `optimize` makes the factors from the new weights.

        Args:
            model: in eval mode.
            recording: of this model; statistics and weights are then fitted anew, without a
                search, and the error on the recorded runs is `in_sample`. Without it those of the
                old checkpoint stay, and the error is not known: `describe` says so. A plan of
                several recipes takes one of each number of steps.
            reference: of this model, as in `from_trajectory`.
            on_progress: told how many calls of the model were run.
            group: processes that share the recorded runs, as in `from_trajectory`.

        Raises:
            CalicacheError: whatever stage refuses names itself.
        """
        if recording is None:
            weights = hash_weights(model)
            return Plan.join(*(plan._with_weights(weights) for plan in self.plans))
        recordings = recordings_for([plan.binding.grid for plan in self.plans], recording)
        names, plans = [f"{name} steps" for name in self.names], []
        for number, (plan, one) in enumerate(zip(self.plans, recordings, strict=True)):
            space, told = Workspace(), part_of(on_progress, names, number)
            content = rebound(model, one, plan.recipe, space, told, Ranks.of(group), reference)
            plans.append(Plan.of(content, space))
        return Plan.join(*plans)

    def _with_weights(self, weights_hash: str) -> Plan:
        return replace(
            self,
            binding=replace(self.binding, weights_hash=weights_hash),
            recipe=replace(self.recipe, correction=f"{self.recipe.correction}; {OTHER_WEIGHTS}"),
            front=None,
            in_sample=None,
            workspace=Workspace(),
        )

    def _with(self, **changes: Any) -> Plan:
        unfitted = replace(
            self.recipe,
            output_weights=None,
            latent=None,
            correction="not fitted: the plan was changed",
        )
        return replace(self, recipe=replace(unfitted, **changes), front=None, in_sample=None)
