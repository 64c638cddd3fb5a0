"""Public functions that are given something of a wrong kind: refused at the call, in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small.subjects import small_model, small_plan, small_runs

from calicache.graph_passes import (
    LatencyTable,
    Plan,
    Recording,
    SiteRule,
    StepMode,
    capture,
    optimize,
    record,
)
from calicache.graph_passes.common.errors import CalicacheError, PlanError
from calicache.graph_passes.settings.latency import BranchChoice, LatencyRow

WHOLE, NUMBER, TEXTS = "a whole number", "a number", "a list or tuple of texts"
MODEL = small_model()


@pytest.fixture(scope="module")
def recording() -> Recording:
    return small_runs(MODEL, 3)


@pytest.fixture(scope="module")
def plan(recording: Recording) -> Plan:
    return small_plan(MODEL, recording)


def refused(where: str, expected: str, call: Callable[[], object]) -> None:
    with pytest.raises(CalicacheError) as caught:
        call()
    assert caught.value.where == where
    assert expected in caught.value.expected


PLANNING: list[tuple[str, Any, str, str]] = [
    ("model", "model", "model", "the class Module"),
    ("recording", [], "recording", "the class Recording"),
    ("schedule", 2.5, "schedule", "an interval such as 3"),
    ("schedule", StepMode.REUSE, "schedule", "an interval such as 3"),
    ("schedule", [0, 1, 1, 0, 1, 1], "step mode", "REFRESH | CALIBRATE"),
    ("schedule", 0, "interval", "1 or more"),
    ("mode", 1, "step mode", "REFRESH | CALIBRATE"),
    ("rank", 2.5, "rank", WHOLE),
    ("rank", "4", "rank", WHOLE),
    ("rank", None, "rank", WHOLE),
    ("rank", -1, "rank", "0 or more"),
    ("order", 3, "order", "0 .. 2"),
    ("include", "blocks.*", "include", TEXTS),
    ("exclude", [1], "exclude", TEXTS),
    ("order", "1", "order", WHOLE),
    ("order", 1.5, "order", WHOLE),
    ("order", True, "order", WHOLE),
    ("weighting", 3, "weighting", "none | activation"),
    ("granularity", None, "granularity", "linear | branch"),
    ("rules", ["*"], "rule", "the class SiteRule"),
    ("include", [3], "include", TEXTS),
    ("exclude", [None], "exclude", TEXTS),
    ("on_progress", "print", "on_progress", "a function of one argument"),
]


@pytest.mark.parametrize(
    ("name", "value", "where", "expected"), PLANNING, ids=[f"{n}={v!r}" for n, v, *_ in PLANNING]
)
def test_planning(name: str, value: Any, where: str, expected: str, recording: Recording) -> None:
    arguments = {"model": MODEL, "recording": recording, "rank": 2, "correct": False} | {
        name: value
    }
    refused(where, expected, lambda: Plan.from_trajectory(**arguments))


SEARCHING: list[tuple[str, Any, str]] = [
    ("budget", "0.5", NUMBER),
    ("budget", [0.5], NUMBER),
    ("budget", True, NUMBER),
    ("max_error", "0.1", NUMBER),
    ("latency", "table.json", "the class LatencyTable"),
    ("effort", 1.5, WHOLE),
    ("effort", None, WHOLE),
    ("include", [3], TEXTS),
    ("exclude", [None], TEXTS),
    ("path", 3, "a path as text"),
    ("on_progress", 3, "a function of one argument"),
]


@pytest.mark.parametrize(
    ("name", "value", "expected"), SEARCHING, ids=[f"{n}={v!r}" for n, v, _ in SEARCHING]
)
def test_searching(name: str, value: Any, expected: str, recording: Recording) -> None:
    arguments = ({} if name == "max_error" else {"budget": 0.5}) | {name: value}
    refused(name, expected, lambda: Plan.search(MODEL, recording, **arguments))


@pytest.mark.parametrize("schedule", ["CR", "", [0, 1], "RX"])
def test_a_schedule_that_is_none(schedule: Any, plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"^plan: (schedule|step mode): expected"):
        plan.with_schedule(schedule)


def test_modes_in_a_recipe_are_no_plain_numbers(plan: Plan) -> None:
    with pytest.raises(PlanError) as caught:
        replace(plan.recipe, schedule=(0, 1, 1, 0, 1, 1), output_weights=None, latent=None)
    assert caught.value.got == "0"


def test_optimizing(plan: Plan) -> None:
    refused("plan", "the class Plan", lambda: optimize(MODEL, plan.recipe))  # type: ignore[arg-type]
    refused("model", "the class Module", lambda: optimize("model", plan))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "where", "expected"),
    [
        ((3, "full"), "pattern", "the class str"),
        (("*", 3), "sitemode", "calibrate | reuse | full"),
        (("*", "calibrate", "3"), "rank", WHOLE),
        (("*", "calibrate", -1), "rank", "0 or more"),
        (("*", "calibrate", 3, 4), "granularity", "linear | branch"),
    ],
)
def test_rules(arguments: tuple[Any, ...], where: str, expected: str) -> None:
    refused(where, expected, lambda: SiteRule(*arguments))


def test_a_rank_of_numpys_is_a_plain_one() -> None:
    assert type(SiteRule("*", "calibrate", np.int64(3)).rank) is int


@pytest.mark.parametrize("path", [3, None, b"d", "a\0b"])
def test_paths(path: Any, plan: Plan, recording: Recording) -> None:
    for call in (plan.save, Plan.load, recording.save, Recording.load, LatencyTable.load):
        refused("path", "a path as text", lambda call=call: call(path))


def test_a_path_that_is_too_long(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / ("x" * 5000)
    for call in (plan.save, Plan.load):
        with pytest.raises(PlanError, match="File name too long"):
            call(path)


def test_recording(recording: Recording) -> None:
    refused("model", "the class Module", lambda: record("model").__enter__())  # type: ignore[arg-type]
    refused("run", WHOLE, lambda: recording.take_runs(["first"]))  # type: ignore[list-item]
    refused("run", "0 .. 2", lambda: recording.take_runs([3]))
    with record(MODEL) as recorder:
        MODEL(torch.randn(2, 5, 4), torch.ones(2))
        refused("latents", "the class Tensor", lambda: recorder.finish([1.0]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.empty(2, 5, 4, device="meta"), "one on the meta device"),
        (torch.randn(2, 5, 4).to_sparse(), "one of layout torch.sparse_coo"),
    ],
)
def test_tensors_without_values_of_their_own(x: torch.Tensor, got: str) -> None:
    with record(MODEL), pytest.raises(CalicacheError) as caught:
        MODEL(x, torch.ones(2))
    assert (caught.value.stage, caught.value.got) == ("record", got)


def test_capturing(recording: Recording) -> None:
    refused("model", "the class Module", lambda: capture("model", recording.signature))  # type: ignore[arg-type]
    refused("signature", "the class CallSignature", lambda: capture(MODEL, recording))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "where", "expected"),
    [
        ({"plain": "1"}, "seconds", NUMBER),
        ({"forecast": None}, "seconds", NUMBER),
        ({"rows": ("row",)}, "row", "the class LatencyRow"),
        ({"rows": (LatencyRow("a", BranchChoice.REUSE, 0, "1", 1.0),)}, "seconds", NUMBER),
        ({"order": "1"}, "order", WHOLE),
    ],
)
def test_latency_tables(change: dict[str, Any], where: str, expected: str) -> None:
    fields = {"weights_hash": "h", "runtime": "r", "order": 1, "plain": 1.0, "forecast": 1.0}
    refused(where, expected, lambda: LatencyTable(**fields | {"rows": ()} | change))


def test_a_table_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    table = LatencyTable("h", "r", 1, 1.0, 1.0, (), {"machine": object()})  # type: ignore[dict-item]
    refused("latency table", "values that can be read back", lambda: table.save(tmp_path / "a"))
    assert [*tmp_path.iterdir()] == []


def test_an_empty_batch_is_compiled(plan: Plan) -> None:
    empty = optimize(MODEL, plan).for_call(torch.zeros(0, 5, 4), torch.zeros(0))
    assert {cache.nbytes for cache in empty.compiled.variant_set.caches} == {0}
