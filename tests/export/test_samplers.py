"""Sampler tables: what a recording or a diffusers scheduler gives, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusion import alpha_bar_table, ddim_timesteps
from support.models import STEPS, relative, sample_dit
from torch import Tensor, nn

from calicache.export import SamplerTables, read_sampler
from calicache.export.samplers import replay_scheduler
from calicache.graph_passes import OptimizedModel, Plan, Recording, StepMode, optimize, record
from calicache.graph_passes.common.errors import ExportError

GUIDANCE, NULL = 1.5, 10
LINEAR: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
# Weights found by replay: the scheduler's coefficients are float32 (6e-8), some of them
# differences of numbers near 1, and its arithmetic on values of size 1 may be float32 too.
REPLAYED = {"rtol": 1e-5, "atol": 1e-5}
# Whole runs by the tables against the scheduler: those weights, up to 19 steps on.
WALKED = 1e-4
# Weights found in a recording of the sample's DDIM: x / sqrt(a) cancels against e in float32
# at the noisiest steps.
RECORDED = {"rtol": 1e-4, "atol": 1e-5}

SOLVERS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: DDIMScheduler(clip_sample=False, **LINEAR),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "euler": lambda: EulerDiscreteScheduler(**LINEAR),
    "dpm 2m": lambda: DPMSolverMultistepScheduler(**LINEAR),
    "heun": lambda: HeunDiscreteScheduler(**LINEAR),
}


def ready(scheduler: Any, steps: int = 10) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def guided(output: Tensor, conditional: int = 0, guidance: float = GUIDANCE) -> Tensor:
    parts = output.chunk(2)
    return parts[1 - conditional] + guidance * (parts[conditional] - parts[1 - conditional])


def start(scheduler: Any) -> Tensor:
    return draw(1, 2, 1, 28, 28) * getattr(scheduler, "init_noise_sigma", 1.0)


def sample_with(
    model: nn.Module,
    scheduler: Any,
    conditional: int | None = 0,
    scales: Sequence[float] | None = None,
) -> Tensor:
    """A pipeline's loop over 2 images; with guidance 4 rows, the conditional ones where told."""
    labels, null = torch.tensor([4, 7]), torch.full((2,), NULL)
    pair = [labels, null] if conditional == 0 else [null, labels]
    rows = labels if conditional is None else torch.cat(pair)
    x = start(scheduler)
    with torch.no_grad():
        for step, now in enumerate(scheduler.timesteps):
            scaled = getattr(scheduler, "scale_model_input", None)
            latent = scaled(x, now) if scaled else x
            output = model(
                hidden_states=latent if conditional is None else torch.cat([latent, latent]),
                timestep=torch.full_like(rows, int(now)),
                class_labels=rows,
            )
            e = (
                output
                if conditional is None
                else guided(output, conditional, GUIDANCE if scales is None else scales[step])
            )
            x = scheduler.step(e, now, x).prev_sample
    return x


