"""Replays of the cached sampler: weights, errors and answers, against sweeps in numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from diffusion import GuidedDDIM
from model import FashionDiT
from support.factors import factors_of
from support.models import STEPS, modes, relative, sample_dit
from support.search.toy_runs import (
    SHAPES,
    Blocks,
    Shape,
    plain_variants,
    recorded_run,
    recording_of,
    sampler_of,
    tokens,
)
from torch import Tensor, nn

from calicache.graph_passes import (
    CapturedGraph,
    Plan,
    Recording,
    StepMode,
    classify_nodes,
    find_sites,
    optimize,
    record,
)
from calicache.graph_passes.common.progress import Meter, Progress
from calicache.graph_passes.graph.capture import capture
from calicache.graph_passes.rewriting.rewrite import rewrite
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.sampler.least_squares import RIDGE
from calicache.graph_passes.sampler.recover import RecordedSampler, recover_sampler
from calicache.graph_passes.sampler.replay import Replay, replay
from calicache.graph_passes.settings.schedule import (
    Table,
    anchor_table,
    lagrange_weights,
    output_table,
)
from calicache.graph_passes.sites.targets import assign

R, C, U, F = StepMode
LONG = 8  # steps of the toys' sampler

Own = Callable[[int, Tensor], Tensor]  # what a step gives at a latent, the whole batch


class Bent(nn.Module):
    """A nonlinear function of a latent, the step and a label, float64."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(9)
        weight = torch.randn(2, 2, generator=draw, dtype=torch.float64)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        shift = (0.4 * timestep + 0.7 * labels)[:, None, None, None]
        return torch.tanh(torch.einsum("oc,bchw->bohw", self.weight, x) + shift).roll(1, -1)


# --- the sweep in numpy -------------------------------------------------------------------------


def parts_of(value: Tensor, parts: int) -> np.ndarray:
    """The parts of a batch as rows, float64."""
    return value.double().numpy().reshape(parts, -1)


