"""Guidance whose two texts differ in length: each call of a step has sizes of its own."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline
from support.models import relative
from support.pipelines.tiny import flow_vae
from torch import Tensor
from zoo.drive import make_model
from zoo.report import ENTRIES

from calicache.graph_passes import Plan, Recording, optimize, record
from calicache.graph_passes.common.errors import CalicacheWarning, RecordError

pytestmark = pytest.mark.slow

TEXT, STEPS = 16, 6  # channels of the zoo's text
PADDED = 12  # letters


class Lumina(Lumina2Pipeline):
    """The pipeline with embeddings of random numbers, as many as a text has letters."""

    def encode_prompt(self, prompt: str, *_: Any, **options: Any) -> tuple[Tensor, ...]:
        texts = (prompt, options["negative_prompt"])
        pairs = [(embedding(text), torch.ones(1, len(text), dtype=torch.int64)) for text in texts]
        return tuple(value for pair in pairs for value in pair)


def embedding(text: str) -> Tensor:
    draw = torch.Generator().manual_seed(sum(map(ord, text)))
    return torch.randn(1, len(text), TEXT, generator=draw)


@cache
def pipeline() -> Any:
    """Lumina 2 with its own loop."""
    pipe = Lumina(
        transformer=make_model(ENTRIES["Lumina2Transformer2DModel"]),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_vae(),
        text_encoder=None,
        tokenizer=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(
    transformer: Any, seed: int, prompt: str = "A red dog", negative: str = "grey"
) -> Tensor:
    pipe = pipeline()
    before, pipe.transformer = pipe.transformer, transformer
    try:
        images = pipe(
            prompt,
            negative_prompt=negative,
            height=64,
            width=64,
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            return_dict=False,
        )
    finally:
        pipe.transformer = before
    return images[0]


@cache
def recorded() -> Recording:
    transformer = pipeline().transformer
    with record(transformer) as recording, pytest.warns(CalicacheWarning, match="another size"):
        recording.finish(sample(transformer, 1))
    assert recording.left_out == STEPS
    return recording


def test_calls_of_the_second_size_are_left_out() -> None:
    recording = recorded()
    assert len(recording.calls) == STEPS
    assert recording.calls_per_step == 1
    assert recording.signature.tensors[2].shape == (1, len("A red dog"), TEXT)


def test_both_calls_are_exact_at_full_rank() -> None:
    transformer = pipeline().transformer
    plan = Plan.from_trajectory(
        transformer, recorded(), schedule=3, rank=64, weighting="none", correct=False
    )
    fast = optimize(transformer, plan)
    for seed, texts in ((1, ("A red dog", "grey")), (2, ("A cat", "grey"))):
        fast.reset()
        # float32 through two orders of the same products, over a run.
        got = sample(fast, seed, *texts)
        assert relative(got, sample(transformer, seed, *texts)) < 1e-4
        assert [state.start for state in fast.state.calls] == [0.0, 0.0]


def test_the_update_is_not_told_from_half_of_the_calls() -> None:
    plan = Plan.from_trajectory(pipeline().transformer, recorded(), schedule=3, rank=4)
    assert plan.recipe.output_weights is None
    assert "not fitted" in plan.recipe.correction


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts padded to one length, as Lumina's own tokenizer does, with masks of their own."""

    def encode(self: Any, prompt: str, *_: Any, **options: Any) -> tuple[Tensor, ...]:
        values: list[Tensor] = []
        for text in (prompt, options["negative_prompt"]):
            missing = PADDED - len(text)
            mask = torch.ones(1, len(text), dtype=torch.int64)
            values += [F.pad(embedding(text), (0, 0, 0, missing)), F.pad(mask, (0, missing))]
        return tuple(values)

    monkeypatch.setattr(Lumina, "encode_prompt", encode)


@pytest.mark.usefixtures("padded")
def test_texts_of_one_length_with_masks_of_their_own() -> None:
    transformer = pipeline().transformer
    with record(transformer) as recording:
        sample(transformer, 1)
    assert recording.calls_per_step == 2
    with pytest.warns(CalicacheWarning, match="reads other values in the other calls"):
        plan = Plan.from_trajectory(
            transformer, recording, schedule=3, rank=64, weighting="none", correct=False
        )
    assert plan.binding.calls == 1
    fast = optimize(transformer, plan)
    for seed, texts in ((1, ("A red dog", "grey")), (2, ("A cat", "grey"))):
        fast.reset()
        # float32 through two orders of the same products, over a run.
        got = sample(fast, seed, *texts)
        assert relative(got, sample(transformer, seed, *texts)) < 1e-4
        assert [state.start for state in fast.state.calls] == [0.0, 0.0]
    cheap = Plan.from_trajectory(transformer, recording.first_calls(), schedule=3, rank=4)
    got, expected = sample(optimize(transformer, cheap), 1), sample(transformer, 1)
    assert relative(got, expected) > 1e-5


def test_other_tensors_are_refused_as_ever() -> None:
    transformer = pipeline().transformer
    text = torch.randn(1, 4, TEXT)
    call = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.zeros(1)}
    call |= {"encoder_hidden_states": text, "encoder_attention_mask": torch.ones(1, 4).long()}
    with record(transformer):
        transformer(**call)
        with pytest.raises(RecordError, match="hidden_states"):
            transformer(**{**call, "hidden_states": torch.randn(1, 4, 8, 8).double()})
