"""Guidance by two calls a step, seen as one batch: output weights and the `sampler` layout."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from support.models import relative
from support.pipelines.tiny import CASES, PipelineCase

from calicache.export import Session, export_onnx, read_sampler
from calicache.graph_passes import OptimizedModel, Plan, Recording, optimize, record
from calicache.graph_passes.common.errors import NoSampler, RunError
from calicache.graph_passes.recording.step_calls import merge_calls

# float32 in two runtimes over six steps, which guidance amplifies.
SAME = 1e-4
TWO_CALLS = [case for case in CASES if case.calls == 2]

pytestmark = pytest.mark.parametrize("case", TWO_CALLS, ids=lambda case: case.name)


def build(case: PipelineCase) -> Any:
    """With Euler's method, of which the next latent needs the newest output alone."""
    pipe = case.build()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return pipe


@cache
def recorded(case: PipelineCase) -> tuple[Any, Recording]:
    pipe = build(case)
    with record(pipe.transformer) as recording:
        for seed, prompt in enumerate(["A dog", "Two ships"]):
            recording.finish(case.latents(pipe, prompt, seed))
    return pipe, recording


@cache
def optimized(case: PipelineCase) -> OptimizedModel:
    pipe, recording = recorded(case)
    plan = Plan.from_trajectory(pipe.transformer, recording, schedule=2, rank=4)
    return optimize(pipe.transformer, plan)


def test_calls_of_a_step_become_one_batch(case: PipelineCase) -> None:
    _, recording = recorded(case)
    whole = recording.by_step()
    assert whole.calls_per_step == 1
    assert len(whole.calls) * 2 == len(recording.calls)
    assert whole.steps == recording.steps
    assert len(whole.runs) * 2 == len(recording.runs)
    assert [end.shape for end in whole.ends] == [end.shape for end in recording.ends[::2]]
    (text,) = (s for s in whole.signature.tensors if s.name == "encoder_hidden_states")
    first, second = (call["encoder_hidden_states"] for call in recording.calls[:2])
    assert text.shape == (2 * first.shape[0], *first.shape[1:])
    assert torch.equal(whole.calls[0]["encoder_hidden_states"], torch.cat([first, second]))


def test_calls_that_differ_without_a_batch_dimension_are_told(case: PipelineCase) -> None:
    _, recording = recorded(case)
    reason = "encoder_hidden_states, which has no batch dimension"
    with pytest.raises(NoSampler, match=reason):
        merge_calls(recording.calls[:2], batch=1000)  # no first dimension is that


@pytest.mark.slow
def test_output_weights_are_fitted_to_both_calls(case: PipelineCase) -> None:
    _, recording = recorded(case)
    fast = optimized(case)
    assert fast.plan.recipe.correction == "fitted to the recorded runs"
    plain = replace(fast.plan, recipe=replace(fast.plan.recipe, output_weights=None, latent=None))
    errors = {}
    for name, model in (("fitted", fast), ("plain", optimize(fast.original, plain))):
        own = build(case)
        own.transformer = model
        errors[name] = [
            relative(case.latents(own, prompt, seed), recording.ends[2 * seed])
            for seed, prompt in enumerate(["A dog", "Two ships"])
        ]
    # On the runs that they were fitted to the weights can only help.
    assert sum(errors["fitted"]) < sum(errors["plain"])


@pytest.mark.slow
def test_batched_model_gives_what_the_two_calls_give(case: PipelineCase) -> None:
    _, recording = recorded(case)
    fast = optimized(case)
    fast.reset()
    both = fast.by_step()
    both.reset()
    assert both is fast.by_step()
    whole = recording.by_step()
    for number in range(whole.steps):
        calls = recording.calls[2 * number : 2 * number + 2]
        apart = [fast(**recording.signature.unflatten([*c.values()]))[0] for c in calls]
        together = both(**whole.signature.unflatten([*whole.calls[number].values()]))[0]
        # The same sums over other batches.
        assert relative(together, torch.cat(apart)) < 1e-5


@pytest.mark.slow
def test_sampler_layout_does_the_whole_guided_run(case: PipelineCase, tmp_path: Path) -> None:
    _, recording = recorded(case)
    fast = optimized(case)
    sampler = read_sampler(fast, recording)
    assert sampler.parts == 2
    assert sampler.guidance == pytest.approx(case.scale, rel=1e-3)  # found by least squares
    manifest = export_onnx(fast, tmp_path / "d", layout="sampler", sampler=sampler)
    whole = recording.by_step()
    first = whole.calls[0]
    inputs = {spec.name: first[spec.name] for spec in manifest.sampler.inputs}
    noise = first[sampler.latent].chunk(2)[0]
    got = torch.from_numpy(Session(tmp_path / "d").sample(noise, **inputs))
    own = build(case)
    own.transformer = fast
    fast.reset()
    expected = case.latents(own, "A dog", 0)
    assert relative(got, expected) < SAME
    assert relative(expected, recording.ends[0]) > 10 * SAME


@pytest.mark.slow
def test_session_keeps_the_calls_of_a_step_apart(case: PipelineCase, tmp_path: Path) -> None:
    _, recording = recorded(case)
    fast = optimized(case)
    fast.reset()
    # Both layouts hand the caches on in the same way: one is tried with each pipeline.
    layout = "step" if case is TWO_CALLS[0] else "pair"
    export_onnx(fast, tmp_path / "d", layout=layout)
    session = Session(tmp_path / "d")
    assert session.manifest.calls_per_step == 2
    for number, call in enumerate(recording.calls[: 2 * recording.steps]):
        got = session.step(number // 2, number % 2, **call)
        expected = fast(**recording.signature.unflatten([*call.values()]))[0]
        assert relative(torch.from_numpy(got), expected) < SAME, number
    with pytest.raises(RunError, match=r"call: expected 0 \.\. 1, got 2"):
        session.step(0, 2, **recording.calls[0])
