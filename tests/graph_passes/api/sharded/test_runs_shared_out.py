"""Runs that several processes record, observe and search with: the plans are those of one."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from support.torchrun import torchrun
from torch import Tensor

from calicache.graph_passes import Plan, Recording
from calicache.graph_passes.factors.statistics import named_tensors

SCRIPT = Path(__file__).parent / "runs_shared_out.py"
PLANS = ("searched", "covariance", "paper")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process has made."""
    folder = tmp_path_factory.mktemp("one")
    torchrun(SCRIPT, folder, processes=1)
    return folder


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompletedProcess[str]]:
    """What four processes have made, of which one was killed in the middle of the search."""
    folder = tmp_path_factory.mktemp("four")
    done = torchrun(SCRIPT, folder, "killed", processes=4, options=["--max-restarts=1"])
    return folder, done


def tensors_of(plan: Plan) -> dict[str, Tensor]:
    return named_tensors(plan.statistics)


@pytest.mark.parametrize("name", PLANS)
def test_plan_of_four_processes_is_that_of_one(
    name: str, one: Path, restarted: tuple[Path, Any]
) -> None:
    """Sums of runs are made in float64, and small ones in the order of the runs."""
    alone, shared = (Plan.load(folder / name) for folder in (one, restarted[0]))
    assert shared.schedule == alone.schedule
    assert shared.recipe == alone.recipe  # the fitted weights too, to the last digit
    assert shared.front == alone.front
    assert shared.in_sample == alone.in_sample
    expected, got = tensors_of(alone), tensors_of(shared)
    assert got.keys() == expected.keys()
    assert bool(expected)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-12, atol=0.0)


def test_every_process_has_the_plan(restarted: tuple[Path, Any]) -> None:
    told = [json.loads((restarted[0] / f"{rank}.json").read_text()) for rank in range(4)]
    assert set(told[0]["plans"]) == set(PLANS)
    assert all(other["plans"] == told[0]["plans"] for other in told)


def test_gathered_runs_stand_in_the_order_of_the_seeds(
    one: Path, restarted: tuple[Path, Any]
) -> None:
    alone, shared = (
        Recording.load(folder / "recording.safetensors") for folder in (one, restarted[0])
    )
    assert len(shared.runs) == 7
    assert shared.signature == alone.signature
    for own, other in ((alone.calls, shared.calls),):
        assert all(
            torch.equal(value, call[name])
            for expected, call in zip(own, other, strict=True)
            for name, value in expected.items()
        )
    for known, other in ((alone.results, shared.results), (alone.outputs, shared.outputs)):
        assert known.keys() == other.keys()
        assert all(torch.equal(value, other[place]) for place, value in known.items())


def test_search_goes_on_from_what_was_done_when_a_process_was_killed(
    restarted: tuple[Path, Any],
) -> None:
    folder, _ = restarted
    kept = json.loads((folder / "kept.json").read_text())
    assert len(kept) >= 3
    for name, time in kept.items():
        assert (folder / "journal" / name).stat().st_mtime_ns == time
    assert len(list((folder / "journal").iterdir())) > len(kept) + 1


def test_killed_process_ends_the_job_and_is_named(tmp_path: Path) -> None:
    done = torchrun(SCRIPT, tmp_path, "killed", check=False)
    assert done.returncode != 0
    assert "rank      : 1 (local_rank: 1)" in done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert not (tmp_path / "searched").exists()


def test_what_one_process_is_refused_all_are(restarted: tuple[Path, Any]) -> None:
    told = [json.loads((restarted[0] / f"{rank}.json").read_text()) for rank in range(4)]
    for other in told:
        poisoned = other["refusals"]["poisoned"]
        assert "recorded step 54: expected finite activations, got NaN or Inf" in poisoned


def test_processes_with_recordings_of_their_own_are_refused(
    restarted: tuple[Path, Any],
) -> None:
    refusal = json.loads((restarted[0] / "2.json").read_text())["refusals"]["own alone"]
    assert "expected the same in all 4 processes" in refusal
    assert "recording.gather()" in refusal
