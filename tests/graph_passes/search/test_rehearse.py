"""Rehearsed runs: coordinates against the recorded tensors, errors against real replays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import modes, sample_dit
from support.search.toy_runs import (
    SHAPES,
    STEPS,
    Affine,
    Shape,
    plain_variants,
    random_scales,
    recording_of,
    sampler_of,
    toy_span,
)
from torch import Tensor, nn

from calicache.graph_passes import StepMode, record
from calicache.graph_passes.graph.capture import capture
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.sampler.least_squares import RIDGE
from calicache.graph_passes.sampler.recover import RecordedSampler, recover_sampler
from calicache.graph_passes.sampler.replay import Answer, replay
from calicache.graph_passes.sampler.update import SamplerSteps
from calicache.graph_passes.search import rehearse
from calicache.graph_passes.search.rehearse import Rehearsal, Scales, Span
from calicache.graph_passes.settings.schedule import lagrange_weights

R, C, U, F = StepMode
EXACT = Answer(0.0, 0.0)


# --- coordinates --------------------------------------------------------------------------------


def assert_same_geometry(recorded: RecordedSampler, atol: float) -> None:
    """Inner products of all coordinates are those of the tensors, over all runs."""
    span, parts = Span.of(recorded), recorded.steps.parts
    columns = []
    for run, outputs, end in zip(recorded.runs, recorded.outputs, recorded.ends, strict=True):
        assert end is not None
        rows = len(end)
        latents = [call["x"][:rows] for call in run] + [end]
        shares = [e[p * rows : (p + 1) * rows] for e in outputs for p in range(parts)]
        columns.append(np.stack([value.double().numpy().ravel() for value in latents + shares]))
    exact = np.concatenate(columns, axis=1)
    coordinates = torch.cat([span.latents, span.outputs.flatten(0, 1)]).numpy()
    steps = len(recorded.steps.weights)
    assert span.latents.shape == (steps + 1, coordinates.shape[1])
    assert span.outputs.shape == (steps, parts, coordinates.shape[1])
    assert span.weights == recorded.steps.weights
    gram = exact @ exact.T
    np.testing.assert_allclose(
        coordinates @ coordinates.T, gram, rtol=0, atol=atol * np.abs(gram).max()
    )


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_coordinates_keep_all_norms_and_inner_products(shape: Shape, seeds: Sequence[int]) -> None:
    recorded = recording_of(
        Affine([0.4] * STEPS, (2, 3, 3)), sampler_of(shape), (2, 2, 3, 3), seeds
    )
    # float64 throughout; directions below LEAST_ENERGY = 1e-12 of the energy may be left out.
    assert_same_geometry(recorded, atol=1e-11)


def guided(steps: int, scale: float, looks_back: bool) -> SamplerSteps:
    """The sampler of one guidance scale: parts weigh 1 - scale and scale at every step."""
    rows = []
    for one in sampler_of((1, int(looks_back)), steps).weights:
        pairs = zip(one[::2], one[1::2], strict=True)
        rows.append(tuple(v for x, e in pairs for v in (x, e * (1 - scale), e * scale)))
    return SamplerSteps("x", 2, tuple(rows))


@pytest.mark.parametrize("looks_back", [False, True])
def test_parts_under_one_guidance_scale_count_as_their_weighted_sum(
    monkeypatch: pytest.MonkeyPatch, looks_back: bool
) -> None:
    model = Affine([0.4] * STEPS, (2, 3, 3))
    recorded = recording_of(model, guided(STEPS, 1.5, looks_back), (3, 2, 3, 3))
    merged = Span.of(recorded)
    assert merged.outputs.shape[1] == 1
    monkeypatch.setattr(rehearse, "ALIKE", -1.0)
    apart = Span.of(recorded)
    assert apart.outputs.shape[1] == 2
    schedules = [modes("RFRFFRFR"), modes("RUUFRCFU"), modes("RFFFFFFF")]
    scales = {C: ((0.1,) * STEPS,) * 3, U: ((0.2,) * STEPS,) * 3}
    answers = (Answer(0.3, 0.1),) * STEPS
    errors = Rehearsal(merged, answers, scales).errors(schedules, 2)
    # float64; fits are conditioned to about 1e6 by their ridge.
    assert errors == pytest.approx(Rehearsal(apart, answers, scales).errors(schedules, 2), rel=1e-6)


def test_parts_that_weigh_otherwise_at_one_step_stay_apart() -> None:
    rows = [*guided(STEPS, 1.5, looks_back=False).weights]
    rows[3] = (rows[3][0], rows[3][1] * 1.01, rows[3][2])
    model = Affine([0.4] * STEPS, (2, 3, 3))
    recorded = recording_of(model, SamplerSteps("x", 2, tuple(rows)), (3, 2, 3, 3))
    assert Span.of(recorded).outputs.shape[1] == 2


def test_values_larger_than_a_block_of_rows_are_taken_whole() -> None:
    size = (1, 1, 300, 300)  # 90,000 elements: ROWS is 65,536
    recorded = recording_of(Affine([0.4] * 3, size[1:]), sampler_of((2, 0), 3), size)
    assert_same_geometry(recorded, atol=1e-11)


def test_outputs_that_repeat_span_fewer_directions() -> None:
    model = Affine([0.0] * STEPS, (2, 3, 3))
    with torch.no_grad():
        model.table.copy_(model.table[:, :1].expand_as(model.table))
    recorded = recording_of(model, sampler_of((1, 0)), (2, 2, 3, 3))
    span = Span.of(recorded)
    assert span.latents.shape == (STEPS + 1, 2)  # the noise, and the one output
    assert_same_geometry(recorded, atol=1e-11)


@pytest.mark.slow
def test_coordinates_of_a_recorded_dit_end_where_the_run_did(dit) -> None:
    recorded = recorded_dit(dit)
    span = Span.of(recorded)
    rows = [len(end) for end in recorded.ends if end is not None]
    ends = torch.cat([end.flatten() for end in recorded.ends if end is not None]).double()
    last = [run[-1]["hidden_states"][:n] for run, n in zip(recorded.runs, rows, strict=True)]
    before = torch.cat([value.flatten() for value in last]).double()
    end, off = span.latents[-1], span.latents[-1] - span.latents[-2]
    # Six updates by fitted weights, each 1e-5 off at most (sampler_step.ROUNDING).
    assert float(end.norm()) == pytest.approx(float(ends.norm()), rel=1e-4)
    assert float(off.norm()) == pytest.approx(float((ends - before).norm()), rel=1e-4)


def recorded_dit(model: nn.Module) -> RecordedSampler:
    """Two runs of guided DDIM, the sampler recovered from them."""
    with record(model) as recording:
        for seed in (1, 2):
            recording.finish(sample_dit(model, seed=seed))
    graph = capture(model, recording.signature)
    recorded = recover_sampler(graph, recording, recording.dependence, recording.steps)
    assert recorded.steps.parts == 2
    return recorded


# --- errors against real replays ----------------------------------------------------------------


@cache
def affine(shape: Shape, gain: float) -> tuple[RecordedSampler, VariantSet, Span]:
    """One recorded sample of a model with answers `gain` + 0.05 a step, and its variants."""
    model = Affine([gain + 0.05 * step for step in range(STEPS)], (2, 3, 4))
    recorded = recording_of(model, sampler_of(shape), (1, 2, 3, 4))
    variants = plain_variants(model, dict(recorded.runs[0][0]))
    return recorded, variants, Span.of(recorded)


def answers_of(gain: float) -> tuple[Answer, ...]:
    return tuple(Answer(gain + 0.05 * step, 0.0) for step in range(STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@settings(max_examples=25, deadline=None)
@given(
    tail=st.text("RF", min_size=STEPS - 1, max_size=STEPS - 1),
    order=st.sampled_from([0, 1, 2]),
    gain=st.sampled_from([-0.3, 0.5]),
)
def test_errors_of_an_affine_model_are_those_of_a_replay(
    shape: Shape, tail: str, order: int, gain: float
) -> None:
    recorded, variants, span = affine(shape, gain)
    schedule = modes("R" + tail)
    result = replay(variants, recorded, schedule, order)
    (rehearsed,) = Rehearsal(span, answers_of(gain), {}).errors([schedule], order)
    # Both in float64; the ridge of 1e-6 leaves normal equations of a condition below 1e7.
    assert rehearsed == pytest.approx(result.errors[0], rel=1e-6, abs=1e-9)
    for step, answer in result.answers.items():
        assert answer.gain == pytest.approx(gain + 0.05 * step, abs=1e-6)
        assert answer.spread == pytest.approx(0.0, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(tail=st.text("RF", min_size=STEPS - 1, max_size=STEPS - 1), order=st.sampled_from([0, 1, 2]))
def test_errors_of_forecasts_are_exact_where_outputs_do_not_depend_on_the_latent(
    tail: str, order: int
) -> None:
    recorded, variants, span = still()
    schedule = modes("R" + tail)
    result = replay(variants, recorded, schedule, order)
    (rehearsed,) = Rehearsal(span, (EXACT,) * STEPS, {}).errors([schedule], order)
    assert rehearsed == pytest.approx(result.errors[0], rel=1e-6, abs=1e-9)


@cache
def still() -> tuple[RecordedSampler, VariantSet, Span]:
    model = Affine([0.0] * STEPS, (2, 3, 4))
    recorded = recording_of(model, sampler_of((2, 1)), (1, 2, 3, 4))
    return recorded, plain_variants(model, dict(recorded.runs[0][0])), Span.of(recorded)


@pytest.mark.slow
def test_error_of_several_runs_is_that_of_all_together() -> None:
    model = Affine([0.3] * STEPS, (2, 3, 4))
    recorded = recording_of(model, sampler_of((2, 0)), (2, 2, 3, 4), seeds=(1, 2))
    schedule = modes("RFRFFRFF")
    result = replay(plain_variants(model, dict(recorded.runs[0][0])), recorded, schedule, 1)
    (rehearsed,) = Rehearsal(Span.of(recorded), (Answer(0.3, 0.0),) * STEPS, {}).errors(
        [schedule], 1
    )
    sizes = torch.cat([end.flatten(1).norm(dim=1) for end in recorded.ends if end is not None])
    off = torch.tensor(result.errors, dtype=torch.float64) * sizes
    # As above; one relative error over the four samples.
    assert rehearsed == pytest.approx(float(off.norm() / sizes.norm()), rel=1e-6)
    assert rehearsed > 1e-3


# --- errors against one schedule at a time, in vectors ------------------------------------------


def walk(rehearsal: Rehearsal, schedule: Sequence[StepMode], order: int) -> float:
    """The rehearsal of one schedule in numpy, its directions z in columns of their own."""
    span, steps = rehearsal.span, len(schedule)
    inner = span.latents.shape[1]

    def wide(value: Tensor) -> np.ndarray:
        return np.concatenate([value.numpy(), np.zeros((*value.shape[:-1], 2 * steps))], axis=-1)

    latents, outputs = wide(span.latents), wide(span.outputs)
    z = np.eye(inner + 2 * steps)[inner:]
    x, before = latents[0], np.zeros((0, z.shape[1]))
    refreshes, kept = list[int](), dict[int, np.ndarray]()
    for step, mode in enumerate(schedule):
        answer, off = rehearsal.answers[step], x - latents[step]
        own = outputs[step] + answer.gain * off
        own = own + answer.spread * np.linalg.norm(off) * z[step]
        places = sorted(kept, reverse=True)[: order + 1]
        if mode in rehearsal.scales:
            lags = [step - place for place in refreshes[-order - 1 :]]
            scale = rehearsal.scales[mode][len(lags) - 1][step]
            own = own + scale * math.prod(lags) * z[steps + refreshes[-1]]
        old = [*[kept[place] for place in places], np.broadcast_to(x, own.shape)]
        features = old if mode is F else [own, *old]
        forecast = lagrange_weights(places, step) if mode is F else (1.0, *[0.0] * len(places))
        plain = [*forecast, 0.0]  # of the latent
        row = np.array(span.weights[step])
        rest = np.concatenate([x[None], np.zeros_like(own), before])[: len(row)]
        scales = row[1 : 1 + len(own)]
        matrix = np.stack([scales @ feature for feature in features], axis=1)
        ridge = np.diag(np.sqrt(RIDGE) * np.linalg.norm(matrix, axis=0))
        target = np.concatenate([latents[step + 1] - row @ rest, ridge @ plain])
        weights = np.linalg.lstsq(np.concatenate([matrix, ridge]), target, rcond=None)[0]
        mixed = np.tensordot(weights, np.stack(features), axes=1)
        before = np.concatenate([x[None], mixed])
        x = row @ np.concatenate([before, rest[1 + len(own) :]])
        refreshes += [step] if mode is R else []
        kept |= {step: own} if mode in (R, C) else {}
    return float(np.linalg.norm(x - latents[-1]) / np.linalg.norm(latents[-1]))


def toy_rehearsal(parts: int, back: int, steps: int = STEPS) -> Rehearsal:
    draw = np.random.default_rng(8)
    pairs = zip(draw.uniform(-0.3, 0.8, steps), draw.uniform(0.0, 0.4, steps), strict=True)
    scales = {U: random_scales(steps, 1), C: random_scales(steps, 2)}
    answers = tuple(Answer(float(gain), float(spread)) for gain, spread in pairs)
    return Rehearsal(toy_span(steps, parts, back), answers, scales)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@settings(max_examples=50, deadline=None)
@given(
    tails=st.lists(st.text("RCUF", min_size=STEPS - 1, max_size=STEPS - 1), min_size=1, max_size=5),
    order=st.sampled_from([0, 1, 2]),
)
def test_batch_of_schedules_gives_what_each_gives_in_vectors(
    shape: Shape, tails: list[str], order: int
) -> None:
    rehearsal = toy_rehearsal(*shape)
    schedules = [modes("R" + tail) for tail in tails]
    expected = [walk(rehearsal, schedule, order) for schedule in schedules]
    # float64, normal equations of condition 1e6 here and a QR there.
    assert rehearsal.errors(schedules, order) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.slow
def test_many_schedules_at_once_equal_one_by_one() -> None:
    rehearsal = toy_rehearsal(2, 1)
    draw = np.random.default_rng(4)
    schedules = [(R, *(StepMode(int(m)) for m in draw.integers(0, 4, 7))) for _ in range(40)]
    for order in (0, 1, 2):
        apart = [rehearsal.errors([schedule], order)[0] for schedule in schedules]
        # The same float64 products, summed in blocks of another size.
        assert rehearsal.errors(schedules, order) == pytest.approx(apart, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_refresh_at_every_step_has_no_error(order: int) -> None:
    # Rounding of eight float64 updates and fits; every other schedule is far above.
    assert toy_rehearsal(2, 1).errors([(R,) * STEPS], order) == pytest.approx([0.0], abs=1e-10)


def test_errors_are_finite_where_an_output_is_zero() -> None:
    span = toy_span(4)
    outputs = span.outputs.clone()
    outputs[0] = 0.0
    rehearsal = Rehearsal(replace(span, outputs=outputs), (EXACT,) * 4, {})
    (error,) = rehearsal.errors([modes("RFRF")], 1)
    assert math.isfinite(error)
    assert error > 0.0


# --- what cheap steps add, by hand --------------------------------------------------------------


def orthonormal(steps: int) -> Span:
    """x_0 and all e_k orthonormal, x_{k+1} = x_k + e_k."""
    size = 1 + steps
    basis = torch.eye(size, dtype=torch.float64)
    latents = torch.tril(torch.ones(size, size, dtype=torch.float64))
    return Span(latents, basis[1:, None], ((1.0, 1.0),) * steps)


@pytest.mark.parametrize("mode", [U, C])
@pytest.mark.parametrize(
    ("letters", "order", "row", "lags"),
    [
        ("R?", 0, 0, 1),
        ("R?", 2, 0, 1),  # one refresh is kept: the first row, whatever the order
        ("RR?", 0, 0, 1),
        ("RR?", 1, 1, 1 * 2),
        ("RR?", 2, 1, 1 * 2),
        ("RRR?", 1, 1, 1 * 2),
        ("RRR?", 2, 2, 1 * 2 * 3),
    ],
)
def test_cheap_step_adds_its_scale_times_the_lags(
    mode: StepMode, letters: str, order: int, row: int, lags: int
) -> None:
    steps = len(letters)
    schedule = tuple(mode if letter == "?" else R for letter in letters)
    scales = {U: random_scales(steps, 1), C: random_scales(steps, 2)}
    rehearsal = Rehearsal(orthonormal(steps), (EXACT,) * steps, scales)
    s = scales[mode][row][-1] * lags
    # The latent misses s z; own output e + s z takes part of it back: s / sqrt(1 + s^2) is left,
    # and the result has the length sqrt(1 + steps). The ridge moves the weight by 1e-6.
    expected = s / math.sqrt(1 + s**2) / math.sqrt(1 + steps)
    assert rehearsal.errors([schedule], order) == pytest.approx([expected], rel=1e-5)


def test_mode_that_looks_at_the_newest_refresh_alone_has_one_lag() -> None:
    scales = {C: random_scales(4, 2)[:1]}
    rehearsal = Rehearsal(orthonormal(4), (EXACT,) * 4, scales)
    s = scales[C][0][-1]  # at a lag of 1, where three refreshes are kept; see above
    expected = s / math.sqrt(1 + s**2) / math.sqrt(1 + 4)
    assert rehearsal.errors([(R, R, R, C)], 2) == pytest.approx([expected], rel=1e-5)


def test_steps_between_two_refreshes_err_in_one_direction() -> None:
    scales: dict[StepMode, Scales] = {C: ((0.0, 0.1, 0.1, 0.1),)}
    span, answers = orthonormal(4), (EXACT,) * 4
    (together,) = Rehearsal(span, answers, scales).errors([modes("RCCR")], 0)
    (apart,) = Rehearsal(span, answers, scales).errors([modes("RCRC")], 0)
    # Two errors that the fit has little to do with (e + s z, s = 0.1 and 0.2 against e of 1):
    # in one direction about 0.1 + 0.2, in two about sqrt(0.1^2 + 0.1^2), over sqrt(5).
    assert together == pytest.approx(0.3 / math.sqrt(5), rel=0.05)
    assert apart == pytest.approx(math.sqrt(0.02) / math.sqrt(5), rel=0.05)


@settings(max_examples=40, deadline=None)
@given(
    place=st.integers(1, STEPS - 1),
    factor=st.floats(1.0, 10.0),
    mode=st.sampled_from([U, C]),
    order=st.sampled_from([0, 1, 2]),
)
def test_larger_scales_never_lower_the_error_of_a_last_cheap_step(
    place: int, factor: float, mode: StepMode, order: int
) -> None:
    rehearsal = toy_rehearsal(1, 0)
    schedule = (*modes("R" * place), *modes("F" * (STEPS - 1 - place)), mode)
    larger = {
        m: tuple(tuple(factor * s for s in row) for row in rows)
        for m, rows in rehearsal.scales.items()
    }
    (small,) = rehearsal.errors([schedule], order)
    (large,) = replace(rehearsal, scales=larger).errors([schedule], order)
    # What is added is orthogonal to all else, so no weights make it help; the ridge moves the
    # weights off the optimum, the error by less than 1e-6.
    assert large >= small * (1 - 1e-6)


def test_spread_adds_to_the_error() -> None:
    span = toy_span(6)
    errors = [
        Rehearsal(span, (Answer(0.3, spread),) * 6, {}).errors([modes("RFRFRR")], 0)[0]
        for spread in (0.0, 0.2, 0.5, 1.0)
    ]
    assert errors == sorted(errors)
    assert errors[-1] > errors[0] * 1.01
