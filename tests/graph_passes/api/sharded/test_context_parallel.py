"""Transformers whose tokens diffusers' context parallelism splits, under plans of every mode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import relative
from support.torchrun import torchrun
from torch import Tensor

SCRIPT = Path(__file__).parent / "context_parallel.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes of torchrun have left what they made."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(SCRIPT, folder)
    return folder


@pytest.fixture(scope="module")
def by_rank(folder: Path) -> list[dict[str, Tensor]]:
    """The results of each."""
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["forecast", "all modes"])
@pytest.mark.parametrize("way", ["flux ulysses", "flux ring", "wan ulysses", "wan ring"])
def test_split_tokens_make_what_all_of_them_make(
    way: str, kind: str, by_rank: list[dict[str, Tensor]]
) -> None:
    first, second = by_rank
    model, split = way.split()
    plain, whole = first[f"{model} plain"], first[f"{model} {kind}"]
    # The same sums in another order, over six steps in float32.
    assert relative(first[f"{model} plain {split}"], plain) < 1e-5
    for name in (f"{model} {kind} {split}", f"{model} {kind} {split} planned"):
        if name in first:
            assert relative(first[name], whole) < 1e-5
            assert torch.equal(first[name], second[name])
    assert 1e-4 < relative(whole, plain) < 0.5  # a plan does something


@pytest.mark.parametrize("way", ["ulysses", "ring"])
def test_forecasts_run_models_of_any_number_of_tokens(
    way: str, by_rank: list[dict[str, Tensor]]
) -> None:
    for results in by_rank:
        for name in (f"wan forecast {way} anything", f"wan forecast {way} anything planned"):
            # The same sums in another order, over six steps in float32.
            assert relative(results[name], results["wan forecast"]) < 1e-5


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (
            "by channels",
            ["ObserveError", "transformer_blocks.0.attn.to_q", "covariance", "by channels"],
        ),
        # 27 tokens over two processes: what diffusers says itself, and graphs pass on.
        ("plain", ["AssertionError", "divisible by mesh size"]),
        ("forecast", ["AssertionError", "divisible by mesh size"]),
        ("at a call", ["RunError", "hidden_states", "(1, 4, 3, 8, 8)", "divisible by mesh size"]),
        ("planned so", ["CaptureError", "WanTransformer", "torch.export", "divisible by mesh"]),
        (
            "ulysses anything",
            ["CaptureError", "WanTransformer", "the same number", "ulysses_anything"],
        ),
        ("ring anything", ["CaptureError", "WanTransformer", "the same number", "ring_anything"]),
    ],
)
def test_what_split_tokens_cannot_do_is_refused(
    attempt: str, words: list[str], folder: Path
) -> None:
    said = [json.loads((folder / f"{rank}.json").read_text())[attempt] for rank in (0, 1)]
    assert said[0] == said[1]
    assert len(said[0]) == len(words)
    assert all(word in text for word, text in zip(words, said[0], strict=True))