def walk(rows: Sequence[Sequence[float]], x: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """All latents from the first by x' = a x + b e + c x_before + d e_before."""
    latents, before = [x.double()], []
    for row, output in zip(rows, outputs, strict=True):
        terms = [latents[-1], output.double()]
        used = [*terms, *before][: len(row)]
        latents.append(sum(w * t for w, t in zip(row, used, strict=False)))
        before = terms
    return latents


def assert_walks(
    sampler: SamplerTables,
    x: Tensor,
    recording: Recording,
    model: nn.Module,
    end: Tensor,
    bound: float,
) -> None:
    """The tables along the recorded outputs give every latent of the run and its result."""
    with torch.no_grad():
        outputs = [model(**call) for call in recording.calls]
    mixed = [
        sum(share * part for share, part in zip(shares, output.chunk(sampler.parts), strict=True))
        for shares, output in zip(sampler.mix, outputs, strict=True)
    ]
    recorded = [call["hidden_states"][:2] for call in recording.calls]
    got = walk(sampler.updates, x, mixed)
    scales = [*sampler.scales, 1.0]
    for latent, scale, expected in zip(got, scales, [*recorded, end], strict=True):
        assert relative(scale * latent, expected.double()) < bound


@pytest.fixture(scope="module")
def finished(dit) -> Recording:
    """The sample's DDIM with guidance 1.5, two runs, and their results."""
    with record(dit) as recording:
        for seed in (1, 2):
            recording.finish(sample_dit(dit, seed=seed))
    return recording


def compiled(model: nn.Module, recording: Recording) -> OptimizedModel:
    """All steps REFRESH: nothing here depends on the modes."""
    schedule = [StepMode.REFRESH] * recording.steps
    wishes: dict[str, Any] = {"rank": 4, "order": 0, "correct": False}
    return optimize(model, Plan.from_trajectory(model, recording, schedule=schedule, **wishes))


@pytest.fixture(scope="module")
def fast(dit, finished) -> OptimizedModel:
    return compiled(dit, finished)


@pytest.fixture(scope="module")
def sampler(fast, finished) -> SamplerTables:
    return read_sampler(fast, finished)


# --- a recording with its results --------------------------------------------------------------


@pytest.mark.slow
def test_guidance_scale_and_the_conditional_part_are_recovered(sampler: SamplerTables) -> None:
    assert (sampler.latent, sampler.parts, sampler.conditional) == ("hidden_states", 2, 0)
    # The scale is a quotient of two fitted weights, see RECORDED.
    assert sampler.guidance == pytest.approx(GUIDANCE, rel=1e-4)
    for shares in sampler.mix:
        # Exact but for one float64 subtraction.
        assert sum(shares) == pytest.approx(1.0, abs=1e-12)
        assert shares[0] == sampler.guidance


def test_rows_are_those_of_ddims_formula(sampler: SamplerTables) -> None:
    table = alpha_bar_table()  # float64
    alphas = [*(table[now] for now in ddim_timesteps(STEPS)), torch.tensor(1.0).double()]
    assert len(sampler.updates) == STEPS
    for (a, b), row in zip(pairwise(alphas), sampler.updates, strict=True):
        of_x = (b / a).sqrt()
        expected = torch.stack([of_x, (1 - b).sqrt() - of_x * (1 - a).sqrt()])
        torch.testing.assert_close(torch.tensor(row[:2]).double(), expected, **RECORDED)
        assert row[2:] == (0.0, 0.0)
    assert not sampler.looks_back
    assert sampler.scales == (1.0,) * STEPS


def test_inputs_that_change_with_the_step_alone_are_tables(sampler: SamplerTables) -> None:
    assert list(sampler.inputs) == ["timestep"]
    expected = torch.tensor(ddim_timesteps(STEPS))[:, None].expand(STEPS, 4)
    assert torch.equal(sampler.inputs["timestep"], expected)


def test_recording_without_its_result_is_refused_with_both_ways_out(
    dit, dit_recording, fast
) -> None:
    with pytest.raises(ExportError, match="without its result") as caught:
        read_sampler(fast, dit_recording)
    assert "recording.finish(latents)" in caught.value.fix
    assert "scheduler" in caught.value.fix


def test_result_of_another_shape_is_refused_with_both_shapes(dit, fast) -> None:
    with record(dit) as recording:
        recording.finish(sample_dit(dit)[:, :, :14])
    with pytest.raises(ExportError, match=r"\(2, 1, 14, 28\), its latent \(4, 1, 28, 28\)"):
        read_sampler(fast, recording)


@pytest.mark.slow
def test_sampler_that_adds_noise_is_refused_with_the_step(dit) -> None:
    torch.manual_seed(3)
    with record(dit) as recording:
        scheduler = ready(EulerAncestralDiscreteScheduler(**LINEAR), 4)
        recording.finish(sample_with(dit, scheduler))
    with pytest.raises(ExportError, match=r"step 0 to 1 is no fixed weighted sum.*adds noise"):
        read_sampler(compiled(dit, recording), recording)


@pytest.mark.slow
def test_model_whose_outputs_are_zero_is_refused(dit) -> None:
    model = copy.deepcopy(dit)
    model.final_proj.weight.zero_()  # as untrained adaLN-Zero models are
    model.final_proj.bias.zero_()
    with record(model) as recording:
        recording.finish(sample_dit(model))
    with pytest.raises(ExportError, match=r"sampler: .*zero"):
        read_sampler(compiled(model, recording), recording)


@pytest.mark.slow
@pytest.mark.parametrize("conditional", [0, 1, None])
def test_conditional_part_may_come_second_or_guidance_be_absent(conditional, dit) -> None:
    with record(dit) as recording:
        end = sample_with(dit, ready(SOLVERS["ddim"](), 4), conditional)
        recording.finish(end)
    tables = read_sampler(compiled(dit, recording), recording)
    assert tables.conditional == conditional
    if conditional is None:
        assert (tables.parts, tables.guidance, tables.mix) == (1, None, ((1.0,),) * 4)
    else:
        assert tables.guidance == pytest.approx(GUIDANCE, rel=1e-4)  # see RECORDED
    # float32 sampling, 4 steps, and weights fitted to it.
    assert_walks(tables, draw(1, 2, 1, 28, 28), recording, dit, end, 1e-5)


@pytest.mark.slow
def test_guidance_that_changes_over_the_steps_has_no_scale_but_shares(dit) -> None:
    scales = [1.0, 3.0, 3.0, 1.0]
    with record(dit) as recording:
        scheduler = ready(SOLVERS["ddim"](), 4)
        end = sample_with(dit, scheduler, scales=scales)
        recording.finish(end)
    tables = read_sampler(compiled(dit, recording), recording)
    assert (tables.parts, tables.conditional, tables.guidance) == (2, None, None)
    # Quotients of fitted weights, see RECORDED; the parts differ by some per cent alone.
    assert [shares[0] for shares in tables.mix] == pytest.approx(scales, abs=1e-3)
    assert_walks(tables, draw(1, 2, 1, 28, 28), recording, dit, end, 1e-5)  # as above


# --- a recording and its scheduler -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "conditional"),
    [*((name, 0) for name in SOLVERS), ("euler", None), ("dpm 2m", None)],
)
def test_scheduler_of_the_recorded_run_gives_the_whole_run(name: str, conditional, dit) -> None:
    scheduler = ready(SOLVERS[name](), 4)
    with record(dit) as recording:
        end = sample_with(dit, scheduler, conditional)
    tables = read_sampler(compiled(dit, recording), recording, scheduler)  # used up by the run
    assert (tables.conditional, tables.parts) == (conditional, 1 if conditional is None else 2)
    assert len(tables.updates) == len(recording.calls)
    assert tables.looks_back == (name in ("dpm 2m", "heun"))
    # The recorded outputs, and the scheduler's own coefficients.
    assert_walks(tables, start(scheduler), recording, dit, end, WALKED)