class Sweep:
    """The cached sampler along recorded runs, step by step in numpy.

    Attributes:
        paths: the latents x_0 .. x_k of every run, the whole batch.
        table: weights by step: own output, kept ones, latent; 0 where a feature is not there.
    """

    def __init__(
        self, owns: Sequence[Own], recorded: RecordedSampler, letters: str, order: int
    ) -> None:
        self.owns, self.recorded, self.order = owns, recorded, order
        self.schedule, self.parts = modes(letters), recorded.steps.parts
        self.paths = [[run[0][recorded.steps.latent]] for run in recorded.runs]
        self.kept: list[dict[int, np.ndarray]] = [{} for _ in owns]
        self.before = [np.zeros((0, p[0].numel() // self.parts)) for p in self.paths]
        self.table: list[np.ndarray] = []

    def run(self, given: Table | None = None) -> Sweep:
        """All steps, with given weights or fitted ones."""
        for step in range(len(self.schedule)):
            self.advance(step, given)
        return self

    def advance(self, step: int, given: Table | None) -> None:
        mode, parts = self.schedule[step], self.parts
        outputs = [
            parts_of(o(step, p[-1]), parts) for o, p in zip(self.owns, self.paths, strict=True)
        ]
        places = sorted(self.kept[0], reverse=True)[: self.order + 1]
        features = [
            np.stack([e, *[old[k] for k in places], parts_of(path[-1], parts)])[mode is F :]
            for e, old, path in zip(outputs, self.kept, self.paths, strict=True)
        ]  # by run (K, P, n)
        terms = [0, *range(1, 1 + len(places)), self.order + 2][mode is F :]
        weights = np.array(given[step] if given else plain_row(mode, places, step, self.order))
        if step < len(self.recorded.steps.weights):
            if given is None:
                weights[terms] = self.fit(step, features, weights[terms])
            self.apply(step, features, weights[terms])
        self.table.append(weights)
        if mode in (R, C):
            for old, e in zip(self.kept, outputs, strict=True):
                old[step] = e

    def fit(self, step: int, features: list[np.ndarray], plain: np.ndarray) -> np.ndarray:
        """Ridge regression around the plain weights, as one least-squares problem."""
        scales = self.recorded.steps.weights[step][1 : 1 + self.parts]
        moves = np.concatenate([np.tensordot(f, scales, axes=(1, 0)).T for f in features])
        ridge = np.diag(np.sqrt(RIDGE) * np.linalg.norm(moves, axis=0))
        wanted = [
            following(self.recorded, k, step) - self.rest(step, k) for k in range(len(self.paths))
        ]
        target = np.concatenate([*wanted, ridge @ plain])
        weights: np.ndarray = np.linalg.lstsq(np.concatenate([moves, ridge]), target)[0]
        return weights

    def rest(self, step: int, run: int) -> np.ndarray:
        """All of the next latent that the outputs of this step have no part in."""
        row, x = self.recorded.steps.weights[step], parts_of(self.paths[run][-1], self.parts)[0]
        rest = row[0] * x
        for weight, term in zip(row[1 + self.parts :], self.before[run], strict=False):
            rest = rest + weight * term
        return rest

    def apply(self, step: int, features: list[np.ndarray], weights: np.ndarray) -> None:
        scales = np.array(self.recorded.steps.weights[step][1 : 1 + self.parts])
        for k, path in enumerate(self.paths):
            mixed = np.tensordot(weights, features[k], axes=1)
            x = self.rest(step, k) + scales @ mixed
            self.before[k] = np.concatenate([parts_of(path[-1], self.parts)[:1], mixed])
            path.append(torch.tensor(np.tile(x, self.parts)).reshape(path[0].shape).to(path[0]))

    def errors(self) -> list[float]:
        """Relative error of the last latent, sample by sample, over all runs."""
        errors, last = [], len(self.recorded.steps.weights) - 1
        for run, path in enumerate(self.paths):
            whole = path[-1].chunk(self.parts)[0].double().numpy()
            wanted = following(self.recorded, run, last).reshape(whole.shape)
            pairs = zip(whole, wanted, strict=True)
            errors += [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]
        return errors


def plain_row(mode: StepMode, places: Sequence[int], step: int, order: int) -> list[float]:
    """A forecast of the kept outputs or the own one, and nothing of the latent."""
    row = [0.0, *lagrange_weights(places, step)] if mode is F else [1.0]
    return row + [0.0] * (order + 3 - len(row))


def plain_table(schedule: Sequence[StepMode], order: int) -> Table:
    return tuple((*row, 0.0) for row in output_table(schedule, order))


def following(recorded: RecordedSampler, run: int, step: int) -> np.ndarray:
    """The recorded x_{k+1}, one copy."""
    calls, parts = recorded.runs[run], recorded.steps.parts
    if step + 1 < len(calls):
        return parts_of(calls[step + 1][recorded.steps.latent], parts)[0]
    end = recorded.ends[run]
    assert end is not None
    return end.double().numpy().ravel()


def assert_same_table(got: Table, expected: Sweep, atol: float) -> None:
    for row, other in zip(got, expected.table, strict=True):
        assert len(row) == len(other) == expected.order + 3
        np.testing.assert_allclose(row, other, rtol=0, atol=atol)


# --- a toy in float64 ---------------------------------------------------------------------------


def bent(shape: Shape, seeds: Sequence[int] = (1, 2)) -> tuple[RecordedSampler, list[Own]]:
    """Recorded runs of two samples each, and what the model gives at another latent."""
    model = Bent()
    recorded = recording_of(model, sampler_of(shape, LONG), (2, 2, 3, 4), seeds)

    def own(run: int) -> Own:
        return lambda step, x: model(**{**recorded.runs[run][step], "x": x})

    return recorded, [own(run) for run in range(len(seeds))]


SCHEDULES = ["RFFRFFRF", "RRFFFRRF", "RFRFRFRR", "RRRRFFFF", "RFFFFFFF"]


@pytest.mark.slow
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("letters", SCHEDULES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weights_errors_and_answers_are_those_of_a_sweep_in_numpy(
    shape: Shape, letters: str, order: int
) -> None:
    recorded, owns = bent(shape)
    result = replay(bent_variants(recorded), recorded, modes(letters), order)
    expected = Sweep(owns, recorded, letters, order).run()
    # All in float64. Normal equations with a ridge of 1e-6 (condition 1e6) lose 1e-10 of weights
    # of size 1 to a direct solution at every step, and each step goes on from the last.
    assert_same_table(result.weights, expected, atol=1e-6)
    assert result.errors == pytest.approx(expected.errors(), rel=1e-6, abs=1e-9)
    assert len(result.errors) == 4
    assert_same_answers(result, expected)


def bent_variants(recorded: RecordedSampler) -> VariantSet:
    return _bent_variants(recorded.steps.parts)


@cache
def _bent_variants(parts: int) -> VariantSet:
    return plain_variants(Bent(), dict(bent((parts, 0))[0].runs[0][0]))


def assert_same_answers(result: Replay, sweep: Sweep) -> None:
    """Least squares of e^ - e on x^ - x over all runs, by numpy, wherever a REFRESH was off."""
    expected, recorded = {}, sweep.recorded
    for step, mode in enumerate(sweep.schedule):
        dx, de = [], []
        for run, (path, own) in enumerate(zip(sweep.paths, sweep.owns, strict=True)):
            dx.append((path[step] - recorded.runs[run][step]["x"]).numpy().ravel())
            exact = recorded.outputs[run][step]
            de.append((own(step, path[step]) - exact).numpy().ravel())
        x, e = np.concatenate(dx), np.concatenate(de)
        if mode is R and np.linalg.norm(x) > 1e-3:  # off by far more than rounding
            (gain,), (left,), *_ = np.linalg.lstsq(x[:, None], e, rcond=None)
            expected[step] = (gain, np.sqrt(left) / np.linalg.norm(x))
    assert set(result.answers) == set(expected)
    for step, answer in result.answers.items():
        # The latents agree to 1e-7, and are off by 1e-3 or more.
        assert (answer.gain, answer.spread) == pytest.approx(expected[step], rel=1e-4, abs=1e-4)


def given_table(order: int) -> Table:
    """Some weights near the plain ones."""
    draw = np.random.default_rng(2)
    rows = [[0.9, *[0.1 / (order + 1)] * (order + 1), 0.0] for _ in range(LONG)]
    return tuple(tuple(row) for row in (np.array(rows) + draw.uniform(-0.1, 0.1)).tolist())


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_given_weights_are_used_as_they_are(shape: Shape, order: int) -> None:
    recorded, owns = bent(shape)
    given = given_table(order)
    schedule = modes("RFFRFRRF")
    result = replay(bent_variants(recorded), recorded, schedule, order, given)
    assert result.weights == given
    expected = Sweep(owns, recorded, "RFFRFRRF", order).run(given)
    # Eight updates in float64, in another order of the same sums.
    assert result.errors == pytest.approx(expected.errors(), rel=1e-9)
    assert min(result.errors) > 1e-3
    assert_same_answers(result, expected)


def test_fitted_weights_given_back_lead_to_the_same_errors() -> None:
    recorded, _ = bent((2, 1))
    variants, schedule = bent_variants(recorded), modes("RFFRFRFR")
    fitted = replay(variants, recorded, schedule, 2)
    again = replay(variants, recorded, schedule, 2, fitted.weights)
    assert again.weights == fitted.weights
    # The same program on the same numbers, but for the alignment of sums.
    assert again.errors == pytest.approx(fitted.errors, rel=1e-9)
    plain = replay(variants, recorded, schedule, 2, plain_table(schedule, 2))
    assert sum(again.errors) < 0.9 * sum(plain.errors)


def test_weights_of_one_sampling_serve_other_runs() -> None:
    recorded, _ = bent((1, 0), seeds=(1, 2))
    other, owns = bent((1, 0), seeds=(3,))
    schedule = modes("RFFRFRFR")
    weights = replay(bent_variants(recorded), recorded, schedule, 1).weights
    blind = replace(other, outputs=())
    result = replay(bent_variants(other), blind, schedule, 1, weights)
    expected = Sweep(owns, other, "RFFRFRFR", 1).run(weights)
    assert result.errors == pytest.approx(expected.errors(), rel=1e-9)
    assert result.answers == {}  # the recorded outputs are not known


@pytest.mark.parametrize(
    ("letters", "steps"),
    [("RRRRRRRR", ()), ("RRRFRRFR", (4, 5, 7)), ("RFFFFFFF", ()), ("RFFFFFFR", (7,))],
)
def test_answers_are_there_where_a_refresh_was_off(letters: str, steps: tuple[int, ...]) -> None:
    recorded, _ = bent((2, 0))
    assert tuple(replay(bent_variants(recorded), recorded, modes(letters), 1).answers) == steps


def test_progress_counts_the_steps_of_every_run() -> None:
    recorded, seen = bent((1, 0))[0], list[Progress]()
    runs = len(recorded.runs)
    replay(
        bent_variants(recorded),
        recorded,
        modes("RFRFRFRF"),
        1,
        meter=Meter(LONG * runs, seen.append),
    )
    assert [progress.done for progress in seen] == [(k + 1) * runs for k in range(LONG)]


# --- all modes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blocks() -> nn.Module:
    torch.manual_seed(2)
    return Blocks().double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ended(blocks: nn.Module) -> Recording:
    """Two runs of two samples with guidance, with their results."""
    with record(blocks) as recording:
        for seed in (1, 2):
            recording.finish(recorded_run(blocks, sampler_of((2, 0)), tokens(seed))[2])
    return recording


def recover(graph: CapturedGraph, recording: Recording, steps: int = LONG) -> RecordedSampler:
    return recover_sampler(graph, recording, recording.dependence, steps)


def variants_of(graph: CapturedGraph, recording: Recording, history: int) -> VariantSet:
    """All modes but FORECAST at rank 2, the output as it is."""
    sites = find_sites(graph, classify_nodes(graph, recording.dependence))
    targets, _ = assign(graph, sites, rank=2)
    anchors = anchor_table(modes("R" * recording.steps), history - 1)
    factors = factors_of(graph, targets, {})
    return rewrite(graph, sites, targets, factors, (C, U), anchors=anchors)


@pytest.fixture(scope="module")
def ground(blocks: nn.Module, ended: Recording) -> tuple[VariantSet, RecordedSampler]:
    """Variants that keep three refreshes, and the sampler."""
    graph = capture(blocks, ended.signature)
    return variants_of(graph, ended, 3), recover(graph, ended)


def plan_of(model: nn.Module, recording: Recording, letters: str, order: int, **more) -> Plan:
    schedule = modes(letters)
    return Plan.from_trajectory(
        model, recording, schedule=schedule, rank=2, order=order, weighting="none", **more
    )


def fast_owns(model: nn.Module, plan: Plan, recorded: RecordedSampler) -> list[Own]:
    """What the optimised model gives at other latents: one model a run, called step by step."""

    def own(run: int) -> Own:
        fast = optimize(model, plan)
        return lambda step, x: fast(**{**recorded.runs[run][step], recorded.steps.latent: x})

    return [own(run) for run in range(len(recorded.runs))]


MIXED = [("RCRURFCU", 0), ("RFRFUCRC", 1), ("RRCUFCRR", 2), ("RCCRUUFR", 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("letters", "order"), MIXED)
def test_fit_of_all_modes_is_that_of_the_optimised_model_in_numpy(
    letters: str, order: int, blocks: nn.Module, ended: Recording, ground
) -> None:
    variants, recorded = ground
    result = replay(variants, recorded, modes(letters), order)
    plan = plan_of(blocks, ended, letters, order)
    plain = plan_of(blocks, ended, letters, order, correct=False)
    expected = Sweep(fast_owns(blocks, plain, recorded), recorded, letters, order).run()
    # Outputs in float64, but anchors' weights in float32 (1e-7), which the ridge of 1e-6 may
    # let grow by 1e3 in the weights of outputs that are alike.
    assert_same_table(result.weights, expected, atol=1e-4)
    assert result.errors == pytest.approx(expected.errors(), rel=1e-4)
    assert_same_answers(result, expected)
    assert plan.recipe.output_weights is not None
    assert_same_table(plan.recipe.output_weights, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("letters", "order"), MIXED[1:])
def test_errors_are_those_of_sampling_with_the_optimised_model(
    letters: str, order: int, blocks: nn.Module, ended: Recording, ground
) -> None:
    variants, recorded = ground
    schedule = modes(letters)
    fitted = plan_of(blocks, ended, letters, order)
    without = replace(fitted.recipe, output_weights=None, latent=None)
    for plan in (fitted, replace(fitted, recipe=without)):
        table = plan.recipe.output_weights or plain_table(schedule, order)
        result = replay(variants, recorded, schedule, order, table)
        fast, expected = optimize(blocks, plan), list[float]()
        for seed, end in zip((1, 2), recorded.ends, strict=True):
            _, _, cached = recorded_run(fast, sampler_of((2, 0)), tokens(seed))
            assert end is not None
            expected += [relative(one, other) for one, other in zip(cached, end, strict=True)]
        # The graph mixes outputs by float32 weights: 1e-7 of latents that are 1e-3 off.
        assert result.errors == pytest.approx(expected, rel=1e-3)
        assert len(result.errors) == 4


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("letters", [letters for letters, _ in MIXED[:2]])
def test_order_below_the_kept_history_is_as_if_no_more_were_kept(
    letters: str, order: int, blocks: nn.Module, ended: Recording, ground
) -> None:
    long, recorded = ground
    short = variants_of(capture(blocks, ended.signature), ended, order + 1)
    assert (long.history, short.history) == (3, order + 1)
    one, other = (replay(variants, recorded, modes(letters), order) for variants in (long, short))
    # Kept values of weight 0 add nothing; the rest is the same float64 program.
    torch.testing.assert_close(
        torch.tensor(one.weights), torch.tensor(other.weights), rtol=0, atol=1e-8
    )
    assert one.errors == pytest.approx(other.errors, rel=1e-8)
    assert set(one.answers) == set(other.answers)


@pytest.mark.slow
def test_dit_sampled_with_a_plan_has_the_errors_of_its_replay(dit: FashionDiT) -> None:
    with record(dit) as recording:
        recording.finish(sample_dit(dit))
    plan = plan_of(dit, recording, "RCRURF", 2)
    graph, table = capture(dit, recording.signature), plan.recipe.output_weights
    variants, recorded = variants_of(graph, recording, 3), recover(graph, recording, STEPS)
    result = replay(variants, recorded, plan.schedule, 2, table)
    cached, full = sample_dit(optimize(dit, plan)), sample_dit(dit)
    expected = [relative(one, other) for one, other in zip(cached, full, strict=True)]
    # The sampler's update is recovered to 1e-5; float32 rounding is 1e-6 of a latent.
    assert result.errors == pytest.approx(expected, rel=1e-2, abs=2e-5)
    again = replay(variants, recorded, plan.schedule, 2)
    assert again.errors == pytest.approx(result.errors, rel=1e-2, abs=2e-5)


@pytest.mark.slow
def test_without_results_the_last_recorded_latent_counts(
    dit: FashionDiT, dit_recording: Recording
) -> None:
    graph = capture(dit, dit_recording.signature)
    variants, recorded = (
        variants_of(graph, dit_recording, 3),
        recover(graph, dit_recording, STEPS),
    )
    result = replay(variants, recorded, modes("RFFRFF"), 2)
    assert len(recorded.steps.weights) == STEPS - 1
    assert result.weights[-1] == plain_table(modes("RFFRFF"), 2)[-1]
    plan = plan_of(dit, dit_recording, "RFFRFF", 2)
    fast, full = (last_latent(model) for model in (optimize(dit, plan), dit))
    expected = [relative(one, other) for one, other in zip(fast, full, strict=True)]
    assert result.errors == pytest.approx(expected, rel=1e-2, abs=2e-5)  # as above


def last_latent(model: nn.Module) -> Tensor:
    """x before the last step of the run that `sample_dit` makes."""
    noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return list(GuidedDDIM(STEPS, 1.5, 10).latents(model, noise, torch.arange(2)))[-2]
