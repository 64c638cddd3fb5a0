"""Weights that aim at a reference of more steps: what they aim at, what they reach, refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from diffusion import ddim_timesteps
from model import FashionDiT
from support.models import modes, relative, sample_dit
from support.pipelines.tiny import CASES, PipelineCase
from support.search.searches import sample_errors
from support.search.toy_runs import NOWHERE
from torch import Tensor, nn
from weights import DIT_WEIGHTS, load_weights

from calicache.graph_passes import Plan, Recording, StepMode, optimize, record, spread_schedule
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.graph.capture import capture
from calicache.graph_passes.recording.binding import bind
from calicache.graph_passes.rewriting.rewrite import rewrite
from calicache.graph_passes.sampler.recover import RecordedSampler, Reference, recover_sampler
from calicache.graph_passes.sampler.reference import aim_at, fitted_to
from calicache.graph_passes.sampler.replay import replay
from calicache.graph_passes.sampler.update import SamplerSteps
from calicache.graph_passes.search.candidates import step_answers
from calicache.graph_passes.search.rehearse import Rehearsal, Span
from calicache.graph_passes.settings.schedule import anchor_table


class Still(nn.Module):
    """Calls it has many, answers none that matter: latents are given by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        return self.weight * (x + 0.1 * labels[:, None] + timestep[:, None])


def cubic(time: float, seed: float = 0.0) -> Tensor:
    """A latent whose values are polynomials of third degree in time, (1, 3) float64."""
    powers = torch.tensor([time**k for k in range(4)], dtype=torch.float64)
    factors = torch.tensor(
        [[3.0, -2.0, 0.5, 0.1], [1.0, 0.3, -0.7, 0.2], [2.0, 1.0, 0.4, -0.3]], dtype=torch.float64
    )
    return (factors @ powers + seed)[None]


def walked(
    times: Sequence[float],
    *,
    label: float = 1.0,
    seed: float = 0.0,
    runs: int = 2,
    ends: bool = True,
    latent: Callable[..., Tensor] = cubic,
) -> Recording:
    """Runs whose latents lie on cubics of the time."""
    model = Still().eval()
    with record(model) as recording:
        for run in range(runs):
            for time in times:
                call = {"timestep": torch.full((1,), time, dtype=torch.float64)}
                model(x=latent(time, run + seed), labels=torch.full((1,), label).double(), **call)
            if ends:
                recording.finish(latent(0.0, run + seed))
    return recording


def straight(time: float, seed: float = 0.0) -> Tensor:
    """A latent on a straight line, (1, 3) float64."""
    return (1 + time) * torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64) + seed


def recorded(recording: Recording) -> RecordedSampler:
    """The runs as planning has them; their update does not matter here."""
    runs = recording.runs
    steps = SamplerSteps("x", 1, ((1.0, 0.0),) * len(runs[0]))
    outputs = recording.run_outputs
    return RecordedSampler(runs, outputs, recording.ends, steps)


COARSE = (1.0, 0.7, 0.5, 0.2)


def test_aims_are_the_latents_at_the_timesteps_of_the_run() -> None:
    own, finer = walked(COARSE), walked(np.linspace(1, 0.05, 20).tolist())
    aimed = aim_at(recorded(own), own, finer)
    for run in range(2):
        got = [*(call["x"] for call in aimed.runs[run]), aimed.ends[run]]
        # A cubic through four points of a cubic is that cubic; float64.
        for value, time in zip(got, (*COARSE, 0.0), strict=True):
            torch.testing.assert_close(value, cubic(time, run), rtol=1e-12, atol=1e-12)
        for value, time in zip(aimed.outputs[run], COARSE, strict=True):
            exact = cubic(time, run) + 0.1 + time
            torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)
        times = [float(call["timestep"]) for call in aimed.runs[run]]
        assert times == list(COARSE)
    assert aimed.reference == Reference(20, 0.0)


def test_the_last_latent_of_a_timestep_counts() -> None:
    """Heun's method calls the model at a guess of a latent, then at the latent itself."""
    own = walked(COARSE)
    doubled = [t for time in (1.0, 0.9, 0.7, 0.6, 0.5, 0.4, 0.2) for t in (time, time)]
    calls = iter(range(2 * len(doubled)))

    def guess(time: float, seed: float) -> Tensor:
        off = 0.05 * (next(calls, 1) % 2 == 0 and time < 1)
        return cubic(time, seed) + off

    finer = walked(doubled, latent=guess)
    assert finer.calls_per_step == 2
    aimed = aim_at(recorded(own), own, finer.take_runs([1, 3]))
    torch.testing.assert_close(aimed.runs[0][1]["x"], cubic(0.7), rtol=1e-12, atol=1e-12)


def test_runs_of_few_steps_are_interpolated_by_what_there_is() -> None:
    own, finer = (walked(t, latent=straight) for t in ((1.0, 0.5), (1.0, 0.75, 0.25)))
    aimed = aim_at(recorded(own), own, finer)
    # A line through points of a line; float64.
    torch.testing.assert_close(aimed.runs[0][1]["x"], straight(0.5), rtol=1e-12, atol=0)