@pytest.mark.parametrize("name", ["flow", "euler", "dpm 2m"])
def test_other_scheduler_than_the_recorded_one_is_refused(
    name: str, fast, finished: Recording
) -> None:
    with pytest.raises(ExportError, match=r"it misses the latent of step 1 by \d"):
        read_sampler(fast, finished, ready(SOLVERS[name](), STEPS))


def test_scheduler_with_another_number_of_steps_is_refused(fast, finished) -> None:
    with pytest.raises(ExportError, match=r"expected 6 timesteps, as in the plan, got 5.*set_time"):
        read_sampler(fast, finished, ready(SOLVERS["ddim"](), 5))


# --- schedulers alone --------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_of_diffusers_gives_its_formula(prediction: str) -> None:
    scheduler = ready(DDIMScheduler(clip_sample=False, prediction_type=prediction, **LINEAR))
    update, scales = replay_scheduler(scheduler, 10)
    table = alpha_bar_table()  # the same betas in float64
    assert (update.parts, scales) == (1, pytest.approx((1.0,) * 10, rel=1e-12))  # exact: x itself
    times = [int(now) for now in scheduler.timesteps]
    assert len(update.weights) == len(times)
    for now, weights in zip(times, update.weights, strict=True):
        a, b = table[now], table[now - 100] if now >= 100 else torch.tensor(1.0).double()
        if prediction == "epsilon":
            of_x = (b / a).sqrt()
            of_e = (1 - b).sqrt() - of_x * (1 - a).sqrt()
        else:  # x_0 = sqrt(a) x - sqrt(1 - a) v, epsilon = sqrt(a) v + sqrt(1 - a) x
            of_x = (a * b).sqrt() + ((1 - a) * (1 - b)).sqrt()
            of_e = (a * (1 - b)).sqrt() - (b * (1 - a)).sqrt()
        expected = torch.stack([of_x, of_e])
        torch.testing.assert_close(torch.tensor(weights).double(), expected, **REPLAYED)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_gives_one_and_the_step_of_sigma(shift: float) -> None:
    update, _ = replay_scheduler(ready(FlowMatchEulerDiscreteScheduler(shift=shift)), 10)

    def shifted(value: Tensor) -> Tensor:
        return shift * value / (1 + (shift - 1) * value)

    # diffusers shifts the ends of its 1,000 training sigmas, then their even spacing once more.
    first, last = shifted(torch.tensor([1.0, 1e-3], dtype=torch.float64)).tolist()
    sigmas = shifted(torch.linspace(first, last, 10, dtype=torch.float64)).tolist()
    assert len(update.weights) == 10
    for (now, after), weights in zip(pairwise([*sigmas, 0.0]), update.weights, strict=True):
        expected = torch.tensor([1.0, after - now])
        torch.testing.assert_close(torch.tensor(weights), expected, **REPLAYED)


