"""The probe of eager steps: its rows, and how they add up."""

from __future__ import annotations

import math

import pytest
import torch
from support.search.steady import FORECAST, PLAIN
from support.small.subjects import small_runs
from torch import nn

from calicache import LatencyTable, Plan
from calicache.graph_passes import Recording, measure_eager
from calicache.graph_passes.api.speed.eager import runtime_of, seconds_of
from calicache.graph_passes.common.disk.hashing import hash_weights
from calicache.graph_passes.common.errors import BenchError
from calicache.graph_passes.rewriting.compile import assign_targets
from calicache.graph_passes.settings.choices import Granularity
from calicache.graph_passes.settings.latency import BranchChoice
from calicache.graph_passes.sites.analysis import Analysis

FULL, LINEAR, INT8, BRANCH, REUSE = BranchChoice
RANKS = (2, 4)


@pytest.fixture(scope="module")
def recording(model: nn.Module) -> Recording:
    return small_runs(model)


@pytest.fixture
def table(model: nn.Module, recording: Recording, steady_clock: None) -> LatencyTable:
    return measure_eager(model, recording, ranks=RANKS, repeats=1)


def test_every_treatment_is_timed_but_int8(table: LatencyTable, model: nn.Module) -> None:
    rows = [(row.group, row.choice) for row in table.rows]
    assert rows == [("blocks.*", choice) for choice in (LINEAR, LINEAR, BRANCH, BRANCH, REUSE)]
    assert (table.plain, table.forecast, table.order) == (PLAIN, FORECAST, 2)
    assert table.weights_hash == hash_weights(model)
    assert table.runtime == runtime_of(model)
    assert {"processor", "torch"} <= set(table.environment)


@pytest.mark.parametrize("choice", [LINEAR, BRANCH])
def test_rows_are_the_steps_of_plans_at_their_ranks(
    choice: BranchChoice, table: LatencyTable, model: nn.Module, recording: Recording
) -> None:
    """By the MACs, which the clock follows here."""
    granularity = Granularity.LINEAR if choice is LINEAR else Granularity.BRANCH
    rows = [row for row in table.rows if row.choice is choice]
    for rank, row in zip(RANKS, rows, strict=True):
        plan = Plan.from_trajectory(
            model, recording, rank=rank, granularity=granularity, correct=False
        )
        analysis: Analysis = plan.workspace.analysis(model, plan.binding)
        targets = assign_targets(analysis, plan.recipe).targets
        inside = [t for t in targets if t.sites[0].startswith("blocks")]
        assert row.macs == sum(target.calibrate_macs for target in inside)
        assert 0.05 < row.step < PLAIN
    assert rows[0].step < rows[1].step


def test_forecasts_are_of_a_model_that_runs_whole(table: LatencyTable, model: nn.Module) -> None:
    reuse = table.step_shares(REUSE)
    assert reuse is not None
    assert FORECAST < reuse[0] < table.step_shares(LINEAR)[0]  # type: ignore[index]
    assert table.step_shares(INT8) is None


def test_real_clock_gives_seconds(model: nn.Module, recording: Recording) -> None:
    call = recording.signature.unflatten([*recording.calls[0].values()])
    assert 0 < seconds_of(model, call) < math.inf
    assert runtime_of(model).startswith(f"PyTorch {torch.__version__}, eager, cpu")


def test_a_run_that_is_too_short_is_refused(model: nn.Module, recording: Recording) -> None:
    short = Recording([*recording.calls[:3]], recording.signature)
    with pytest.raises(BenchError, match="a run of 4 steps"):
        measure_eager(model, short)


def test_no_repeats_are_refused(model: nn.Module, recording: Recording) -> None:
    with pytest.raises(BenchError, match="repeats"):
        measure_eager(model, recording, repeats=0)
