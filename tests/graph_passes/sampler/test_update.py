"""The sampler's update, recovered from recorded calls: what is found, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from diffusion import GuidedDDIM, alpha_bar_table, ddim_timesteps
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import sample_dpm
from support.models import diffusers_calls, relative
from torch import Tensor

from calicache.graph_passes import Dependence
from calicache.graph_passes.common.errors import NoSampler
from calicache.graph_passes.recording.recorder import record
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.timestep import Run
from calicache.graph_passes.sampler.update import (
    SamplerSteps,
    find_latent,
    find_sampler_steps,
    latent_channels,
)

STEPS, GUIDANCE = 8, 1.5
# Absolute and relative, on fitted weights of size 1: samplers compute in float32 (6e-8 a
# value), and a step's e_k is never parallel to x_k by less than a few per cent here.
FITTED = 1e-5

Model = Callable[[Tensor, int], Tensor]


def toy_model(channels: int = 2) -> Model:
    """Output of a fixed random map; nonlinear, so that e_k is no multiple of x_k."""
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(channels, channels, generator=draw)

    def model(x: Tensor, step: int) -> Tensor:
        return torch.tanh(torch.einsum("oc,bchw->bohw", weight, x) + 0.3 * step).roll(1, -1)

    return model


def noise(seed: int = 1, batch: int = 2) -> Tensor:
    return torch.randn(batch, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def run_of(solver: Callable[[Model, Tensor], Iterator[tuple[Tensor, Tensor]]], seed: int = 1):
    """Calls and outputs of one run of a solver."""
    pairs = list(solver(toy_model(), noise(seed)))
    return [{"x": x} for x, _ in pairs], [output for _, output in pairs]


def euler(model: Model, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Flow matching: x' = x + (s' - s) v, s from 1 to 0."""
    for step, (now, after) in enumerate(pairwise(torch.linspace(1, 0, STEPS + 1).tolist())):
        velocity = model(x, step)
        yield x, velocity
        x = x + (after - now) * velocity


