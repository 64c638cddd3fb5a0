"""Real pipelines asked for what was not recorded, at full rank: exact as the recorded request."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline
from diffusers.models.attention_processor import SlicedAttnProcessor
from support.models import relative
from support.pipelines.tiny import CASES, PipelineCase
from torch import Tensor

from calicache.graph_passes import OptimizedModel, Plan, optimize, record
from calicache.graph_passes.common.errors import CalicacheWarning, RunError

pytestmark = pytest.mark.slow

PROMPT, OTHER = "A photo of a cat", "Two ships"
# Full rank: float32 through two orders of the same products. What is cached and wrong makes 1e-3
# and more.
EXACT = 1e-4
NAMES = [case.name for case in CASES]
BY_NAME = {case.name: case for case in CASES}

Request = Callable[[PipelineCase, Any], Tensor]


@cache
def plain(case: PipelineCase) -> Any:
    return case.build()


@cache
def optimized(case: PipelineCase) -> OptimizedModel:
    """Planned from one request, every branch at full rank."""
    model = plain(case).transformer
    with record(model) as recording:
        case.latents(plain(case), "A dog", seed=3)
    plan = Plan.from_trajectory(
        model, recording, schedule=3, rank=64, weighting="none", correct=False
    )
    return optimize(model, plan)


def pipeline(case: PipelineCase) -> Any:
    """The pipeline with the optimised transformer in it, before its first run."""
    pipe = case.build()
    pipe.transformer = optimized(case)
    pipe.transformer.reset()
    return pipe


def assert_exact(name: str, request: Request) -> None:
    """The recorded request, another one, and the recorded one again."""
    case = BY_NAME[name]
    pipe, original = pipeline(case), plain(case)
    before = case.latents(pipe, PROMPT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalicacheWarning)
        got, expected = request(case, pipe), request(case, original)
    assert relative(got, expected) < EXACT
    # Another request leaves no trace: the same program on the same numbers.
    assert torch.equal(case.latents(pipe, PROMPT), before)


def only(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", names)


every = only(*NAMES)
prompted = only(*(name for name in NAMES if name != "dit"))


@every
def test_the_recorded_request(name: str) -> None:
    assert_exact(name, lambda case, pipe: case.latents(pipe, OTHER, seed=8))


@prompted
def test_two_images_of_a_prompt(name: str) -> None:
    option = "num_videos_per_prompt" if name == "wan" else "num_images_per_prompt"
    assert_exact(name, lambda case, pipe: case.latents(pipe, OTHER, **{option: 2}))


@prompted
def test_two_prompts(name: str) -> None:
    def request(case: PipelineCase, pipe: Any) -> Tensor:
        return case.latents(pipe, [PROMPT, OTHER])  # type: ignore[arg-type]

    assert_exact(name, request)


def test_another_number_of_labels() -> None:
    def request(case: PipelineCase, pipe: Any) -> Tensor:
        return case.latents(pipe, PROMPT, class_labels=[1, 2, 3])

    assert_exact("dit", request)


@prompted
def test_another_length_of_the_text(name: str) -> None:
    assert_exact(name, lambda case, pipe: case.latents(pipe, OTHER, max_sequence_length=16))


@prompted
def test_twice_the_height(name: str) -> None:
    assert_exact(name, lambda case, pipe: case.latents(pipe, OTHER, height=128))


@every
@pytest.mark.parametrize("steps", [4, 9])
def test_another_number_of_steps(name: str, steps: int) -> None:
    assert_exact(name, lambda case, pipe: case.latents(pipe, OTHER, num_inference_steps=steps))


@every
def test_guidance_switched_off(name: str) -> None:
    def request(case: PipelineCase, pipe: Any) -> Tensor:
        return case.latents(pipe, OTHER, **{case.guidance: 1.0})

    assert_exact(name, request)


@only("flux", "sd3", "pixart", "wan")
def test_other_guidance(name: str) -> None:
    """Guidance in calls of their own where it was not recorded, or a negative prompt."""

    def request(case: PipelineCase, pipe: Any) -> Tensor:
        more = {"true_cfg_scale": 3.0} if name == "flux" else {case.guidance: 2.0}
        return case.latents(pipe, OTHER, negative_prompt="grey", **more)

    assert_exact(name, request)


@only("sd3", "flux")
@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_image_to_image(name: str, strength: float) -> None:
    kinds = {"sd3": StableDiffusion3Img2ImgPipeline, "flux": FluxImg2ImgPipeline}
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def request(case: PipelineCase, pipe: Any) -> Tensor:
        parts = {key: value for key, value in pipe.components.items() if value is not None}
        again = kinds[name](**parts)
        again.set_progress_bar_config(disable=True)
        return case.latents(again, OTHER, image=image, strength=strength)

    assert_exact(name, request)


@only("sd3", "flux", "flux_cfg", "wan")
def test_a_prompt_that_changes_in_the_middle(name: str) -> None:
    def request(case: PipelineCase, pipe: Any) -> Tensor:
        def turn(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            return {"prompt_embeds": -tensors["prompt_embeds"]} if step == 1 else {}

        return case.latents(
            pipe,
            OTHER,
            callback_on_step_end=turn,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )

    assert_exact(name, request)


@every
def test_two_threads(name: str) -> None:
    case = BY_NAME[name]
    pipes = [pipeline(case), pipeline(case)]
    prompts = (PROMPT, OTHER)
    with ThreadPoolExecutor(2) as pool:
        got = list(
            pool.map(lambda pair: case.latents(pair[0], pair[1]), zip(pipes, prompts, strict=True))
        )
    for latents, prompt in zip(got, prompts, strict=True):
        assert relative(latents, case.latents(plain(case), prompt)) < EXACT


@only("flux_cfg", "wan")
def test_diffusers_own_names_of_calls(name: str) -> None:
    """The pipelines of diffusers name the calls of a step, and that is what tells them apart."""
    case, seen = BY_NAME[name], set[str | None]()
    pipe = pipeline(case)

    def see(*_: Any) -> None:
        seen.update(state.arrival.context.name for state in pipe.transformer.state.calls)

    handle = pipe.transformer.register_forward_hook(see)
    case.latents(pipe, PROMPT)
    handle.remove()
    assert seen == {"cond", "uncond"}


def test_a_changed_weight_is_noticed() -> None:
    case = BY_NAME["dit"]
    pipe: DiTPipeline = case.make()
    model = pipe.transformer
    with record(model) as recording:
        case.latents(pipe, "A dog")
    pipe.transformer = optimize(
        model, Plan.from_trajectory(model, recording, schedule=3, rank=4, correct=False)
    )
    case.latents(pipe, PROMPT)
    with torch.no_grad():
        model.proj_out_2.weight.mul_(1.1)
    with pytest.raises(RunError, match=r"proj_out_2\.weight.*rebind"):
        case.latents(pipe, PROMPT)


@pytest.mark.parametrize("method", ["fuse_qkv_projections", "enable_cache", "load_lora_adapter"])
def test_methods_that_would_change_the_original_are_refused(method: str) -> None:
    fast = optimized(BY_NAME["flux"])
    with pytest.raises(RunError, match=rf"{method}\(\).*original"):
        getattr(fast, method)({})


def test_attention_that_is_default_already_may_be_set() -> None:
    """Tests of diffusers do so to every part; other processors would not reach the graphs."""
    original = BY_NAME["pixart"].make().transformer
    with record(original) as recording:
        pipe = BY_NAME["pixart"].make()
        pipe.transformer = original
        BY_NAME["pixart"].latents(pipe, PROMPT)
    plan = Plan.from_trajectory(original, recording, schedule=3, rank=4, correct=False)
    fast = optimize(original, plan)
    processors = original.attn_processors
    fast.set_default_attn_processor()
    assert original.attn_processors == processors

    original.set_attn_processor(SlicedAttnProcessor(1))
    with pytest.raises(RunError, match=r"set_default_attn_processor\(\)"):
        fast.set_default_attn_processor()


def test_adapters_that_are_not_there_may_be_unloaded() -> None:
    pipe = pipeline(BY_NAME["flux"])
    pipe.unload_lora_weights()
    assert isinstance(pipe.transformer, OptimizedModel)
