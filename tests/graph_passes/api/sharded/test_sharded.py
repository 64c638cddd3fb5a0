"""Transformers that are sharded over processes, under plans that run them whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import relative
from support.torchrun import torchrun
from torch import Tensor

SCRIPT = Path(__file__).parent / "forecasts_on_shards.py"

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


def test_forecasts_on_shards_are_those_of_the_whole_model(
    by_rank: list[dict[str, Tensor]],
) -> None:
    first, second = by_rank
    for name in ("sharded", "planned on shards"):
        # The same operations on gathered weights, and weights of outputs fitted to the same runs.
        assert relative(first[name], first["whole"]) < 1e-5
        assert torch.equal(first[name], second[name])
    assert 1e-5 < relative(first["whole"], first["plain"]) < 0.1


def test_graphs_of_shards_are_refused(folder: Path) -> None:
    for rank in (0, 1):
        assert "fully_shard" in (folder / f"{rank}.txt").read_text()