def test_the_first_call_keeps_its_noise_and_its_output() -> None:
    """Samplers of more steps may scale the noise a little, or begin at another timestep."""
    own, finer = walked(COARSE), walked((1.05, *FINE[1:]))
    runs = recorded(own)
    aimed = aim_at(runs, own, finer)
    assert torch.equal(aimed.runs[0][0]["x"], runs.runs[0][0]["x"])
    assert torch.equal(aimed.outputs[0][0], runs.outputs[0][0])


def test_text_says_how_far_the_recorded_runs_are_off() -> None:
    assert fitted_to(None) == "fitted to the recorded runs"
    assert fitted_to(Reference(20, None)) == "fitted to a reference of 20 steps"
    text = "fitted to a reference of 20 steps, from which the recorded runs are 0.0123 off"
    assert fitted_to(Reference(20, 0.012345)) == text


FINE = (1.0, 0.85, 0.7, 0.6, 0.5, 0.35, 0.2, 0.1)


@pytest.mark.parametrize(
    ("finer", "words"),
    [
        (lambda: walked(FINE, runs=1), "expected 2 runs, got 1"),
        (lambda: walked(COARSE), "expected more than 4 steps in run 0, got 4"),
        (lambda: walked(FINE, seed=9.0), "the noise of run 0, got another, 4.4 apart"),
        (lambda: walked(FINE, label=2.0), "the labels of run 0, got another"),
        (lambda: walked(FINE[:5]), "both sides of timestep 0.2, got steps from 1 to 0.5"),
        (lambda: walked(FINE, ends=False), r"a result of \(1, 3\) for run 0, got none"),
        (lambda: walked([-t for t in FINE]), "one input counts down in both"),
    ],
    ids=["runs", "steps", "noise", "condition", "range", "result", "clock"],
)
def test_other_runs_are_refused(finer: Callable[[], Recording], words: str) -> None:
    own = walked(COARSE)
    with pytest.raises(PlanError, match=words) as error:
        aim_at(recorded(own), own, finer())
    assert error.value.where == "reference"


# --- plans ----------------------------------------------------------------------------------------


@cache
def dit() -> FashionDiT:
    return load_weights(FashionDiT(), DIT_WEIGHTS)


def sample(model: nn.Module, seed: int, steps: int) -> Tensor:
    return sample_dit(model, batch=4, seed=seed, steps=steps)


@cache
def runs(steps: int, seeds: tuple[int, ...] = (1, 2, 3)) -> Recording:
    with record(dit()) as recording:
        for seed in seeds:
            recording.finish(sample(dit(), seed, steps))
    return recording


FEW, MANY = 12, 67  # every sixth of the many timesteps is one of the few


def test_timesteps_of_the_few_are_among_the_many() -> None:
    assert ddim_timesteps(FEW) == ddim_timesteps(MANY)[::6]


@pytest.mark.slow
def test_a_plan_comes_nearer_to_the_reference_than_the_full_run() -> None:
    schedule = modes("RFRFRFRRFRFR")
    plain = Plan.from_trajectory(dit(), runs(FEW), schedule=schedule, rank=1)
    aimed = Plan.from_trajectory(dit(), runs(FEW), schedule=schedule, rank=1, reference=runs(MANY))
    exact, full = sample(dit(), 9, MANY), sample(dit(), 9, FEW)
    off = relative(full, exact)
    errors = [relative(sample(optimize(dit(), p), 9, FEW), exact) for p in (plain, aimed)]
    assert off < errors[0]  # at best the full run
    assert errors[1] < 0.8 * off
    assert aimed.in_sample is not None
    assert aimed.recipe.correction.startswith("fitted to a reference of 67 steps, from which")
    assert plain.recipe.correction == "fitted to the recorded runs"


@pytest.mark.slow
def test_errors_are_against_the_reference() -> None:
    schedule = spread_schedule(FEW, 4, 1.0, StepMode.FORECAST)
    aimed = Plan.from_trajectory(dit(), runs(FEW), schedule=schedule, rank=1, reference=runs(MANY))
    fast = optimize(dit(), aimed)
    errors = [
        e for s in (1, 2, 3) for e in sample_errors(sample(fast, s, FEW), sample(dit(), s, MANY))
    ]
    assert aimed.in_sample is not None
    # The same sums in float32 in another order.
    assert aimed.in_sample.mean == pytest.approx(np.mean(errors), rel=2e-3)
    text = aimed.recipe.correction
    own = [
        e for s in (1, 2, 3) for e in sample_errors(sample(dit(), s, FEW), sample(dit(), s, MANY))
    ]
    assert text.endswith(f"the recorded runs are {np.mean(own):.3g} off")


