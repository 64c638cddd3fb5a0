"""speed_up on real pipelines: in place, true to its promise, kept, and undone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from model import FashionDiT
from support.models import relative, sample_dit
from support.pipelines.tiny import CASES, PipelineCase, wan22_pipeline
from support.search.steady import counting, steady
from torch import Tensor

from calicache import OptimizedModel, Plan, restore, speed_up
from calicache.graph_passes.common.errors import CalicacheError, PlanError

BY_NAME = {case.name: case for case in CASES}
STEPS = 8
PARTS = ("transformer", "transformer_2")


def keywords(case: PipelineCase) -> dict[str, Any]:
    given = {"class_labels": [1, 2]} if case.name == "dit" else {"prompt": "A photo of a cat"}
    return {**given, **case.options, case.guidance: case.scale, "num_inference_steps": STEPS}


def parts_of(pipe: Any) -> dict[str, Any]:
    return {name: getattr(pipe, name, None) for name in PARTS}


def latents(pipe: Any, call: Mapping[str, Any]) -> Tensor:
    given = {**call, "output_type": "latent", "return_dict": False}
    found: Tensor = pipe(**given, generator=torch.Generator().manual_seed(9))[0]
    return found


def assert_sped_up(
    pipe: Any, call: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole story: plain, fast, a second start, plain again."""
    before, config = parts_of(pipe), dict(pipe.config)
    plain = {name: model for name, model in before.items() if model is not None}
    full = latents(pipe, call)
    summary = speed_up(pipe, call, budget=0.6, cache=folder)
    assert [part.name for part in summary.parts] == [*plain]
    assert all(part.seconds is not None and part.seconds <= 0.6 for part in summary.parts)
    assert all(isinstance(getattr(pipe, name), OptimizedModel) for name in plain)
    assert {name: getattr(pipe, name) for name in plain} == summary.models
    fast = latents(pipe, call)
    assert summary.error is not None
    # Another seed on the same prompt: an error of the same size.
    assert 0 < relative(fast, full) < 5 * summary.error
    restore(pipe)
    assert all(parts_of(pipe)[name] is model for name, model in before.items())
    assert dict(pipe.config) == config

    monkeypatch.setattr(Plan, "search", None)
    with counting(plain) as calls:
        second = speed_up(pipe, call, budget=0.6, cache=folder)
    assert len(calls) <= 2 * call["num_inference_steps"]  # of one run, whose answers are noise
    assert (second.searched, second.parts) == (False, summary.parts)
    assert torch.equal(latents(pipe, call), fast)
    restore(pipe)
    assert torch.equal(latents(pipe, call), full)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixart", "sd3", "flux"])
def test_pipelines(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch)
    case = BY_NAME[name]
    assert_sped_up(case.build(), keywords(case), tmp_path, monkeypatch)


@pytest.mark.slow
def test_both_transformers_of_wan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch)
    call = {**keywords(BY_NAME["wan"]), "num_inference_steps": 2 * STEPS - 4}
    assert_sped_up(wan22_pipeline(), call, tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_pipeline_aims_at_longer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch)
    case = BY_NAME["flux"]
    pipe, call = case.build(), keywords(case)
    finer = {**call, "num_inference_steps": 40}
    plain, exact = latents(pipe, call), latents(pipe, finer)
    options = {"budget": 0.8, "cache": tmp_path, "reference_steps": 40}
    (part,) = speed_up(pipe, call, **options).parts
    assert part.aim.startswith(
        "fitted to a reference of 40 steps, from which the recorded runs are"
    )
    assert part.error is not None
    fast = latents(pipe, call)
    # The seed of this run is none that was recorded.
    assert relative(fast, exact) < relative(plain, exact)
    restore(pipe)
    again = speed_up(pipe, call, **options)
    assert (again.searched, again.parts) == (False, (part,))
    assert part.aim in str(again)
    assert "distance of the timed run from the plain one:" in str(again)
    restore(pipe)
    assert speed_up(pipe, call, budget=0.8, cache=tmp_path).searched  # aims at something else
    restore(pipe)


@pytest.mark.parametrize(
    ("name", "call", "steps", "words"),
    [
        ("flux", {}, STEPS, "more steps than they have, got 8 for a call of 8 steps"),
        ("flux", {"num_inference_steps": None}, 40, "got a call without it"),
        ("flux", {}, 0, "reference_steps: expected"),
        ("wan22", {}, 40, "a pipeline of one transformer, got transformer and transformer_2"),
    ],
)
def test_references_that_cannot_be_are_refused_before_anything_runs(
    name: str, call: dict[str, Any], steps: int, words: str
) -> None:
    case = BY_NAME[name.removesuffix("22")]
    pipe = wan22_pipeline() if name == "wan22" else case.build()
    given = {k: v for k, v in {**keywords(case), **call}.items() if v is not None}
    plain = {name: model for name, model in parts_of(pipe).items() if model is not None}
    with counting(plain) as calls, pytest.raises(CalicacheError, match=words):
        speed_up(pipe, given, cache=None, reference_steps=steps)
    assert calls == []


@pytest.mark.slow
def test_functions_of_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose results nobody sees: the latents are those that the scheduler makes."""
    steady(monkeypatch)
    case = BY_NAME["dit"]
    pipe = case.build()
    options = {**case.options, "num_inference_steps": STEPS}
    calls = [lambda pipe, k=k: case.images(pipe, "A cat", k, **options) for k in range(3)]
    summary = speed_up(pipe, calls, budget=0.6, cache=None)
    assert isinstance(pipe.transformer, OptimizedModel)
    assert summary.parts[0].error is not None
    assert summary.error is not None


def test_a_failure_leaves_the_pipeline_as_it_was() -> None:
    case = BY_NAME["dit"]
    pipe = case.build()
    before, config, step = parts_of(pipe), dict(pipe.config), vars(pipe.scheduler).get("step")

    def broken(pipe: Any) -> None:
        case.images(pipe, "A cat", num_inference_steps=3)
        raise RuntimeError("in the user's own code")

    with pytest.raises(RuntimeError, match="own code"):
        speed_up(pipe, [keywords(case), broken], cache=None)
    with pytest.raises(PlanError, match="budget"):
        speed_up(pipe, keywords(case), budget=0.05, cache=None)
    assert all(parts_of(pipe)[name] is model for name, model in before.items())
    assert dict(pipe.config) == config
    assert vars(pipe.scheduler).get("step") is step
    assert "forward" not in vars(pipe.transformer)
    assert not pipe.transformer._forward_pre_hooks


@pytest.mark.slow
def test_the_trained_sample_by_the_real_clock(model: FashionDiT, tmp_path: Path) -> None:
    """What the seconds are decides no assertion."""
    summary = speed_up(model, lambda m: sample_dit_unseeded(m), budget=0.5, cache=tmp_path)
    (part,) = summary.parts
    assert min(summary.plain_seconds, summary.fast_seconds) > 0
    assert summary.runtime.startswith("PyTorch")
    assert part.error is not None
    assert 0 < part.error.mean < 0.5  # of whatever plan the clock leads to
    assert len(str(summary).splitlines()) <= 12


def sample_dit_unseeded(model: Any) -> Tensor:
    return sample_dit(model, batch=2, seed=int(torch.randint(1000, ())), steps=12)
