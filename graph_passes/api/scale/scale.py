"""What a model costs, and what planning and searching take, from shapes alone.

No value is computed, so the model may be on the meta device, and larger than any machine here.
`docs/scale.md` says how far measurements were from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod

from torch import nn

from calicache.graph_passes.api.scale.memory import (
    FLOAT32,
    SUM_DTYPE,
    factor_bytes,
    live_bytes,
    moment_numbers,
    node_bytes,
)
from calicache.graph_passes.api.scale.stages import (
    Extent,
    Stage,
    bind_stage,
    planning_stages,
    search_stages,
)
from calicache.graph_passes.factors.factors import Decompositions, make_factors
from calicache.graph_passes.graph.surgery import graph_outputs
from calicache.graph_passes.recording.binding import Binding
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.rewriting.compile import Compiled, assign_targets, compile_graphs
from calicache.graph_passes.rewriting.cost import ModelCost
from calicache.graph_passes.search.families import possible_targets
from calicache.graph_passes.settings.choices import StepMode, Weighting
from calicache.graph_passes.settings.recipe import Recipe
from calicache.graph_passes.settings.schedule import named_schedule
from calicache.graph_passes.sites.analysis import Analysis, analyse

CHEAP = (StepMode.CALIBRATE, StepMode.REUSE, StepMode.FORECAST)


@dataclass(frozen=True, slots=True)
class ModeScale:
    """Steps of one mode between the REFRESH steps of a plan.

    Attributes:
        macs: of one such call; `share` of the plain call's.
        refresh_share: MACs of a REFRESH call of that plan, against the plain call's.
        request_bytes: of the caches that one running request keeps.
    """

    macs: int
    share: float
    refresh_share: float
    request_bytes: int


@dataclass(frozen=True, slots=True)
class ModelScale:
    """What a model costs at its real size.

    Attributes:
        parameters: their number; `weight_bytes` theirs and those of buffers.
        dtype: that most parameters have.
        call_macs: multiply-accumulates of one plain call; `call_bytes` the values it holds.
        calls: of the model in a step.
        steps: of a run.
        blocks: residual branches; `sites` linear layers that can be calibrated.
        targets: of the recipe, joint where siblings are solved together.
        recipe: what modes, factors and planning are of, in words.
        modes: by mode.
        run_share: MACs of a run under the recipe's own schedule against the plain run's.
        request_bytes: of the caches under that schedule; all calls of a step.
        factor_bytes: of the calibration branches, beside the weights.
        statistics_bytes: of the recipe's statistics, as a plan holds and saves them.
        sum_bytes: the same while they are observed.
        search_statistics_bytes: of a search's, and `search_sum_bytes` while observed.
        recording_bytes: of one recorded run.
        planning: stages of `Plan.from_trajectory`; `search` of `Plan.search`.
    """

    parameters: int
    weight_bytes: int
    dtype: str
    call_macs: int
    call_bytes: int
    calls: int
    steps: int
    blocks: int
    sites: int
    targets: int
    recipe: str
    modes: Mapping[str, ModeScale]
    run_share: float
    request_bytes: int
    factor_bytes: int
    statistics_bytes: int
    sum_bytes: int
    search_statistics_bytes: int
    search_sum_bytes: int
    recording_bytes: int
    planning: tuple[Stage, ...]
    search: tuple[Stage, ...]

    def peak(self, stages: Sequence[Stage]) -> int:
        """The most bytes that stages hold on the model's device, weights included."""
        return self.weight_bytes + max(stage.nbytes for stage in stages)

    def calls_of(self, stages: Sequence[Stage]) -> float:
        """The time of stages, in plain calls of the model."""
        return sum(stage.calls + stage.macs / self.call_macs for stage in stages)

    def runs_of(self, stages: Sequence[Stage]) -> float:
        """The same in plain runs."""
        return self.calls_of(stages) / (self.steps * self.calls)