@pytest.mark.slow
def test_a_reference_that_is_the_recorded_run_changes_nothing() -> None:
    """Its latents at the shared timesteps and its result replaced by the recorded ones."""
    own, finer = runs(FEW), runs(MANY)
    calls = [dict(call) for call in finer.calls]
    outputs, results = dict(finer.outputs), {}
    for run, end in enumerate(own.ends):
        for k, call in enumerate(own.runs[run]):
            place = run * MANY + 6 * k
            calls[place]["hidden_states"] = call["hidden_states"]
            outputs[place] = own.outputs[run * FEW + k]
        results[(run + 1) * MANY] = end
    same = Recording(calls, finer.signature, results, outputs)
    schedule = modes("RFFRFFRRFRFF")
    plans = [
        Plan.from_trajectory(dit(), own, schedule=schedule, rank=1, reference=reference)
        for reference in (None, same)
    ]
    weights = [np.array(plan.recipe.output_weights) for plan in plans]
    np.testing.assert_array_equal(*weights)


@pytest.mark.slow
def test_a_search_aims_and_reports_at_the_reference() -> None:
    plans = [
        Plan.search(dit(), runs(FEW), budget=0.5, modes=("FORECAST",), reference=reference)
        for reference in (None, runs(MANY))
    ]
    exact, full = sample(dit(), 9, MANY), sample(dit(), 9, FEW)
    errors = [relative(sample(optimize(dit(), plan), 9, FEW), exact) for plan in plans]
    assert errors[1] < 0.8 * min(relative(full, exact), errors[0])
    aimed = plans[1]
    assert aimed.front is not None
    assert aimed.front.held_out is not None
    got = sample_errors(sample(optimize(dit(), aimed), 3, FEW), sample(dit(), 3, MANY))
    # The third run is the one to report with; float32 in another order.
    assert aimed.front.held_out.mean == pytest.approx(np.mean(got), rel=2e-3)
    assert aimed.take(0).recipe.correction == aimed.recipe.correction
    assert aimed.recipe.correction.startswith("fitted to a reference of 67 steps")


@pytest.mark.slow
@pytest.mark.parametrize("letters", ["RFRFFRFRFFRR", "RRRRRRRRRRRR", "RFFFFFRFFFRF"])
def test_rehearsals_aim_at_the_reference_too(letters: str) -> None:
    own, finer = runs(FEW, (1,)), runs(MANY, (1,))
    form = bind(dit(), own)
    captured = capture(dit(), form.signature, form.reads)
    plain = recover_sampler(captured, own, form.dependence, FEW)
    aimed = aim_at(plain, own, finer)
    table = anchor_table((StepMode.REFRESH,) * FEW, 2)
    variants = rewrite(captured, NOWHERE, (), {}, (), anchors=table)
    result = replay(variants, aimed, modes(letters), 2)
    rehearsal = Rehearsal(Span.of(aimed), step_answers(result, FEW), {})
    (error,) = rehearsal.errors([modes(letters)], 2)
    # Answers are two numbers a step, for the mean of four samples.
    assert error == pytest.approx(np.mean(result.errors), rel=0.5)
    assert Span.of(aimed).latents.shape != Span.of(plain).latents.shape


@pytest.mark.slow
def test_other_weights_are_fitted_to_a_reference_of_theirs() -> None:
    plan = Plan.from_trajectory(dit(), runs(FEW), schedule=2, mode="FORECAST", reference=runs(MANY))
    again = plan.rebind(dit(), runs(FEW), reference=runs(MANY))
    assert again.recipe == plan.recipe
    without = plan.rebind(dit(), runs(FEW))
    assert without.recipe.correction == "fitted to the recorded runs"
    assert without.recipe.output_weights != plan.recipe.output_weights


def test_a_reference_without_a_fit_is_refused() -> None:
    own = runs(FEW, (1,))
    with pytest.raises(PlanError, match="reference: expected none where no weights are fitted"):
        Plan.from_trajectory(dit(), own, schedule=2, correct=False, reference=own)


def test_something_else_is_no_reference() -> None:
    with pytest.raises(PlanError, match="reference: expected a value of the class Recording"):
        Plan.from_trajectory(dit(), runs(FEW, (1,)), schedule=2, reference="fine.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_pipelines_of_diffusers_aim_at_their_own_longer_runs(case: PipelineCase) -> None:
    """Timesteps of six steps are not always among those of fifty."""

    def recorded_runs(steps: int) -> Recording:
        pipe = case.build()
        with record(pipe.transformer) as recording:
            for seed in (1, 2):
                recording.finish(
                    case.latents(pipe, "A dog", seed, num_inference_steps=steps).clone()
                )
        return recording

    own, finer = recorded_runs(6), recorded_runs(50)
    model = case.build().transformer
    plan = Plan.from_trajectory(model, own, schedule=1, rank=1, reference=finer)
    off = np.mean(
        [e for a, b in zip(own.ends, finer.ends, strict=True) for e in sample_errors(a, b)]
    )
    words = plan.recipe.correction
    assert words == (
        f"fitted to a reference of 50 steps, from which the recorded runs are {off:.3g} off"
    )
    assert plan.in_sample is not None
    # Weights of five numbers a step, fitted to these very runs: below what they begin with.
    assert plan.in_sample.mean < 0.9 * off
