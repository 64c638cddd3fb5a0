"""Output weights fitted along the corrected trajectory: what they do to whole runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from conftest import STEPS, relative, sample_dit
from diffusion import GuidedDDIM
from hypothesis import given, settings
from hypothesis import strategies as st
from model import FashionDiT
from torch import Tensor, nn
from weights import DIT_WEIGHTS, load_weights

from calicache.graph_passes import (
    Plan,
    SiteRejection,
    StepMode,
    Trajectory,
    capture,
    classify_inputs,
    optimize,
    record,
    uniform_schedule,
)
from calicache.graph_passes.correct import fit_outputs
from calicache.graph_passes.recover import recover_sampler
from calicache.graph_passes.schedule import Table, output_table

R, C, U, FORECAST = StepMode
LETTERS = dict(zip("RCUF", StepMode, strict=True))
LONG, GUIDANCE, NULL_CLASS = 35, 1.5, 10


def modes(letters: str) -> tuple[StepMode, ...]:
    return tuple(LETTERS[letter] for letter in letters)


def fitted(model: nn.Module, trajectory: Trajectory, letters: str, order: int = 2) -> Plan:
    plan = Plan.from_trajectory(
        model, trajectory, schedule=modes(letters), rank=4, order=order, weighting="none"
    )
    assert plan.settings.correction == "fitted to the recorded runs"
    return plan


def without_weights(plan: Plan) -> Plan:
    """The same plan with the plain output table."""
    return replace(plan, settings=replace(plan.settings, output_weights=None))


def last_latents(model: nn.Module, steps: int, seed: int, batch: int = 2) -> list[Tensor]:
    """The last latent that the model gets, and the image."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 1, 28, 28, generator=draw)
    sampler = GuidedDDIM(steps, GUIDANCE, NULL_CLASS)
    with torch.no_grad():
        return list(sampler.latents(model, noise, torch.arange(batch) % 10))[-2:]


def error(model: nn.Module, plan: Plan, place: int = -1, seed: int = 1, batch: int = 2) -> float:
    """Relative L2 distance of a run under a plan to the full run."""
    steps = len(plan.schedule)
    fast, full = (
        last_latents(optimize(model, plan), steps, seed, batch),
        last_latents(model, steps, seed, batch),
    )
    return relative(fast[place], full[place])


@pytest.fixture(scope="module")
def trained() -> FashionDiT:
    model = load_weights(FashionDiT(), DIT_WEIGHTS)
    assert isinstance(model, FashionDiT)
    return model


@pytest.fixture(scope="module")
def trained_plan(trained: FashionDiT) -> Plan:
    """35 steps of DDIM, interval 3, FORECAST between; fitted on seed 1."""
    with record(trained) as trajectory:
        last_latents(trained, LONG, seed=1, batch=4)
    return Plan.from_trajectory(trained, trajectory, interval=3, mode=FORECAST)


def test_fitted_weights_bring_the_recorded_run_nearer_to_the_full_one(
    trained: FashionDiT, trained_plan: Plan
) -> None:
    plain = without_weights(trained_plan)
    for place in (-2, -1):  # the last recorded latent, and the image after it
        corrected = error(trained, trained_plan, place, seed=1, batch=4)
        # Nearer by a margin: about a half here; both errors are far above rounding (1e-6).
        assert corrected <= 0.8 * error(trained, plain, place, seed=1, batch=4)


def test_fitted_weights_help_on_a_seed_that_was_not_recorded(
    trained: FashionDiT, trained_plan: Plan
) -> None:
    corrected = error(trained, trained_plan, seed=20, batch=4)
    # The bound of the issue; both errors are per cents, far above rounding.
    assert corrected <= 0.8 * error(trained, without_weights(trained_plan), seed=20, batch=4)


