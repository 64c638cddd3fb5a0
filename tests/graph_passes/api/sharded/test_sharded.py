"""Transformers that are sharded over processes, under plans that run them whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import relative
from torch import Tensor

SCRIPT = Path(__file__).parent / "forecasts_on_shards.py"
TESTS = Path(__file__).parents[3]
SAMPLES = TESTS.parent / "samples"
SECONDS = 300

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each of two processes of torchrun made."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join(map(str, (TESTS, SAMPLES, SAMPLES / "fashion_dit")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(SCRIPT), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
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
