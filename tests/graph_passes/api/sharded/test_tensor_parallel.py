"""Models whose layers tensor parallelism splits, under plans of every mode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import relative
from support.torchrun import torchrun
from torch import Tensor

SCRIPT = Path(__file__).parent / "tensor_parallel.py"

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


@pytest.mark.parametrize("case", ["forecast", "all modes", "activation", "branch", "int8"])
def test_a_split_model_makes_what_the_whole_one_makes(
    case: str, by_rank: list[dict[str, Tensor]]
) -> None:
    first, second = by_rank
    # The same sums in another order, over six steps in float32.
    assert relative(first["plain, split"], first["plain"]) < 1e-5
    for name in (f"{case}, split", f"{case}, planned split", f"{case}, one dimension"):
        if name in first:
            assert relative(first[name], first[case]) < 1e-5
            assert torch.equal(first[name], second[name])
    assert 1e-3 < relative(first[case], first["plain"]) < 0.2


@pytest.mark.parametrize("spread", ["uneven", "gathered"])
def test_forecasts_run_what_no_graph_follows(spread: str, by_rank: list[dict[str, Tensor]]) -> None:
    first, second = by_rank
    for name in (f"{spread} forecast, split", f"{spread} forecast, planned split"):
        # The same sums in another order, over six steps in float32.
        assert relative(first[name], first[f"{spread} forecast"]) < 1e-5
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        ("int8", ["DecomposeError", "blocks.0.attn.proj", "whole rows", "columns over 2"]),
        ("embedding", ["CaptureError", "class_embed", "linear layers", "Embedding"]),
        ("dtensors", ["CaptureError", "blocks.0.mlp.fc1", "linear layers", "as DTensors"]),
        ("uneven", ["CaptureError", "blocks.0.mlp.fc1", "evenly", "33 rows of W over 2 processes"]),
        ("layouts", ["CaptureError", "blocks.0.attn.proj", "linear layers", "S(-1) to S(1)"]),
        ("two dimensions", ["CaptureError", "model", "linear layers", "fully_shard"]),
        ("export", ["ExportError", "model", "by itself", "other processes"]),
        ("search", ["PlanError", "search", "by itself", "several share"]),
        ("group", ["PlanError", "group", "by itself", "several share"]),
    ],
)
def test_what_cannot_be_done_is_refused(attempt: str, words: list[str], folder: Path) -> None:
    refused = [json.loads((folder / f"{rank}.json").read_text())[attempt] for rank in (0, 1)]
    assert refused[0] == refused[1]
    assert len(refused[0]) == len(words)
    assert all(word in text for word, text in zip(words, refused[0], strict=True))