def test_euler_scales_the_models_input() -> None:
    scheduler = ready(EulerDiscreteScheduler(**LINEAR))
    update, scales = replay_scheduler(scheduler, 10)
    sigmas = scheduler.sigmas.double()
    # float32 sigmas in one division and a root.
    torch.testing.assert_close(
        torch.tensor(scales).double(), (1 + sigmas[:-1] ** 2).rsqrt(), rtol=1e-6, atol=0
    )
    for k, weights in enumerate(update.weights):
        expected = torch.tensor([1.0, float(sigmas[k + 1] - sigmas[k])])
        torch.testing.assert_close(torch.tensor(weights), expected, **REPLAYED)


@pytest.mark.parametrize("name", SOLVERS)
def test_tables_reproduce_the_scheduler_on_outputs_of_their_own(name: str) -> None:
    scheduler = ready(SOLVERS[name]())
    length = len(scheduler.timesteps)
    update, _ = replay_scheduler(scheduler, length)
    outputs = [draw(100 + k, 1, 2, 8, 8) for k in range(length)]
    latents = [draw(99, 1, 2, 8, 8)]
    for now, output in zip(scheduler.timesteps, outputs, strict=True):
        latents.append(scheduler.step(output, now, latents[-1]).prev_sample)
    for got, expected in zip(walk(update.weights, latents[0], outputs), latents, strict=True):
        assert relative(got, expected.double()) < WALKED


@pytest.mark.parametrize("name", SOLVERS)
def test_scheduler_after_a_whole_run_gives_the_same_tables(name: str) -> None:
    fresh = ready(SOLVERS[name]())
    used = copy.deepcopy(fresh)
    x = draw(1, 1, 2, 8, 8)
    for now in used.timesteps:
        x = used.step(draw(2, 1, 2, 8, 8), now, x).prev_sample
    length = len(fresh.timesteps)
    # The same arithmetic on the same numbers: bit by bit.
    assert replay_scheduler(used, length) == replay_scheduler(fresh, length)


@pytest.mark.parametrize("name", SOLVERS)
def test_scheduler_is_not_changed(name: str) -> None:
    scheduler = ready(SOLVERS[name]())
    before = copy.deepcopy(vars(scheduler))
    replay_scheduler(scheduler, len(scheduler.timesteps))
    assert str(vars(scheduler)) == str(before)
    x, now = draw(1, 1, 2, 8, 8), scheduler.timesteps[0]
    got = scheduler.step(x, now, x).prev_sample
    assert torch.equal(got, ready(SOLVERS[name]()).step(x, now, x).prev_sample)


REFUSED: dict[str, tuple[Callable[[], Any], int]] = {
    "DDIMScheduler": (DDIMScheduler, 0),  # clip_sample is its default
    "EulerAncestralDiscreteScheduler": (EulerAncestralDiscreteScheduler, 0),
    "DDPMScheduler": (lambda: DDPMScheduler(clip_sample=False), 0),
    "UniPCMultistepScheduler": (UniPCMultistepScheduler, 3),  # its corrector looks back further
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_fixed_weighted_sum_is_refused_with_name_step_and_advice(name: str) -> None:
    make, step = REFUSED[name]
    reason = f"{name}: step {step} to {step + 1} is no fixed weighted sum.*clips.*or the `step`"
    torch.manual_seed(0)  # as users do; the scheduler draws its noise from here
    before = torch.get_rng_state()
    with pytest.raises(ExportError, match=reason):
        replay_scheduler(ready(make()), 10)
    assert torch.equal(torch.get_rng_state(), before)
