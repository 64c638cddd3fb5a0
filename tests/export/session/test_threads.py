"""Threads: a session of its own for each, or one for all where a call is a whole run."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small.subjects import small_model, small_plan, small_runs

from calicache.export import Session, export_onnx
from calicache.export.session.run import SessionRun
from calicache.graph_passes import OptimizedModel, Plan, Recording, optimize
from calicache.graph_passes.common.errors import RunError

pytestmark = pytest.mark.slow

THREADS, RUNS = 4, 50


@pytest.fixture(scope="module")
def recording() -> Recording:
    return small_runs(small_model())


@pytest.fixture(scope="module")
def plan(recording: Recording) -> Plan:
    return small_plan(small_model(), recording)


def together(work: Callable[[int], list[np.ndarray]]) -> list[list[np.ndarray]]:
    """What each of the threads gets, all at the same time."""
    with ThreadPoolExecutor(THREADS) as workers:
        return [*workers.map(work, range(THREADS))]


def bitwise(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(some, others, strict=True))


def test_sessions_side_by_side_run_as_one_alone(
    plan: Plan, recording: Recording, tmp_path: Path
) -> None:
    export_onnx(optimize(small_model(), plan), tmp_path / "d")
    sessions = [Session(tmp_path / "d") for _ in range(THREADS)]

    def run(number: int) -> list[np.ndarray]:
        steps = list(enumerate(recording.calls))
        return [sessions[number].step(k, **call) for _ in range(RUNS) for k, call in steps]

    alone = run(0)
    for results in together(run):
        assert bitwise(results, alone)


def test_models_side_by_side_run_as_one_alone(plan: Plan, recording: Recording) -> None:
    models = [optimize(small_model(), plan) for _ in range(THREADS)]

    def run(number: int) -> list[np.ndarray]:
        fast: OptimizedModel = models[number]
        with torch.no_grad():
            return [fast(**call).numpy() for _ in range(RUNS) for call in recording.calls]

    alone = run(0)
    for results in together(run):
        assert bitwise(results, alone)


def test_one_session_of_whole_runs_serves_all_threads(
    plan: Plan, recording: Recording, tmp_path: Path
) -> None:
    export_onnx(optimize(small_model(), plan), tmp_path / "d", layout="sampler")
    session = Session(tmp_path / "d")
    noises = [torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(k)) for k in range(RUNS)]

    def run(_number: int) -> list[np.ndarray]:
        return [session.sample(noise) for noise in noises]

    alone = run(0)
    for results in together(run):
        assert bitwise(results, alone)


@pytest.mark.parametrize("layout", ["step", "pair"])
def test_runs_of_one_session_in_turn_and_in_threads_are_as_alone(
    plan: Plan, recording: Recording, tmp_path: Path, layout: str
) -> None:
    export_onnx(optimize(small_model(), plan), tmp_path / "d", layout=layout)
    session = Session(tmp_path / "d")
    scales = [1.0 + number for number in range(THREADS)]
    name = recording.signature.tensors[0].name

    def step(number: int, k: int) -> np.ndarray:
        call = dict(recording.calls[k])
        return session.step(k, **{**call, name: call[name] * scales[number]})

    def run(number: int) -> list[np.ndarray]:
        with session.start_run():
            return [step(number, k) for _ in range(RUNS) for k in range(recording.steps)]

    expected = [run(number) for number in range(THREADS)]
    for results, alone in zip(together(run), expected, strict=True):
        assert bitwise(results, alone)
    states: list[SessionRun | None] = [None] * THREADS
    for k in range(recording.steps):
        for number in range(THREADS):
            with session.start_run(states[number]) as states[number]:
                assert np.array_equal(step(number, k), expected[number][k])
    with pytest.raises(RunError, match="a REFRESH step before it"):
        session.step(1, **recording.calls[1])  # the session's own run has not begun
