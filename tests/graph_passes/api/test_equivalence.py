"""What each step mode computes, proved against hand-written hooks on the original modules."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from model import Block, modulate
from support.factors import factors_of
from support.models import STEPS, diffusers_calls, relative, sample_dit, shake
from torch import Tensor, nn

from calicache.graph_passes import (
    OptimizedModel,
    Plan,
    Recording,
    Sites,
    StepMode,
    model_cost,
    optimize,
    record,
    uniform_schedule,
)
from calicache.graph_passes.factors.decompose import CalibrationFactors
from calicache.graph_passes.recording.binding import bind
from calicache.graph_passes.rewriting.checks import verify_variants
from calicache.graph_passes.rewriting.compile import Compiled, assign_targets
from calicache.graph_passes.rewriting.rewrite import rewrite
from calicache.graph_passes.settings.schedule import anchor_table, kept_refreshes, output_table
from calicache.graph_passes.sites.analysis import Analysis, analyse

pytestmark = pytest.mark.slow

REFRESH, CALIBRATE, REUSE, FORECAST = StepMode
CHEAP = (REFRESH, CALIBRATE, REUSE)
CALIBRATED = uniform_schedule(STEPS, 3)
REUSED = uniform_schedule(STEPS, 3, REUSE)
MIDDLE = 5

# Relative L2, rtol alone. float32 rounds at 6e-8; sums over 128 terms or fewer in two blocks,
# taken in another order, come to 8e-7 at most here. A wrong mode is at 2e-3 (tested below).
ROUNDING = 5e-6
DIFFERENT = 5e-4
# Anchors of order 1 and 2 weigh kept values by 10, -15 and 6 at most in a run of six steps:
# rounding is multiplied by their sum of magnitudes, 31. Still below DIFFERENT.
EXTRAPOLATED = 31 * ROUNDING


@dataclass(frozen=True, slots=True)
class Subject:
    """A real model, its recorded run, and its layers as the hooks will find them."""

    model: nn.Module
    sample: Callable[[nn.Module], Tensor | list[Tensor]]
    recording: Recording
    plan: Plan
    analysis: Analysis
    width: int

    @property
    def sites(self) -> Sites:
        return self.analysis.sites

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """What a model returns for the recorded calls."""
        with torch.no_grad():
            results = [model(**call) for call in self.recording.calls]
        return [result if isinstance(result, Tensor) else result.sample for result in results]

    def build(
        self, schedule: Sequence[StepMode], rank: int, *, fold: bool, order: int = 0
    ) -> OptimizedModel:
        """As `optimize` does it, but every site folded or none."""
        analysis, plan = self.analysis, self.plan.with_schedule(schedule).with_rank(rank)
        recipe = replace(plan.recipe, order=order)
        assignment = assign_targets(analysis, recipe)
        factors = factors_of(analysis.captured, assignment.targets, plan.statistics)
        variant_set = rewrite(
            analysis.captured,
            analysis.sites,
            assignment.targets,
            factors,
            set(schedule),
            folded=frozenset(factors) if fold else frozenset(),
            anchors=anchor_table(schedule, order),
            outputs=recipe.outputs,
        )
        verify_variants(analysis.captured, variant_set)
        cost = model_cost(analysis, assignment.targets, variant_set)
        compiled = Compiled(analysis, recipe, assignment, factors, variant_set, cost)
        return OptimizedModel(self.model, replace(plan, recipe=recipe), compiled)


@pytest.fixture(scope="module", params=["dit", "diffusers"])
def subject(request: pytest.FixtureRequest) -> Subject:
    # Larger weights than the fixtures': branches whose gates are wide open and change fast.
    if request.param == "dit":
        model, sample = shake(copy.deepcopy(request.getfixturevalue("dit")), 0.2), sample_dit
    else:
        model = shake(copy.deepcopy(request.getfixturevalue("diffusers_dit")), 0.2)
        sample = diffusers_calls
    with record(model) as recording:
        sample(model)
    analysis = analyse(model, bind(model, recording))
    width = min(min(site.in_features, site.out_features) for site in analysis.sites.linears)
    plan = Plan.from_trajectory(
        model, recording, rank=width, order=0, weighting="increment", correct=False
    )
    return Subject(model, sample, recording, plan, analysis, width)


Compute = Callable[[], Tensor]
Keep = Callable[[str, Compute], Tensor]


def sample_block(block: Block, keep: Keep, x: Tensor, condition: Tensor) -> Tensor:
    """Block.forward of the sample, its two branches handed to `keep`."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(condition).chunk(6, dim=-1)

    def attention() -> Tensor:
        return gate1.unsqueeze(1) * block.attn(modulate(block.norm1(x), shift1, scale1))

    def perceptron() -> Tensor:
        return gate2.unsqueeze(1) * block.mlp(modulate(block.norm2(middle), shift2, scale2))

    middle = x + keep("attention", attention)
    return middle + keep("perceptron", perceptron)


