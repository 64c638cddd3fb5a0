"""An artifact beside the full model: against the same runs in eager PyTorch, and refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from diffusion import GuidedDDIM
from methods import sample_dpm
from model import FashionDiT, FashionDiTConfig
from support.comparisons import (
    FORECAST,
    GUIDANCE,
    NULL,
    STEPS,
    C,
    Denoise,
    Latents,
    R,
    U,
    ddim,
    draw,
    errors_of,
    euler,
    euler_scheduler,
    flow,
    recorded,
    residual,
    two_calls,
)
from support.models import relative, shake
from torch import Tensor, nn

from calicache.export import Layout, Session, export_onnx, load_artifact, read_sampler
from calicache.graph_passes import OptimizedModel, Plan, Recording, StepMode, optimize, record
from calicache.graph_passes.common.errors import ArtifactError, CompareError, NoSampler
from calicache.tools.compare.comparison import WHOLE_RUN, Comparison, compare
from calicache.tools.compare.pictures import PictureKind
from calicache.tools.compare.recorded_runs import matching_runs
from calicache.tools.compare.side_by_side import plain_output

pytestmark = pytest.mark.slow

SCHEDULE = (R, C, R, U, R, FORECAST)
# Relative L2 of one call in two runtimes: float32 rounding gives 1e-6 at the most.
SAME = 1e-5
# Latents of ONNX Runtime and torch differ by 1e-6 of themselves after six steps, the update being
# recovered from a float32 recording, and no error moves by more than the latents do (rtol 0). The
# errors compared here are 1e-4 and more.
ATOL = 3e-6


@dataclass(frozen=True, slots=True)
class Case:
    """A model, runs of it that no plan has seen, and the same runs of the optimised model."""

    fast: OptimizedModel
    folder: Path
    recording: Recording
    wanted: list[Latents]
    got: list[Latents]


def case_of(
    model: nn.Module,
    denoise: Denoise,
    noises: Sequence[Tensor],
    schedule: Sequence[StepMode],
    folder: Path,
    layouts: Sequence[Layout] = tuple(Layout),
    **options: object,
) -> Case:
    """Plan on the first noises, compare on others."""
    half = len(noises) // 2
    planned, _ = recorded(model, denoise, noises[:half])
    plan = Plan.from_trajectory(model, planned, schedule=schedule, rank=4)
    fast = optimize(model, plan)
    for layout in layouts:
        whole = layout is Layout.SAMPLER
        sampler = read_sampler(fast, planned, **options) if whole else None
        export_onnx(fast, folder / layout, layout=layout, sampler=sampler)
    recording, wanted = recorded(model, denoise, noises[half:])
    got = []
    for noise in noises[half:]:
        fast.reset()
        got.append(denoise(fast, noise))
    return Case(fast, folder, recording, wanted, got)


def assert_same_errors(comparison: Comparison, case: Case) -> None:
    expected = errors_of(case.got, case.wanted)
    for row, errors in zip(comparison.steps, expected, strict=True):
        assert row.error is not None
        mean = sum(errors) / len(errors)
        assert row.error.mean == pytest.approx(mean, rel=0, abs=ATOL), row.step
        assert row.error.worst == pytest.approx(max(errors), rel=0, abs=ATOL), row.step
        assert row.error.samples == len(errors)
    last = comparison.steps[-1].error
    assert last is not None
    assert comparison.final == last
    assert_same_results(comparison, case)


def assert_same_results(comparison: Comparison, case: Case) -> None:
    """Final latents: rtol SAME of their norm, as for one call, over six steps."""
    got = torch.cat([latents[-1] for latents in case.got])
    wanted = torch.cat([latents[-1] for latents in case.wanted])
    assert relative(comparison.cached, got) < SAME
    assert torch.equal(comparison.full, wanted)
    # Far enough from the full run for the bound to tell.
    assert relative(wanted, got) > 5 * SAME


TWO = (Layout.STEP, Layout.SAMPLER)  # a session hides how `pair` differs from `step`


@pytest.fixture(scope="module")
def guided(dit, tmp_path_factory) -> Case:
    """All modes, output weights fitted to other runs, guidance in one batch."""
    noises = [draw(seed, 2, 1, 28, 28) for seed in (1, 2, 3, 4)]
    return case_of(dit, ddim, noises, SCHEDULE, tmp_path_factory.mktemp("a guided case"))


@pytest.fixture(scope="module")
def comparisons(guided: Case) -> dict[Layout, Comparison]:
    return {layout: compare(guided.folder / layout, guided.recording) for layout in Layout}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Case:
    """Tokens, without guidance."""
    noises = [draw(1, 2, 5, 8), draw(3, 2, 5, 8)]
    return case_of(
        residual(), flow(), noises, (R, C) * 3, tmp_path_factory.mktemp("small"), TWO[:1]
    )


@pytest.fixture(scope="module")
def plain_folder(dit, guided: Case, tmp_path_factory) -> Path:
    """REFRESH at every step."""
    plan = guided.fast.plan.with_schedule((R,) * STEPS)
    folder = tmp_path_factory.mktemp("plain") / "d"
    export_onnx(optimize(dit, plan), folder)
    return folder


# --- the full model ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [Layout.STEP, Layout.PAIR])
def test_step_0_gives_the_full_model_for_the_call_of_any_step(
    layout: Layout, dit, guided: Case
) -> None:
    assert guided.fast.plan.recipe.correction == "fitted to the recorded runs"
    session = Session(guided.folder / layout)
    for call in guided.recording.calls:
        session.step(0, **call)
        session.step(1, **call)  # leaves kept values behind
        got = torch.from_numpy(session.step(0, **call))
        with torch.no_grad():
            assert relative(got, dit(**call)) < SAME


@pytest.mark.parametrize("layout", [Layout.STEP, Layout.PAIR])
def test_fitted_weights_of_step_0_are_those_of_its_own_output(layout: Layout, guided: Case) -> None:
    weights = guided.fast.plan.recipe.output_weights
    assert weights is not None
    # What was fitted there is rounding: 1e-7 of the latent, over the share of the output in it.
    assert weights[0] == pytest.approx((1.0, *[0.0] * (len(weights[0]) - 1)), abs=1e-5)
    assert weights[1] != pytest.approx((1.0, *[0.0] * (len(weights[1]) - 1)), abs=1e-5)
    assert load_artifact(guided.folder / layout).output_weights == weights


def export_odd(case: Case, folder: Path, own: float, latent: float) -> OptimizedModel:
    """The same artifact with other output weights in step 0."""
    recipe = case.fast.plan.recipe
    table = recipe.output_weights
    assert table is not None
    odd = ((own, *table[0][1:-1], latent), *table[1:])
    plan = replace(case.fast.plan, recipe=replace(recipe, output_weights=odd))
    fast = optimize(case.fast.original, plan)
    export_onnx(fast, folder)
    return fast


def test_other_weights_of_step_0_are_taken_back(small: Case, tmp_path: Path) -> None:
    fast = export_odd(small, tmp_path / "odd", own=0.9, latent=0.05)
    comparison = compare(tmp_path / "odd", small.recording)
    got = [flow()(fast, draw(3, 2, 5, 8))]
    assert_same_errors(comparison, replace(small, fast=fast, got=got))
    assert comparison.steps[0].error is not None
    assert comparison.steps[0].error.mean > 1e-3


def test_half_precision_fits_weights_of_step_0_that_are_taken_back(tmp_path: Path) -> None:
    model = residual(torch.float16)
    planned, _ = recorded(model, flow(torch.float16), [draw(1, 2, 5, 8)])
    plan = Plan.from_trajectory(model, planned, schedule=(R, C) * 3, rank=4)
    export_onnx(optimize(model, plan), tmp_path / "half")
    manifest = load_artifact(tmp_path / "half")
    assert manifest.output_weights is not None
    own, *_, latent = manifest.output_weights[0]
    assert abs(own - 1) + abs(latent) > 1e-4
    session = Session(tmp_path / "half")
    for call in planned.calls:
        mixed = torch.from_numpy(session.step(0, **call)).float()
        got = plain_output(manifest, mixed, call["hidden_states"].float())
        # float16 rounds the output (5e-4), in each runtime and when it is mixed.
        assert relative(got, model(**call).float()) < 1e-3


def test_artifact_without_output_weights_has_those_of_its_own_output(plain_folder: Path) -> None:
    manifest = load_artifact(plain_folder)
    assert manifest.output_weights is None
    output = draw(1, 2, 3)
    assert torch.equal(plain_output(manifest, output, draw(2, 2, 3)), output)


def test_step_0_without_the_output_is_refused(small: Case, tmp_path: Path) -> None:
    export_odd(small, tmp_path / "odd", own=0.01, latent=0.0)
    with pytest.raises(CompareError) as refused:
        compare(tmp_path / "odd", small.recording)
    assert str(refused.value) == (
        "compare: output weights: expected a step 0 that returns the plain model's output, got one "
        "with a weight of 0.01 for it. Make the plan again from the recording, and export it."
    )


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [Layout.STEP, Layout.PAIR])
def test_errors_by_step_are_those_of_the_eager_run(
    layout: Layout, guided: Case, comparisons: dict[Layout, Comparison]
) -> None:
    assert_same_errors(comparisons[layout], guided)
    assert [row.mode for row in comparisons[layout].steps] == [*SCHEDULE]
    assert (comparisons[layout].runs, comparisons[layout].samples) == (2, 4)
    assert comparisons[layout].no_steps is None


def test_sampler_layout_has_the_result_alone(
    guided: Case, comparisons: dict[Layout, Comparison]
) -> None:
    comparison = comparisons[Layout.SAMPLER]
    assert_same_results(comparison, guided)
    final = errors_of(guided.got, guided.wanted)[-1]
    assert comparison.final.mean == pytest.approx(sum(final) / 4, rel=0, abs=ATOL)
    assert comparison.final.worst == pytest.approx(max(final), rel=0, abs=ATOL)
    for row in comparison.steps:
        assert (row.error, row.full_seconds, row.cached_seconds) == (None, None, None)
    assert {row.full_seconds for row in comparison.modes} == {None}
    assert comparison.cached_seconds > 0
    assert comparison.no_steps == WHOLE_RUN


def test_full_run_of_the_sampler_layout_is_reckoned_from_its_refresh_steps(
    comparisons: dict[Layout, Comparison],
) -> None:
    whole, steps = comparisons[Layout.SAMPLER], comparisons[Layout.STEP]
    assert whole.full_seconds > 0
    assert whole.speedup == whole.full_seconds / whole.cached_seconds
    # The plain model's run, reckoned, is of the order of the one that was measured.
    assert 0.1 < whole.full_seconds / steps.full_seconds < 10


def test_refresh_at_every_step_has_no_error_but_rounding(guided: Case, plain_folder: Path) -> None:
    comparison = compare(plain_folder, guided.recording)
    for row in comparison.steps:
        assert row.error is not None
        assert row.error.worst < SAME
    assert comparison.final.worst < SAME
    assert comparison.macs_share == 1.0
    assert comparison.measures is not None
    assert comparison.measures.psnr_worst > 90


def test_everything_but_the_times_is_the_same_again(
    guided: Case, comparisons: dict[Layout, Comparison]
) -> None:
    for layout, first in comparisons.items():
        again = compare(guided.folder / layout, guided.recording)
        assert untimed(again) == untimed(first)
        assert torch.equal(again.cached, first.cached)


def untimed(comparison: Comparison) -> Comparison:
    none = {"full_seconds": None, "cached_seconds": None}
    return replace(
        comparison,
        steps=tuple(replace(row, **none) for row in comparison.steps),
        modes=tuple(replace(row, **none) for row in comparison.modes),
        full_seconds=0.0,
        cached_seconds=0.0,
    )


def test_first_runs_alone_can_be_compared(
    guided: Case, comparisons: dict[Layout, Comparison]
) -> None:
    one = compare(guided.folder / "step", guided.recording, runs=1)
    assert (one.runs, one.samples) == (1, 2)
    assert torch.equal(one.cached, comparisons[Layout.STEP].cached[:2])


def test_two_calls_a_step_are_compared(tmp_path: Path) -> None:
    noises = [draw(seed, 2, 5, 8) for seed in (1, 3)]
    case = case_of(residual(), two_calls, noises, SCHEDULE, tmp_path, TWO)
    assert load_artifact(tmp_path / "step").calls_per_step == 2
    assert_same_errors(compare(tmp_path / "step", case.recording), case)
    assert_same_results(compare(tmp_path / "sampler", case.recording), case)


def test_sampler_that_looks_back_is_compared(tmp_path: Path) -> None:
    def dpm(model, noise: Tensor) -> Latents:
        return [sample_dpm(model, noise, torch.tensor([1, 2]), STEPS)]

    noises = [draw(seed, 2, 5, 8) for seed in (1, 3)]
    case = case_of(residual(), dpm, noises, (R, C, R, C, R, C), tmp_path, TWO)
    for layout in TWO:
        assert_same_results(compare(tmp_path / layout, case.recording), case)


def test_sampler_that_scales_the_latent_is_compared(tmp_path: Path) -> None:
    model = residual()
    noises = [float(euler_scheduler().init_noise_sigma) * draw(seed, 2, 5, 8) for seed in (1, 3)]
    case = case_of(model, euler, noises, (R, C) * 3, tmp_path, TWO, scheduler=euler_scheduler())
    for layout in TWO:
        comparison = compare(tmp_path / layout, case.recording)
        assert_same_results(comparison, case)
        assert comparison.measures is None
        assert comparison.no_measures == (
            "results of the shape (2, 5, 8) are no (B, C, H, W), and there is no decoder"
        )
    record = load_artifact(tmp_path / "sampler").sampler
    assert record is not None
    first = case.recording.calls[0]["hidden_states"]
    assert relative(first / record.scale, noises[1]) < SAME


def test_unscaled_latents_have_the_scale_1(guided: Case) -> None:
    record = load_artifact(guided.folder / "sampler").sampler
    assert record is not None
    assert record.scale == 1.0


def test_half_precision_is_compared_in_float32(tmp_path: Path) -> None:
    model, denoise = residual(torch.float16), flow(torch.float16)
    case = case_of(
        model, denoise, [draw(1, 2, 5, 8), draw(3, 2, 5, 8)], (R, C) * 3, tmp_path, TWO[:1]
    )
    comparison = compare(tmp_path / "step", case.recording)
    expected = errors_of(case.got, case.wanted)
    for row, errors in zip(comparison.steps, expected, strict=True):
        assert row.error is not None
        # float16 rounds the recorded latents to 5e-4, and the model's answers in each runtime.
        assert row.error.mean == pytest.approx(sum(errors) / 2, abs=2e-3)
    refreshed = optimize(model, case.fast.plan.with_schedule((R,) * STEPS))
    export_onnx(refreshed, tmp_path / "plain")
    assert compare(tmp_path / "plain", case.recording).final.worst < 2e-3


# --- times ---------------------------------------------------------------------------------------


def test_times_of_steps_modes_and_runs_belong_together(
    comparisons: dict[Layout, Comparison],
) -> None:
    comparison = comparisons[Layout.STEP]
    for row in comparison.steps:
        assert row.full_seconds is not None
        assert row.cached_seconds is not None
        assert min(row.full_seconds, row.cached_seconds) > 0
    assert [(row.mode, row.steps) for row in comparison.modes] == [
        (R, 3),
        (C, 1),
        (U, 1),
        (FORECAST, 1),
    ]
    # Medians over two runs are means, so that those of the steps add up to those of the runs.
    for name in ("full_seconds", "cached_seconds"):
        steps = [getattr(row, name) for row in comparison.steps]
        assert getattr(comparison, name) == pytest.approx(math.fsum(steps), rel=1e-9)
    single = [row for row in comparison.modes if row.steps == 1]
    for row in single:
        (step,) = (step for step in comparison.steps if step.mode is row.mode)
        assert (row.full_seconds, row.cached_seconds) == (step.full_seconds, step.cached_seconds)
    assert comparison.speedup == comparison.full_seconds / comparison.cached_seconds
    assert set(comparison.environment) == {"machine", "versions"}


@pytest.mark.parametrize(("layout", "total"), [("step", 24), ("sampler", 3)])
def test_progress_counts_every_step(layout: str, total: int, guided: Case) -> None:
    seen: list[tuple[float, float]] = []
    compare(
        guided.folder / layout,
        guided.recording,
        on_progress=lambda now: seen.append((now.done, now.total)),
    )
    assert list(dict.fromkeys(seen)) == [(k, total) for k in range(total + 1)]


# --- pictures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latent_case(diffusers_dit, tmp_path_factory) -> Case:
    """Latents of 4 channels, 8 by 8; the model has 8, of which the sampler takes 4."""
    labels = torch.tensor([1, 2, NULL, NULL])

    def denoise(model, x: Tensor) -> Latents:
        scheduler = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(STEPS)
        latents = []
        with torch.no_grad():
            for now in scheduler.timesteps:
                rows = torch.cat([x, x])
                output = model(rows, timestep=now.expand(4), class_labels=labels).sample
                conditional, unconditional = output[:, :4].chunk(2)
                e = unconditional + GUIDANCE * (conditional - unconditional)
                x = scheduler.step(e, now, x).prev_sample
                latents.append(x)
        return latents

    noises = [draw(seed, 2, 4, 8, 8) for seed in (1, 3)]
    folder = tmp_path_factory.mktemp("latents")
    return case_of(diffusers_dit, denoise, noises, (R, FORECAST) * 3, folder, TWO)


def test_images_are_measured_in_their_range(guided: Case) -> None:
    # The results of a model that nobody trained lie far beyond those of images.
    measures = compare(guided.folder / "step", guided.recording, decoder=Tensor.float).measures
    assert measures is not None
    assert (measures.kind, measures.data_range) == (PictureKind.DECODED, 2.0)
    wanted, got = (
        torch.cat([latents[-1] for latents in runs]).clamp(-1, 1)
        for runs in (guided.wanted, guided.got)
    )
    squared = (got - wanted).double().square().mean((1, 2, 3))
    decibels = (10 * (4 / squared).log10()).tolist()
    # ATOL of the differences, which are 1e-3, moves a PSNR by 0.03.
    assert measures.psnr_mean == pytest.approx(sum(decibels) / 4, abs=0.1)
    assert measures.psnr_worst == pytest.approx(min(decibels), abs=0.1)
    assert measures.ssim_worst is not None
    assert 0.9 < measures.ssim_worst <= 1.0


def test_latents_of_a_model_with_learned_variance(latent_case: Case) -> None:
    comparison = compare(latent_case.folder / "step", latent_case.recording)
    assert_same_errors(comparison, latent_case)
    assert_same_results(compare(latent_case.folder / "sampler", latent_case.recording), latent_case)
    measures = comparison.measures
    assert measures is not None
    assert (measures.kind, measures.data_range) == (PictureKind.LATENTS, 1.0)
    assert measures.ssim_mean is None  # 8 pixels


def test_decoder_makes_images_of_latents(latent_case: Case) -> None:
    def decode(latents: Tensor) -> Tensor:
        return latents[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2).tanh()

    folder = latent_case.folder / "step"
    comparison = compare(folder, latent_case.recording, decoder=decode)
    assert comparison.measures is not None
    assert comparison.measures.kind is PictureKind.DECODED
    assert comparison.measures.ssim_mean is not None
    assert comparison.pictures is not None
    assert torch.equal(comparison.pictures.full, decode(comparison.full))
    assert torch.equal(comparison.pictures.cached, decode(comparison.cached))


# --- refusals ------------------------------------------------------------------------------------


def refusal(folder: Path, recording: Recording, **options: int) -> str:
    with pytest.raises(CompareError) as refused:
        compare(folder, recording, **options)
    return str(refused.value)


def test_other_steps_are_refused(dit, guided: Case) -> None:
    with record(dit) as recording:
        for steps in (STEPS, STEPS - 1):
            noise, labels = draw(3, 2, 1, 28, 28), torch.tensor([0, 1])
            recording.finish(GuidedDDIM(steps, GUIDANCE, NULL).sample(dit, noise, labels))
    assert refusal(guided.folder / "step", recording) == (
        "compare: run 1: expected 6 steps, as in the artifact's schedule, got 5 in the recording. "
        "Compare with whole runs of this many steps, or plan and export for theirs."
    )
    assert compare(guided.folder / "step", recording, runs=1).runs == 1


@pytest.mark.parametrize("layout", list(Layout))
def test_run_without_result_is_refused(layout: Layout, dit, guided: Case) -> None:
    recording, _ = recorded(dit, ddim, [draw(3, 2, 1, 28, 28)], finish=False)
    assert refusal(guided.folder / layout, recording) == (
        "compare: run 0: expected its result, which the final error is measured against, got none "
        "in the recording. Call recording.finish(latents) after every recorded run."
    )


def test_another_batch_size_is_refused(dit, guided: Case) -> None:
    recording, _ = recorded(dit, ddim, [draw(3, 3, 1, 28, 28)])
    assert refusal(guided.folder / "pair", recording) == (
        "compare: input hidden_states: expected float32 (4, 1, 28, 28), as in the artifact, got "
        "float32 (6, 1, 28, 28) in the recording. Record with this shape and dtype, or export for "
        "the recorded ones (export_onnx(fast.for_call(...), ...) for another batch size)."
    )


def test_another_model_is_refused_by_its_inputs(guided: Case) -> None:
    class Renamed(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return x * timestep[:, None, None]

    model = Renamed().eval()
    with record(model) as recording:
        x = draw(1, 2, 5, 8)
        for now in (0.9, 0.5, 0.1):
            x = x - 0.1 * model(x, torch.full((2,), now))
        recording.finish(x)
    assert refusal(guided.folder / "step", recording) == (
        "compare: inputs: expected hidden_states, timestep, class_labels, got x, timestep in the "
        "recording. Compare an artifact with a recording of its own model."
    )


def test_another_number_of_calls_is_refused(dit, guided: Case) -> None:
    recording, _ = recorded(dit, two_calls, [draw(3, 4, 1, 28, 28)])
    assert refusal(guided.folder / "step", recording) == (
        "compare: calls per step: expected 1, as in the artifact, got 2 in the recording. Compare "
        "with a recording of the same guidance, or plan and export for this one."
    )


@pytest.mark.parametrize("count", [0, 3, -1])
def test_runs_that_are_not_there_are_refused(count: int, guided: Case) -> None:
    assert refusal(guided.folder / "step", guided.recording, runs=count) == (
        f"compare: runs: expected 1 .. 2, the recorded runs, got {count}. Ask for fewer, or record "
        "more."
    )


def test_other_weights_show_in_the_steps(guided: Case) -> None:
    torch.manual_seed(9)
    other = shake(FashionDiT(FashionDiTConfig(width=32, depth=2, frequency_channels=32)))
    recording, _ = recorded(other, ddim, [draw(3, 2, 1, 28, 28)])
    with pytest.raises(NoSampler, match="step 0 to 1 is no fixed weighted sum"):
        compare(guided.folder / "step", recording)


def test_sampler_that_adds_noise_is_refused(tmp_path: Path) -> None:
    model = residual()
    noises = [draw(1, 2, 5, 8)]
    recording, _ = recorded(model, flow(noisy=0.1), noises)
    plan = Plan.from_trajectory(model, recording, schedule=(R, C) * 3, rank=4)
    export_onnx(optimize(model, plan), tmp_path / "d")
    with pytest.raises(NoSampler, match="step 0 to 1 is no fixed weighted sum"):
        compare(tmp_path / "d", recording)


def test_decoded_results_are_refused(dit, guided: Case) -> None:
    with record(dit) as recording:
        recording.finish(ddim(dit, draw(3, 2, 1, 28, 28))[-1].flatten(1))
    assert refusal(guided.folder / "sampler", recording) == (
        "compare: result: expected latents (2, 1, 28, 28), got (2, 784). Call recording.finish "
        "with the latents, before they are decoded."
    )
    with pytest.raises(NoSampler, match=r"a run's result has the shape \(2, 784\)"):
        compare(guided.folder / "step", recording)


def test_bfloat16_is_refused(guided: Case) -> None:
    model = residual(torch.bfloat16)
    recording, _ = recorded(model, flow(torch.bfloat16), [draw(1, 2, 5, 8)])
    plan = Plan.from_trajectory(model, recording, schedule=(R, C) * 3, rank=4)
    manifest = replace(load_artifact(guided.folder / "step"), inputs=plan.binding.signature.tensors)
    with pytest.raises(CompareError) as refused:
        matching_runs(manifest, recording)
    assert str(refused.value) == (
        "compare: input hidden_states: expected a dtype that NumPy has, to hand it to ONNX "
        "Runtime, got bfloat16 (2, 5, 8). Record, plan and export in float32 or float16."
    )


def test_damaged_artifact_says_so(guided: Case, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected a manifest written by export_onnx"):
        compare(tmp_path, guided.recording)