def adams_bashforth(model: Model, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The two-step solver x' = x + h (1.5 e - 0.5 e_before); the first step is Euler's."""
    before = None
    for step in range(STEPS):
        output = model(x, step)
        yield x, output
        slope = output if before is None else 1.5 * output - 0.5 * before
        x, before = x - 0.1 * slope, output


def ancestral(model: Model, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Euler with fresh noise at every step."""
    draw = torch.Generator().manual_seed(11)
    for step in range(STEPS):
        output = model(x, step)
        yield x, output
        x = 0.9 * x - 0.1 * output + 0.1 * torch.randn(x.shape, generator=draw)


def assert_reproduces(steps: SamplerSteps, run: Run, outputs: Sequence[Tensor]) -> None:
    """Every recorded latent comes out of `next_latent`."""
    before: list[Tensor] = []
    for step in range(len(run) - 1):
        now = steps.terms(run[step][steps.latent], outputs[step])
        got = steps.next_latent(step, now, before)
        # The sampler's own float32 arithmetic in another order, a few operations deep.
        torch.testing.assert_close(got, run[step + 1][steps.latent], rtol=1e-5, atol=1e-5)
        before = now


def guided_run(seed: int = 1, guidance: float = GUIDANCE) -> tuple[list[dict], list[Tensor]]:
    """DDIM with batched guidance over a model whose halves differ."""
    run: list[dict[str, Tensor]] = []
    outputs: list[Tensor] = []
    model = toy_model()

    def denoiser(hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        run.append({"hidden_states": hidden_states, "timestep": timestep})
        plain = model(hidden_states, len(run))
        outputs.append(plain + 0.2 * class_labels[:, None, None, None] * plain.flip(-1).cos())
        return outputs[-1]

    list(GuidedDDIM(STEPS, guidance, 10).latents(denoiser, noise(seed), torch.tensor([1, 2])))
    return run, outputs


def test_guided_ddim_gives_the_weights_of_its_formula() -> None:
    run, outputs = guided_run()
    steps = find_sampler_steps("hidden_states", [run], [outputs], [None])
    assert (steps.latent, steps.parts) == ("hidden_states", 2)
    assert len(steps.weights) == STEPS - 1
    table = alpha_bar_table()
    for (now, after), weights in zip(pairwise(ddim_timesteps(STEPS)), steps.weights, strict=True):
        a, b = table[now], table[after]
        of_x = (b / a).sqrt()
        of_e = (1 - b).sqrt() - of_x * (1 - a).sqrt()
        expected = torch.stack([of_x, GUIDANCE * of_e, (1 - GUIDANCE) * of_e])
        # rtol above FITTED: x / sqrt(a) cancels against e in float32 at the noisiest steps.
        torch.testing.assert_close(torch.tensor(weights).double(), expected, rtol=1e-4, atol=1e-5)
    assert_reproduces(steps, run, outputs)


def test_two_runs_give_the_same_weights_as_one() -> None:
    runs, outputs = zip(guided_run(1), guided_run(2), strict=True)
    both = find_sampler_steps("hidden_states", runs, outputs, [None] * len(runs))
    one = find_sampler_steps("hidden_states", runs[:1], outputs[:1], [None])
    assert both.parts == one.parts
    # Two fits of the same numbers, both within their rounding.
    torch.testing.assert_close(
        torch.tensor(both.weights), torch.tensor(one.weights), rtol=1e-4, atol=1e-5
    )


def test_equal_guidance_parts_share_the_weight_instead_of_cancelling() -> None:
    run, outputs = guided_run()
    same = [output.chunk(2)[0].repeat(2, 1, 1, 1) for output in outputs]
    moved = [{"x": call["hidden_states"]} for call in run[:1]]
    for output in same[:-1]:
        moved.append({"x": 0.9 * moved[-1]["x"] - 0.2 * output})
    steps = find_sampler_steps("x", [moved], [same], [None])
    for weights in steps.weights:
        # The smallest solution: halves of -0.2. float32 latents, see FITTED.
        assert weights == pytest.approx((0.9, -0.1, -0.1), rel=1e-4, abs=FITTED)


def test_euler_flow_matching_gives_one_and_the_step() -> None:
    run, outputs = run_of(euler)
    steps = find_sampler_steps("x", [run], [outputs], [None])
    assert steps.parts == 1
    for weights in steps.weights:
        assert weights == pytest.approx((1.0, -1 / STEPS), rel=FITTED, abs=FITTED)
    assert_reproduces(steps, run, outputs)


def test_adams_bashforth_needs_the_output_of_the_step_before() -> None:
    run, outputs = run_of(adams_bashforth)
    steps = find_sampler_steps("x", [run], [outputs], [None])
    first, *later = steps.weights
    assert first == pytest.approx((1.0, -0.1), rel=FITTED, abs=FITTED)
    for weights in later:
        # Of x, e, x_before, e_before. x - x_before is a sum of outputs, which the fit may trade
        # against them from the third latent on, so only the latents are compared below.
        assert len(weights) == 4
    assert later[0] != pytest.approx((1.0, -0.1, 0.0, 0.0), abs=1e-3)
    assert_reproduces(steps, run, outputs)


def test_dpm_solver_of_diffusers_on_a_real_model_is_found(dit) -> None:
    outputs: list[Tensor] = []
    handle = dit.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    try:
        with record(dit) as recording:
            sample_dpm(dit, torch.randn(2, 1, 28, 28), torch.tensor([1, 2]), STEPS)
    finally:
        handle.remove()
    (run,) = recording.runs
    steps = find_sampler_steps("hidden_states", [run], [outputs], [None])
    assert steps.parts == 2
    # Second order looks back: x_{k-1} and both parts of e_{k-1}. The last step is not seen.
    assert [len(weights) for weights in steps.weights[1:]] == [6] * (STEPS - 2)
    assert_reproduces(steps, run, outputs)


def test_sampler_that_adds_noise_is_refused_with_the_step_and_a_reason() -> None:
    run, outputs = run_of(ancestral)
    with pytest.raises(NoSampler, match=r"step 0 to 1 is no fixed weighted sum.*adds noise"):
        find_sampler_steps("x", [run], [outputs], [None])


def test_sampler_that_adds_noise_late_is_refused_at_that_step() -> None:
    run, outputs = run_of(euler)
    run[5] = {"x": run[5]["x"] + 0.1 * noise(9)}
    with pytest.raises(NoSampler, match="step 4 to 5"):
        find_sampler_steps("x", [run], [outputs], [None])


def test_updates_that_differ_from_run_to_run_are_refused() -> None:
    run, outputs = run_of(euler)
    fast = [{"x": call["x"] * 2**step} for step, call in enumerate(run)]
    with pytest.raises(NoSampler, match="no fixed weighted sum"):
        find_sampler_steps("x", [run, fast], [outputs] * 2, [None] * 2)


@settings(max_examples=15, deadline=None)
@given(
    of_x=st.floats(0.5, 1.5),
    of_e=st.lists(st.floats(-1, 1), min_size=1, max_size=4),
    runs=st.just(2),
)
def test_any_weighted_sum_of_latent_and_parts_is_recovered(
    of_x: float, of_e: list[float], runs: int
) -> None:
    parts = len(of_e)
    recorded, outputs = [], []
    for seed in range(runs):
        x = noise(seed)
        run, outs = [], []
        for step in range(3):
            out = torch.cat([toy_model()(x + part, step) for part in range(parts)])
            run.append({"x": torch.cat([x] * parts)})
            outs.append(out)
            x = of_x * x + sum(w * e for w, e in zip(of_e, out.chunk(parts), strict=True))
        recorded.append(run)
        outputs.append(outs)
    steps = find_sampler_steps("x", recorded, outputs, [None] * len(recorded))
    assert steps.parts == parts
    for weights in steps.weights:
        assert weights == pytest.approx((of_x, *of_e), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_number_of_parts_is_the_number_of_equal_copies(parts: int) -> None:
    run = [{"x": torch.cat([noise(step, batch=1)] * parts)} for step in range(2)]
    outputs = [noise(7 + step, batch=parts) for step in range(2)]
    run[1]["x"] = run[0]["x"] - 0.1 * torch.cat([outputs[0].chunk(parts)[0]] * parts)
    assert find_sampler_steps("x", [run], [outputs], [None]).parts == parts


def test_copies_that_part_in_a_later_step_are_no_parts() -> None:
    run, outputs = run_of(euler)
    run[0] = {"x": torch.cat([noise(1, batch=1)] * 2)}
    run[1] = {"x": run[0]["x"] - outputs[0] / STEPS}
    assert find_sampler_steps("x", [run[:2]], [outputs[:2]], [None]).parts == 1


LATENT, CONSTANT = Dependence.LATENT, Dependence.CONSTANT


def test_latent_is_the_input_of_the_outputs_shape() -> None:
    call = {"x": noise(), "timestep": torch.zeros(2), "mask": noise()}
    classes = {"x": LATENT, "timestep": LATENT, "mask": CONSTANT}
    assert find_latent(call, noise(), classes) == "x"


@pytest.mark.parametrize(
    ("names", "count"), [((), 0), (("x", "previous"), 2), (("x", "previous", "third"), 3)]
)
def test_no_or_several_latents_are_refused_with_their_number(
    names: tuple[str, ...], count: int
) -> None:
    call = {"other": torch.zeros(2, 3), **{name: noise() for name in names}}
    with pytest.raises(NoSampler, match=f"{count} inputs have the output's shape"):
        find_latent(call, noise(), dict.fromkeys(call, LATENT))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_latent_that_no_weights_apply_to_is_none(dtype: torch.dtype) -> None:
    with pytest.raises(NoSampler, match="0 inputs have the output's shape"):
        find_latent({"x": noise().to(dtype)}, noise(), {"x": LATENT})


def test_channels_of_a_learned_variance_are_cut() -> None:
    latent, output = noise(), torch.cat([noise(2), noise(3)], 1)
    assert torch.equal(latent_channels(output, latent), noise(2))
    assert latent_channels(latent, latent) is latent
    for unlike in (noise(batch=4), output[:, :, 1:], output[:, :1], torch.zeros(4)):
        with pytest.raises(NoSampler, match="is unlike the latent"):
            latent_channels(unlike, latent)


def test_diffusers_dit_with_learned_variance_is_found(diffusers_dit, diffusers_recording) -> None:
    outputs = diffusers_calls(diffusers_dit)
    (run,) = diffusers_recording.runs
    latent = find_latent(run[0], outputs[0], diffusers_recording.dependence)
    assert latent == "hidden_states"
    cut = [latent_channels(output, run[0][latent]) for output in outputs]
    assert cut[0].shape == (4, 4, 8, 8)
    steps = find_sampler_steps(latent, [run], [cut], [None])
    for weights in steps.weights:
        assert weights == pytest.approx((1.0, -0.2), rel=FITTED, abs=FITTED)


def test_recorded_runs_of_the_sample_are_found(dit, dit_recording: Recording) -> None:
    (run,) = dit_recording.runs
    with torch.no_grad():
        outputs = [dit(**call) for call in run]
    steps = find_sampler_steps("hidden_states", [run], [outputs], [None])
    assert steps.parts == 2
    whole = steps.next_latent(0, steps.terms(run[0]["hidden_states"], outputs[0]), [])
    # A fit to float32 values of one step.
    assert relative(whole, run[1]["hidden_states"]) < 1e-5