@pytest.mark.parametrize("letters", ["RCCRCC", "RUURUU", "RFFRFF", "RCRURF", "RFRFUC"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_last_recorded_latent_is_nearer_in_every_mode(
    letters: str, order: int, dit, dit_trajectory: Trajectory
) -> None:
    plan = fitted(dit, dit_trajectory, letters, order)
    # The sweep is greedy, the last latent its last target: never farther, but for rounding.
    assert error(dit, plan, -2) <= error(dit, without_weights(plan), -2) * (1 + 1e-3) + 1e-6


def weights_of(plan: Plan) -> Table:
    assert plan.settings.output_weights is not None
    return plan.settings.output_weights


@settings(max_examples=4, deadline=None)
@given(st.text("RCUF", min_size=STEPS - 1, max_size=STEPS - 1), st.sampled_from([0, 1, 2]))
def test_rows_of_any_schedule_have_the_form_of_their_mode(
    dit, dit_trajectory: Trajectory, tail: str, order: int
) -> None:
    letters = "R" + tail
    table = weights_of(fitted(dit, dit_trajectory, letters, order))
    assert [len(row) for row in table] == [order + 2] * STEPS
    for step, row in enumerate(table):
        if letters[step] == "F":
            assert row[0] == 0.0
        kept = min(letters[:step].count("R"), order + 1)
        assert row[1 + kept :] == (0.0,) * (order + 1 - kept)  # not there yet
    assert table[-1] == output_table(modes(letters), order)[-1]


def test_forecast_rows_have_no_own_output(trained_plan: Plan) -> None:
    for mode, row in zip(trained_plan.schedule, weights_of(trained_plan), strict=True):
        assert (row[0] == 0.0) == (mode is FORECAST)


def test_last_row_is_the_plain_one(trained_plan: Plan) -> None:
    # What the last output becomes was not recorded.
    plain = output_table(trained_plan.schedule, trained_plan.settings.order)
    assert weights_of(trained_plan)[-1] == plain[-1]
    assert weights_of(trained_plan)[1:-1] != plain[1:-1]


def test_first_step_is_exact_and_keeps_its_own_output(forecast_plan: Plan) -> None:
    own, *others = weights_of(forecast_plan)[0]
    # Nothing to correct: what is fitted is the rounding of a float32 sampler step.
    assert own == pytest.approx(1.0, rel=1e-4)
    assert others == [0.0] * 3


def test_runs_that_refresh_always_keep_their_own_outputs(dit, dit_trajectory: Trajectory) -> None:
    for own, *others in weights_of(fitted(dit, dit_trajectory, "R" * STEPS)):
        # What is fitted is rounding (1e-7), divided by how little outputs of neighbouring
        # steps differ (1e-3 of their size on this model).
        assert own == pytest.approx(1.0, abs=1e-3)
        assert others == pytest.approx([0.0] * 3, abs=1e-3)


def fit(
    model: nn.Module, trajectory: Trajectory, schedule: Sequence[StepMode], on_step=None
) -> Table | SiteRejection:
    plan = Plan.from_trajectory(model, trajectory, schedule=schedule, rank=4, correct=False)
    fast = optimize(model, plan)
    captured = capture(model, trajectory.signature)
    classes = classify_inputs(trajectory)
    recorded = recover_sampler(captured, trajectory, classes, len(schedule), on_step)
    if isinstance(recorded, SiteRejection):
        return recorded
    return fit_outputs(fast.rewritten, recorded, schedule, 2, on_step)


@pytest.mark.parametrize("steps", [1, STEPS - 1, STEPS + 1])
def test_run_of_another_length_is_refused(steps: int, dit, dit_trajectory: Trajectory) -> None:
    result = fit(dit, dit_trajectory, (R, *[U] * (steps - 1)))
    assert isinstance(result, SiteRejection)
    assert result.reason == f"no recorded run has the plan's {steps} steps"


def test_plan_of_another_length_says_that_nothing_was_fitted(
    dit, dit_trajectory: Trajectory
) -> None:
    plan = Plan.from_trajectory(dit, dit_trajectory, schedule=modes("RUFU"), rank=4)
    assert plan.settings.output_weights is None
    assert plan.settings.correction == "not fitted: no recorded run has the plan's 4 steps"


def test_only_runs_of_the_plans_length_are_used(dit, dit_trajectory: Trajectory) -> None:
    with record(dit) as longer:
        sample_dit(dit)
        sample_dit(dit, seed=2, steps=STEPS + 2)
    alone = torch.tensor(weights_of(fitted(dit, dit_trajectory, "RFFRFF")))
    got = torch.tensor(weights_of(fitted(dit, longer, "RFFRFF")))
    # The same run, the other one left out; float64 least squares differ in the last digits.
    torch.testing.assert_close(got, alone, rtol=1e-6, atol=1e-9)


def test_two_runs_are_fitted_together(dit, dit_trajectory: Trajectory) -> None:
    with record(dit) as both:
        sample_dit(dit)
        sample_dit(dit, seed=2)
    table = weights_of(fitted(dit, both, "RFFRFF"))
    assert table != weights_of(fitted(dit, dit_trajectory, "RFFRFF"))


def test_sampler_that_adds_noise_leaves_a_plan_that_runs_and_says_why(dit) -> None:
    draw = torch.Generator().manual_seed(0)
    x, labels = torch.randn(2, 1, 28, 28, generator=draw), torch.tensor([1, 2])
    with record(dit) as trajectory:
        for now in range(STEPS):
            output = dit(x, torch.full((2,), 999 - 100 * now), labels)
            x = x - 0.1 * output + 0.3 * torch.randn(x.shape, generator=draw)
    plan = Plan.from_trajectory(dit, trajectory, schedule=modes("RFCRUF"), rank=4)
    assert plan.settings.correction.startswith("not fitted: step 0 to 1 is no fixed weighted sum")
    assert plan.settings.output_weights is None
    fast = optimize(dit, plan)
    for call in trajectory.calls:
        assert fast(**call).isfinite().all()


def test_progress_counts_every_recorded_and_every_fitted_step(
    dit, dit_trajectory: Trajectory
) -> None:
    seen: list[tuple[int, int]] = []
    fit(dit, dit_trajectory, modes("RFFRFF"), lambda done, total: seen.append((done, total)))
    once = [(k + 1, STEPS) for k in range(STEPS)]
    assert seen == once + once  # the plain model along the recording, then the sweep


def test_fit_leaves_model_and_trajectory_as_they_were(dit, dit_trajectory: Trajectory) -> None:
    before = [{name: value.clone() for name, value in c.items()} for c in dit_trajectory.calls]
    state = {name: value.clone() for name, value in dit.state_dict().items()}
    fit(dit, dit_trajectory, modes("RCRURF"))
    for call, old in zip(dit_trajectory.calls, before, strict=True):
        assert all(torch.equal(call[name], old[name]) for name in old)
    assert all(torch.equal(value, state[name]) for name, value in dit.state_dict().items())


def test_uniform_schedule_is_what_the_trained_plan_runs(trained_plan: Plan) -> None:
    assert trained_plan.schedule == uniform_schedule(LONG, 3, FORECAST)