def model_scale(
    model: nn.Module, binding: Binding, recipe: Recipe, extent: Extent | None = None
) -> ModelScale:
    """Count what a model costs under a recipe, and what making it takes.

    Args:
        model: in eval mode, on the meta device.
        binding: the form of the calls, from `bind` or a plan.
        recipe: with the schedule of a run.
        extent: how much is recorded and searched.

    Raises:
        CalicacheError: whatever stage refuses names itself.
    """
    extent = extent or Extent()
    analysis = analyse(model, binding, recipe.include, recipe.exclude)
    compiled = _blank(analysis, recipe)
    tensors = dict(chain(model.named_parameters(), model.named_buffers())).values()
    parameters = list(model.parameters())
    targets, weighting = compiled.targets if recipe.calibrates else (), recipe.weighting
    possible = possible_targets(analysis)
    numbers = moment_numbers(targets, weighting)
    every = moment_numbers(possible, Weighting.COVARIANCE)
    weights = sum(value.nbytes for value in tensors)
    bound = bind_stage(analysis, weights)
    return ModelScale(
        parameters=sum(value.numel() for value in parameters),
        weight_bytes=weights,
        dtype=str(parameters[0].dtype).removeprefix("torch."),
        call_macs=analysis.plain_macs,
        call_bytes=live_bytes(analysis.captured.graph),
        calls=binding.calls,
        steps=len(recipe.schedule),
        blocks=len(analysis.sites.branches),
        sites=len(analysis.sites.linears),
        targets=len(targets),
        recipe=_in_words(recipe),
        modes=_modes(analysis, recipe, compiled),
        run_share=compiled.cost.run_share(recipe.schedule),
        request_bytes=binding.calls * compiled.cost.cache_bytes,
        factor_bytes=factor_bytes(targets, parameters[0].element_size()),
        statistics_bytes=FLOAT32 * numbers,
        sum_bytes=SUM_DTYPE.itemsize * numbers,
        search_statistics_bytes=FLOAT32 * every,
        search_sum_bytes=SUM_DTYPE.itemsize * every,
        recording_bytes=_recording_bytes(analysis, len(recipe.schedule)),
        planning=(bound, *planning_stages(compiled, extent.runs)),
        search=(bound, *search_stages(analysis, possible, len(recipe.schedule), extent)),
    )


def _blank(analysis: Analysis, recipe: Recipe) -> Compiled:
    """The graphs of a recipe, with factors that hold nothing."""
    assignment = assign_targets(analysis, recipe)
    targets = assignment.targets if recipe.calibrates else ()
    factors = make_factors(analysis.captured, targets, {}, Decompositions())
    return compile_graphs(analysis, recipe, assignment, factors)


def _modes(analysis: Analysis, recipe: Recipe, compiled: Compiled) -> dict[str, ModeScale]:
    """Of every mode, in a plan that has no other beside REFRESH."""
    steps, plain = len(recipe.schedule), analysis.plain_macs
    own = set(recipe.schedule) - {StepMode.REFRESH}
    scales: dict[str, ModeScale] = {}
    for mode in CHEAP:
        if own == {mode}:
            cost = compiled.cost
        elif analysis.sites.linears or mode is StepMode.FORECAST:
            schedule = named_schedule(3, steps, mode)
            changed = replace(recipe, schedule=schedule, output_weights=None, latent=None)
            cost = _blank(analysis, changed).cost
        else:
            continue
        scales[mode.name] = _mode(cost, mode, plain, analysis.binding.calls)
    return scales


def _mode(cost: ModelCost, mode: StepMode, plain: int, calls: int) -> ModeScale:
    macs = cost.modes[mode]
    refresh = cost.modes[StepMode.REFRESH] / plain
    return ModeScale(macs, macs / plain, refresh, calls * cost.cache_bytes)


def _recording_bytes(analysis: Analysis, steps: int) -> int:
    """Of one run: its inputs, those of a run once, and the output of every call."""
    binding = analysis.binding
    outputs = graph_outputs(analysis.captured.graph)[:1]
    returned = node_bytes(analysis.captured, [str(node) for node in outputs])
    once = each = 0
    for spec in binding.signature.tensors:
        nbytes = spec.torch_dtype.itemsize * prod(spec.shape)
        moves = binding.dependence[spec.name] > Dependence.RUN
        once, each = once + nbytes * (not moves), each + nbytes * moves
    return binding.calls * (once + steps * (each + returned))


def _in_words(recipe: Recipe) -> str:
    modes = "".join(mode.name[0] for mode in recipe.schedule)
    rank = f"rank {recipe.rank}, " if not recipe.ranks else "ranks of its own, "
    return f"{modes}, {rank}order {recipe.order}, {recipe.weighting.value}"