def diffusers_block(
    block: BasicTransformerBlock, keep: Keep, x: Tensor, *, timestep: Tensor, **others: Any
) -> Tensor:
    """BasicTransformerBlock.forward with adaLN-Zero, its two branches handed to `keep`."""
    normed, gate1, shift, scale, gate2 = block.norm1(
        x, timestep, others["class_labels"], hidden_dtype=x.dtype
    )

    def attention() -> Tensor:
        return gate1.unsqueeze(1) * block.attn1(normed)

    def perceptron() -> Tensor:
        return gate2.unsqueeze(1) * block.ff(
            block.norm3(middle) * (1 + scale[:, None]) + shift[:, None]
        )

    middle = x + keep("attention", attention)
    return middle + keep("perceptron", perceptron)


class Oracle(nn.Module):
    """A copy of the original model, cached by hand: no graph, only modules and hooks.

    On CALIBRATE a layer returns y* + B A (x - x*), or plain y* without factors. An anchor is the
    polynomial of the given order through the last refreshes, at the present step.
    """

    def __init__(
        self,
        subject: Subject,
        schedule: Sequence[StepMode],
        factors: Mapping[str, CalibrationFactors] | None = None,
        order: int = 0,
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(subject.model)
        self.schedule, self.step, self.mode = schedule, -1, REFRESH
        self.factors, self.order = factors, order
        self.kept: dict[Any, dict[int, Tensor]] = {}
        self.outputs: dict[int, Tensor] = {}
        names = {site.name for site in subject.sites.linears}
        for name, layer in self.model.named_modules():
            if name in names:
                layer.register_forward_hook(self._layer_hook(name))
        for block in [m for m in self.model.modules() if isinstance(m, Block)]:
            block.forward = self._block(block, sample_block)
        for block in [m for m in self.model.modules() if isinstance(m, BasicTransformerBlock)]:
            block.forward = self._block(block, diffusers_block)

    def forward(self, **call: Tensor) -> Any:
        self.step += 1
        self.mode = self.schedule[self.step]
        if self.mode is FORECAST:
            kept = sorted(self.outputs, reverse=True)[: self.order + 1]
            return self.through(self.outputs, kept)
        result = self.model(**call)
        output = result if isinstance(result, Tensor) else result.sample
        if self.mode in (REFRESH, CALIBRATE):
            self.outputs[self.step] = output
        return output

    def keep(self, name: Any, value: Tensor) -> Tensor:
        """Keep a value on REFRESH."""
        if self.mode is REFRESH:
            self.kept.setdefault(name, {})[self.step] = value
        return value

    def anchor(self, name: Any) -> Tensor:
        """The anchor of a value of REFRESH steps."""
        places = kept_refreshes(self.schedule, self.step, self.order + 1)
        return self.through(self.kept[name], places)

    def through(self, values: Mapping[int, Tensor], places: Sequence[int]) -> Tensor:
        """Newton's divided differences through the values of some steps, newest first."""
        rows = [values[place].double() for place in places]
        total, product = rows[0].clone(), 1.0
        for depth in range(1, len(places)):
            rows = [
                (b - a) / (places[k + depth] - places[k])
                for k, (a, b) in enumerate(itertools.pairwise(rows))
            ]
            product *= self.step - places[depth - 1]
            total += product * rows[0]
        return total.to(values[places[0]].dtype)

    def _layer_hook(self, name: str) -> Callable[..., Tensor]:
        def hook(_layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            if self.mode is REFRESH:
                self.keep(("x", name), args[0])
                return self.keep(("y", name), output)
            x_ref, y_ref = self.anchor(("x", name)), self.anchor(("y", name))
            if self.factors is None:
                return y_ref
            factors = self.factors[name]
            return y_ref + (args[0] - x_ref) @ factors.down.T @ factors.up.T

        return hook

    def _block(self, block: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def keep(part: str, compute: Compute) -> Tensor:
            if self.mode is REUSE:
                return self.anchor((id(block), part))
            return self.keep((id(block), part), compute())

        return lambda *args, **kwargs: forward(block, keep, *args, **kwargs)


def assert_same(got: list[Tensor], expected: list[Tensor], bound: float = ROUNDING) -> None:
    assert len(got) == len(expected) == STEPS
    for one, other in zip(got, expected, strict=True):
        assert relative(one, other) < bound


def test_oracle_that_refreshes_is_the_original(subject: Subject) -> None:
    oracle = Oracle(subject, [REFRESH] * STEPS)
    assert_same(subject.outputs(oracle), subject.outputs(subject.model))


def test_cheap_modes_differ_from_the_original_and_each_other(subject: Subject) -> None:
    # Otherwise the comparisons below would hold for anything.
    factors = subject.build(CALIBRATED, MIDDLE, fold=False).compiled.factors
    oracles = [Oracle(subject, CALIBRATED, factors), Oracle(subject, CALIBRATED)]
    runs = [subject.outputs(model) for model in [*oracles, Oracle(subject, REUSED), subject.model]]
    for one, other in itertools.combinations(runs, 2):
        for step in (1, 2, 4, 5):
            assert relative(one[step], other[step]) > DIFFERENT


def test_every_step_refreshed_is_the_original(subject: Subject) -> None:
    fast = optimize(subject.model, subject.plan.with_schedule([REFRESH] * STEPS))
    assert_same(subject.outputs(fast), subject.outputs(subject.model))


def test_every_step_refreshed_samples_what_the_original_does(subject: Subject) -> None:
    fast = optimize(subject.model, subject.plan.with_schedule([REFRESH] * STEPS))
    got, expected = subject.sample(fast), subject.sample(subject.model)
    # The graph runs the same kernels in the same order, so a run adds up no difference.
    torch.testing.assert_close(got, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("fold", [False, True], ids=["plain", "folded"])
def test_calibrate_at_full_rank_is_the_original(subject: Subject, fold: bool) -> None:
    assert {min(s.in_features, s.out_features) for s in subject.sites.linears} == {subject.width}
    fast = subject.build(CALIBRATED, subject.width, fold=fold)
    # B A is W to float32 rounding, and y_ref + W x - W x_ref loses no more than that here.
    assert_same(subject.outputs(fast), subject.outputs(subject.model))


@pytest.mark.parametrize("fold", [False, True], ids=["plain", "folded"])
def test_calibrate_at_rank_zero_returns_the_last_refreshed_outputs(
    subject: Subject, fold: bool
) -> None:
    fast = subject.build(CALIBRATED, 0, fold=fold)
    assert_same(subject.outputs(fast), subject.outputs(Oracle(subject, CALIBRATED)))


def test_calibrate_is_the_low_rank_correction_by_hand(subject: Subject) -> None:
    fast = optimize(subject.model, subject.plan.with_schedule(CALIBRATED).with_rank(MIDDLE))
    oracle = Oracle(subject, CALIBRATED, fast.compiled.factors)
    assert_same(subject.outputs(fast), subject.outputs(oracle))


@pytest.mark.parametrize("rank", [1, MIDDLE])
def test_folding_changes_nothing(subject: Subject, rank: int) -> None:
    plain = subject.build(CALIBRATED, rank, fold=False)
    folded = subject.build(CALIBRATED, rank, fold=True)
    places = [{c.folded for c in model.compiled.variant_set.caches} for model in (plain, folded)]
    assert places[0] == {None}
    assert places[1] > {site.name for site in subject.sites.linears}
    assert_same(subject.outputs(folded), subject.outputs(plain))


def test_reuse_is_branch_caching_by_hand(subject: Subject) -> None:
    fast = optimize(subject.model, subject.plan.with_schedule(REUSED))
    assert_same(subject.outputs(fast), subject.outputs(Oracle(subject, REUSED)))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "folded"])
def three_modes(request: pytest.FixtureRequest, subject: Subject) -> OptimizedModel:
    schedule = [REFRESH, CALIBRATE, REUSE] * (STEPS // 3)
    return subject.build(schedule, MIDDLE, fold=request.param)


@settings(max_examples=8, deadline=None)
@given(
    tail=st.lists(st.sampled_from(StepMode), min_size=STEPS - 1, max_size=STEPS - 1),
    order=st.sampled_from([0, 1, 2]),
    fold=st.booleans(),
)
def test_any_schedule_and_order_is_what_the_hooks_compute(
    subject: Subject, tail: list[StepMode], order: int, fold: bool
) -> None:
    schedule = (REFRESH, *tail)
    fast = subject.build(schedule, MIDDLE, fold=fold, order=order)
    oracle = Oracle(subject, schedule, fast.compiled.factors, order)
    assert_same(subject.outputs(fast), subject.outputs(oracle), EXTRAPOLATED if order else ROUNDING)


@pytest.mark.parametrize("fold", [False, True], ids=["plain", "folded"])
@pytest.mark.parametrize("order", [1, 2])
def test_calibrate_at_full_rank_is_the_original_at_every_order(
    subject: Subject, order: int, fold: bool
) -> None:
    schedule = (REFRESH, CALIBRATE) * (STEPS // 2)
    fast = subject.build(schedule, subject.width, fold=fold, order=order)
    # y* + W (x - x*) is y whatever the anchors are.
    assert_same(subject.outputs(fast), subject.outputs(subject.model), EXTRAPOLATED)


def test_every_order_gives_other_steps(subject: Subject) -> None:
    # Otherwise the comparisons above would hold for anything.
    schedule = (REFRESH, REFRESH, REFRESH, CALIBRATE, REUSE, FORECAST)
    factors = subject.build(schedule, MIDDLE, fold=False).compiled.factors
    runs = [subject.outputs(Oracle(subject, schedule, factors, order)) for order in (0, 1, 2)]
    for one, other in itertools.combinations(runs, 2):
        for step in (3, 4, 5):
            assert relative(one[step], other[step]) > DIFFERENT


def test_forecast_at_order_zero_is_the_last_refreshed_output(subject: Subject) -> None:
    schedule = uniform_schedule(STEPS, 3, FORECAST)
    got = subject.outputs(subject.build(schedule, MIDDLE, fold=False))
    plain = subject.outputs(subject.model)
    assert_same(got, [plain[step - step % 3] for step in range(STEPS)])


def test_forecast_is_linear_in_the_kept_outputs(subject: Subject) -> None:
    schedule = (REFRESH, REFRESH, REFRESH, FORECAST, FORECAST, FORECAST)
    got = subject.outputs(subject.build(schedule, MIDDLE, fold=False, order=2))
    oldest, middle, newest = subject.outputs(subject.model)[:3]
    # The parabola through 0, 1, 2 at 3, by hand.
    assert relative(got[3], 3 * newest - 3 * middle + oldest) < EXTRAPOLATED


def test_output_weights_mix_own_and_kept_outputs_and_the_latent(subject: Subject) -> None:
    schedule = (REFRESH, REUSE, REFRESH, REUSE, FORECAST, REUSE)
    order, draw = 1, torch.Generator().manual_seed(5)
    table = [[*row, 0.0] for row in output_table(schedule, order)]
    for step in range(1, STEPS):
        seen = min(order + 1, len(kept_refreshes(schedule, step, order + 1)))
        table[step][1 : 1 + seen] = torch.randn(seen, generator=draw).tolist()
        table[step][-1] = float(torch.randn((), generator=draw))
        if schedule[step] is not FORECAST:
            table[step][0] = 0.7
    plan = subject.plan.with_schedule(schedule)
    weights = tuple(map(tuple, table))
    recipe = replace(plan.recipe, order=order, output_weights=weights, latent="hidden_states")
    got = subject.outputs(optimize(subject.model, replace(plan, recipe=recipe)))
    own = subject.outputs(subject.build(schedule, MIDDLE, fold=False, order=order))
    for step in range(STEPS):
        kept = kept_refreshes(schedule, step, order + 1)
        expected = sum(w * own[k] for w, k in zip(table[step][1:-1], kept, strict=False))
        expected = expected + table[step][0] * own[step]
        x = subject.recording.calls[step]["hidden_states"]
        expected[:, : x.shape[1]] += table[step][-1] * x  # diffusers' has a learned variance
        # Weights of size 1 in float32, and one sum of four terms.
        assert relative(got[step], expected) < EXTRAPOLATED, step


@pytest.mark.parametrize("mode", [CALIBRATE, REUSE])
def test_cheap_steps_leave_the_caches_alone(
    subject: Subject, three_modes: OptimizedModel, mode: StepMode
) -> None:
    first, second = (list(call.values()) for call in subject.recording.calls[:2])
    variant_set = three_modes.compiled.variant_set
    with torch.no_grad():
        kept = variant_set.variants[REFRESH].module(*first)[variant_set.outputs :]
        caches = dict(zip([cache.name for cache in variant_set.caches], kept, strict=True))
        before = {name: value.clone() for name, value in caches.items()}
        variant = variant_set.variants[mode]
        weights = variant_set.weights_of(1)
        kept = {name: (value,) for name, value in caches.items()}
        values = variant_set.read(variant.reads, kept, weights, second[0].device)
        outputs = variant.module(*second, *values)
    assert len(variant.reads) > 0
    assert len(outputs) == variant_set.outputs  # nothing that could be written back
    for name, value in caches.items():
        assert torch.equal(value, before[name]), name  # bitwise: not written at all
