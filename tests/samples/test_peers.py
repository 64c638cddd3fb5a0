"""Peers are exact where their formulas must be, and fall back while they know too little."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import pytest
import torch
from peers import (
    DynamicModes,
    ForecastCalibrate,
    History,
    LinearPredictor,
    Peer,
    PeerRun,
    Spectrum,
    TaylorSeerLite,
    even_tail,
    fit_weights,
)
from torch import Tensor

from calicache.graph_passes.common.errors import RunError

STEPS = 24
EVERY_THIRD = range(0, STEPS, 3)
RECURRENT = torch.tensor([1.7, -0.8], dtype=torch.float64)  # poles of modulus 0.89


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(peer: Peer, truth: Tensor, computed: Collection[int]) -> Tensor:
    """Outputs (steps, B, d) of a run whose model returns the truth (steps, B, d)."""
    steps = iter(sorted(set(computed)))
    peer_run = PeerRun(lambda **_: truth[next(steps)], peer, computed)
    return torch.stack([peer_run(hidden_states=truth[0]) for _ in truth])


def over_time(function: Callable[[Tensor], Tensor]) -> Tensor:
    """A scalar function of the step, times a vector for every sample: (STEPS, 2, 5)."""
    return function(torch.arange(STEPS, dtype=torch.float64))[:, None, None] * draw(2, 5)


def exponentials() -> Tensor:
    """A decay and a damped wave, other rates in every sample: (STEPS, 2, 12)."""
    steps = torch.arange(STEPS, dtype=torch.float64)[:, None]
    samples = []
    for sample, (decay, damping, frequency) in enumerate([(0.9, 0.95, 0.3), (1.02, 0.85, 0.5)]):
        wave = damping**steps
        parts = (decay**steps, wave * (frequency * steps).cos(), wave * (frequency * steps).sin())
        samples.append(torch.cat(parts, dim=1) @ draw(3, 12, seed=sample))
    return torch.stack(samples, dim=1)


def recurrent(seed: int) -> Tensor:
    """One linear recurrence of order 2 from random starts, (STEPS, 2, 6)."""
    outputs = list(draw(2, 2, 6, seed=seed))
    while len(outputs) < STEPS:
        outputs.append(RECURRENT[0] * outputs[-1] + RECURRENT[1] * outputs[-2])
    return torch.stack(outputs)


def test_lite_is_exact_on_lines() -> None:
    truth = over_time(lambda t: 2 - 3 * t)
    computed = [0, 1, 4, 5, 9, 20]
    # float64, a few roundings a step.
    torch.testing.assert_close(
        run(TaylorSeerLite(), truth, computed), truth, rtol=1e-12, atol=1e-12
    )


def test_spectrum_is_exact_on_polynomials_of_its_degree() -> None:
    truth = over_time(lambda t: (t / STEPS - 0.3) ** 4 + t / STEPS - 1)
    outputs = run(Spectrum(STEPS, degree=4, ridge=1e-13), truth, EVERY_THIRD)
    # Five outputs are computed from step 12. float64; the normal equations lose some digits.
    torch.testing.assert_close(outputs[12:], truth[12:], rtol=0, atol=1e-7)


def test_spectrum_is_a_ridge_regression_on_chebyshev_polynomials() -> None:
    truth, computed = draw(STEPS, 2, 5), range(0, 18, 2)
    peer = Spectrum(STEPS, degree=3, ridge=0.1, share=0.75)
    history = History(truth[:19], [*computed])
    vander = np.polynomial.chebyshev.chebvander(2 * np.arange(STEPS) / STEPS - 1, 3)
    known = vander[[*computed]]
    values = truth[[*computed]].flatten(1).numpy()
    coefficients = np.linalg.inv(known.T @ known + 0.1 * np.eye(4)) @ known.T @ values
    spectral = torch.from_numpy(vander[19] @ coefficients).view(2, 5)
    line = TaylorSeerLite().forecast(history)
    # float64.
    torch.testing.assert_close(
        peer.forecast(history), 0.75 * spectral + 0.25 * line, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("computed", [EVERY_THIRD, [0, 1, 2, *range(5, STEPS, 3)]])
def test_dynamic_modes_are_exact_on_sums_of_exponentials(computed: Collection[int]) -> None:
    truth = exponentials()
    outputs = run(DynamicModes(), truth, computed)
    first = 11 if 11 in computed else 9  # the fourth of the outputs with one spacing
    # The ridge of 1e-8 stands against singular values of 1e-2 and more.
    torch.testing.assert_close(outputs[first:], truth[first:], rtol=0, atol=1e-5)
    line = run(TaylorSeerLite(), truth, computed)
    torch.testing.assert_close(outputs[:first], line[:first], rtol=0, atol=0)
    assert (line[first:] - truth[first:]).abs().max() > 0.01


def test_dynamic_modes_reuse_the_newest_output_where_the_forecast_is_not_finite() -> None:
    growing = [(1e12**step * draw(1, 3)).float() for step in range(4)]  # the next is above 1e38
    forecast = DynamicModes().forecast(History(growing, range(4)))
    assert torch.equal(forecast, growing[3])


def test_foca_is_exact_on_lines_after_two_steps_side_by_side() -> None:
    truth = over_time(lambda t: 1 + 2 * t)
    computed = [0, 1, *range(4, STEPS, 3)]
    outputs = run(ForecastCalibrate(), truth, computed)
    # float64, a few roundings a step.
    torch.testing.assert_close(outputs, truth, rtol=1e-12, atol=1e-12)


def test_foca_goes_back_to_the_newest_output_beyond_its_horizon() -> None:
    truth = torch.arange(7, dtype=torch.float64)[:, None, None]
    outputs = run(ForecastCalibrate(), truth, [0, 1]).flatten().tolist()
    # Worked by hand: 1 + 3/4 (3/2)(1 + 1), then 1 + 3/5 (3/2)(1 + 3.25 - 4).
    assert outputs == pytest.approx([0, 1, 2, 3, 4, 3.25, 1.225], rel=1e-12)


def test_foca_as_in_cache_dit_takes_a_difference_over_skipped_steps_whole() -> None:
    truth = torch.arange(5, dtype=torch.float64)[:, None, None]
    as_published = run(ForecastCalibrate(per_step=False), truth, [0, 3]).flatten().tolist()
    # Worked by hand: 3 + 1/2 (3 + 3) there, 3 + 1/2 (1 + 3) here.
    assert as_published == pytest.approx([0, 0, 0, 3, 6], rel=1e-12)
    assert run(ForecastCalibrate(), truth, [0, 3])[-1].item() == pytest.approx(5, rel=1e-12)


@pytest.mark.parametrize("computed", [None, EVERY_THIRD])
def test_linear_predictor_is_exact_on_a_linear_recurrence(
    computed: Collection[int] | None,
) -> None:
    weights = fit_weights(recurrent(seed=1), computed)
    truth = recurrent(seed=2)
    outputs = run(LinearPredictor(weights), truth, [0, 1, *EVERY_THIRD])
    # Two computed outputs tell all others. float64, on normal equations.
    first = 2 if computed is None else 4
    torch.testing.assert_close(outputs[first:], truth[first:], rtol=0, atol=1e-5)


def test_weights_are_least_squares_drawn_to_reuse() -> None:
    outputs = draw(3, 2, 6)
    flat = outputs.flatten(1)
    plain = fit_weights(outputs)
    expected = torch.linalg.lstsq(flat[:2].T, flat[2][:, None]).solution[:, 0]
    # float64, normal equations of two unknowns.
    torch.testing.assert_close(plain[2, :2], expected, rtol=1e-9, atol=1e-9)
    assert plain[1, 0].item() == pytest.approx(float(flat[0] @ flat[1] / (flat[0] @ flat[0])))
    drawn = fit_weights(outputs, ridge=1e9)
    # The data weigh 1e-9 of the ridge.
    torch.testing.assert_close(drawn[2], torch.tensor([0, 1.0, 0]).double(), rtol=0, atol=1e-6)
    assert fit_weights(outputs, computed=[0])[2].count_nonzero() == 1


@pytest.mark.parametrize(
    "peer", [TaylorSeerLite(), Spectrum(STEPS), DynamicModes(), ForecastCalibrate()]
)
def test_one_computed_output_is_reused(peer: Peer) -> None:
    only = draw(2, 5)
    assert torch.equal(peer.forecast(History([only], [0])), only)


def test_runs_do_not_mix() -> None:
    truths = (exponentials(), 3 - exponentials().flip(-1))
    alone = [run(DynamicModes(), truth, EVERY_THIRD) for truth in truths]
    peer, calls = DynamicModes(), [iter(EVERY_THIRD), iter(EVERY_THIRD)]
    runs = [
        PeerRun(lambda k=k, **_: truths[k][next(calls[k])], peer, EVERY_THIRD) for k in range(2)
    ]
    together = [[one(), other()] for one, other in [runs] for _ in range(STEPS)]
    for k in range(2):
        assert torch.equal(torch.stack([outputs[k] for outputs in together]), alone[k])
    assert not torch.equal(alone[0], alone[1])


def test_a_run_computes_its_first_step() -> None:
    with pytest.raises(RunError) as caught:
        PeerRun(lambda **_: draw(1), TaylorSeerLite(), [3, 1])
    assert caught.value.where == "computed steps"
    assert caught.value.got == "[1, 3]"


@pytest.mark.parametrize(
    ("steps", "tail"),
    [([0], [0]), ([0, 4], [0, 4]), ([0, 1, 2, 5, 8], [2, 5, 8]), ([0, 3, 6, 7], [6, 7])],
)
def test_even_tail_is_the_longest_end_with_one_spacing(steps: list[int], tail: list[int]) -> None:
    assert even_tail(steps) == tail
