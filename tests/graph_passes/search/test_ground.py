"""What a plan search stands on: runs shared out, what is refused, going on after a stop."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.search.searches import (
    SEEDS,
    STEPS,
    TIMES,
    Flicker,
    Times,
    assert_same_plan,
    euler,
    evenly,
    flicker,
    record_runs,
    refuses,
)

from calicache.graph_passes import Plan, Recording, StepMode, record
from calicache.graph_passes.common.progress import Progress
from calicache.graph_passes.search.ground import LEAST_RUNS, LEAST_STEPS, share_out
from calicache.graph_passes.settings.latency import LatencyTable


@settings(deadline=None)
@given(runs=st.integers(LEAST_RUNS, 500))
def test_runs_are_shared_out_once_each_in_thirds(runs: int) -> None:
    parts = share_out(runs)
    assert [place for part in parts for place in part] == list(range(runs))
    assert len(parts[1]) == len(parts[2]) == runs // 3
    assert len(parts[1]) <= len(parts[0]) <= len(parts[1]) + 2


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "search: expected either a budget or a max_error, got neither. Give one of them."),
        (
            {"budget": 0.5, "max_error": 0.1},
            "search: expected either a budget or a max_error, got both. Give one of them.",
        ),
        *(
            (
                {"budget": value},
                f"budget: expected a share above 0 and below 1, got {value:g}. "
                "Choose such a number.",
            )
            for value in (0.0, 1.0, -0.5, 35.0, float("nan"), float("inf"))
        ),
        *(
            (
                {"max_error": value},
                f"max_error: expected an error above 0, got {value:g}. Choose such a number.",
            )
            for value in (0.0, -1.0, float("nan"), float("inf"))
        ),
        (
            {"budget": 0.5, "effort": 0},
            "effort: expected 1 or more, got 0. Raise effort.",
        ),
    ],
)
def test_requests_that_make_no_sense_are_refused(request_: dict[str, float], message: str) -> None:
    with refuses(f"plan: {message}"):
        Plan.search(*flicker(), **request_)


@pytest.mark.parametrize(("steps", "told"), [(12, 0.0834), (8, 0.125), (5, 0.2)])
def test_budget_below_the_least_is_told_one_that_can_be_kept(steps: int, told: float) -> None:
    model, _ = flicker()
    recording = record_runs(model, times=evenly(steps))
    with refuses(
        f"plan: budget: expected {told:.4f} or more: one REFRESH step, and the cheapest mode "
        f"after it, got {told - 1e-4:g}. Raise the budget, or sample with fewer steps."
    ):
        Plan.search(model, recording, budget=told - 1e-4)
    plan = Plan.search(model, recording, budget=told)
    assert plan.schedule.count(StepMode.REFRESH) == 1
    assert plan.front is not None
    assert plan.front.points[0].cost == pytest.approx(1 / steps, rel=1e-9)


def test_too_few_runs_are_refused() -> None:
    model, recording = flicker()
    with refuses(
        f"plan: recording: expected {LEAST_RUNS} runs or more: to search, to choose and to report "
        "with, got 2. Record more runs, with other seeds: `with record(model) as recording:`."
    ):
        Plan.search(model, recording.take_runs([0, 1]), budget=0.5)


def test_too_few_steps_are_refused() -> None:
    model, _ = flicker()
    recording = record_runs(model, times=evenly(LEAST_STEPS - 1))
    with refuses(
        f"plan: recording: expected runs of {LEAST_STEPS} steps or more, got {LEAST_STEPS - 1}. "
        "Record whole runs of the sampler that you are going to use."
    ):
        Plan.search(model, recording, budget=0.5)


@pytest.mark.parametrize("missing", range(len(SEEDS)))
def test_a_run_without_its_result_is_refused(missing: int) -> None:
    model, recording = flicker()
    last = STEPS * (missing + 1)
    results = {count: value for count, value in recording.results.items() if count != last}
    with refuses(
        "plan: recording: expected the result of every run, got none for some. "
        "Call recording.finish(latents) after every run."
    ):
        Plan.search(model, Recording(recording.calls, recording.signature, results), budget=0.5)


@pytest.mark.parametrize(
    ("times", "got"),
    [
        (evenly(STEPS + 1), f"runs of {STEPS} and {STEPS + 1} steps"),
        ([now**2 for now in TIMES], "runs that differ in timestep"),
    ],
)
def test_runs_of_several_samplers_are_refused(times: Times, got: str) -> None:
    model, _ = flicker()
    with record(model) as recording:
        for seed, chosen in zip(SEEDS, (TIMES, TIMES, times), strict=True):
            recording.finish(euler(model, seed, chosen))
    with refuses(
        f"plan: recording: expected runs of one sampler, with the same steps, got {got}. "
        "Record all runs with the sampler and the steps that you are going to use."
    ):
        Plan.search(model, recording, budget=0.5)


def no_sampler(step: int) -> str:
    return (
        "plan: sampler: expected a deterministic sampler, recorded with this model, got step "
        f"{step} to {step + 1} is no fixed weighted sum of latents and outputs (a sampler that "
        "adds noise, clips, or looks back further). Record with the model and the sampler that "
        "you are going to use; plan for others with Plan.from_trajectory."
    )


def test_runs_of_another_checkpoint_are_refused() -> None:
    _, recording = flicker()
    other = Flicker().eval()
    with torch.no_grad():
        other.blocks[0].down.weight.mul_(1.1)
    with refuses(no_sampler(0)):
        Plan.search(other, recording, budget=0.5)


def test_a_sampler_that_adds_noise_is_refused() -> None:
    model, _ = flicker()
    with refuses(no_sampler(0)):
        Plan.search(model, record_runs(model, noise=0.1), budget=0.5)


def test_a_model_without_weights_is_refused() -> None:
    model, recording = flicker()
    with refuses(
        "plan: model: expected weights, to run the recorded calls with, got a model on the meta "
        "device. Load the weights."
    ):
        Plan.search(Flicker().eval().to("meta"), recording, budget=0.5)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_latency_table_of_another_checkpoint_is_refused() -> None:
    model, recording = flicker()
    own = Plan.from_trajectory(model, recording, weighting="none", correct=False)
    table = LatencyTable("1234567890abcdef", "by hand", 2, plain=1.0, forecast=0.1, rows=())
    with refuses(
        f"plan: latency: expected a table of this checkpoint ({own.binding.weights_hash[:12]}), "
        "got of another (1234567890ab). Measure this model."
    ):
        Plan.search(model, recording, budget=0.5, latency=table)


def stop_at(stage: str) -> Callable[[Progress], None]:
    """As a user who loses patience there."""

    def look(now: Progress) -> None:
        if now.stage == stage:
            raise KeyboardInterrupt

    return look


@cache
def in_one_go() -> tuple[Plan, list[Progress]]:
    seen: list[Progress] = []
    return Plan.search(*flicker(), budget=0.5, on_progress=seen.append), seen


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize(
    "stage",
    [
        "run the recorded calls",
        "observe increments",
        "measure sensitivities",
        "candidates at 0.5",
        "candidates at 0.2",
        "report",
    ],
)
def test_stopped_search_goes_on_from_there(stage: str, tmp_path: Path) -> None:
    whole, expected = in_one_go()
    with pytest.raises(KeyboardInterrupt):
        Plan.search(*flicker(), budget=0.5, path=tmp_path, on_progress=stop_at(stage))
    kept = written(tmp_path)
    assert kept
    seen: list[Progress] = []
    plan = Plan.search(*flicker(), budget=0.5, path=tmp_path, on_progress=seen.append)
    assert_same_plan(plan, whole)
    assert kept.items() <= written(tmp_path).items()
    # The recorded calls are run again in any case; what was measured on top of them is not.
    assert (seen[-1].done < expected[-1].done) == (stage != "run the recorded calls")
    done = written(tmp_path)
    assert_same_plan(Plan.search(*flicker(), budget=0.5, path=tmp_path), plan)
    assert written(tmp_path) == done


@pytest.mark.parametrize("other", ["budget", "effort", "exclude", "recording", "model"])
def test_folder_of_another_search_is_refused(other: str, tmp_path: Path) -> None:
    model, recording = flicker()
    with pytest.raises(KeyboardInterrupt):
        Plan.search(
            model,
            recording,
            budget=0.5,
            path=tmp_path,
            on_progress=stop_at("capture the model"),
        )
    options: dict[str, Any] = {"budget": 0.5}
    if other == "recording":
        recording = record_runs(model, seeds=(0, 1, 3))
    elif other == "model":
        model = Flicker().eval()
        with torch.no_grad():
            model.blocks[0].up.bias.add_(1e-6)
    else:
        options |= {"budget": {"budget": 0.51}, "effort": {"effort": 2}}.get(
            other, {"exclude": ["*.up"]}
        )
    with refuses(
        f"plan: {tmp_path}: expected what an interrupted search of the same kind has kept, got a "
        "search of another model, recording or request. Name another folder, or delete this one."
    ):
        Plan.search(model, recording, path=tmp_path, **options)
