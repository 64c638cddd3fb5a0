"""The sampler of a plan: kept with it in a file of its own, and dropped with what it fits."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.comparisons import STEPS, ddim, draw, flow, recorded, residual
from torch import nn

from calicache.graph_passes import Plan, Recording, StepMode
from calicache.graph_passes.api.plan_file import (
    NOT_ASKED,
    PLAN_FILE,
    SAMPLER_FILE,
    STATISTICS_FILE,
)
from calicache.graph_passes.common.disk.documents import sum_of
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.sampler.tables import SamplerTables

R, C, _, _ = StepMode


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return residual()


@pytest.fixture(scope="module")
def recording(model: nn.Module) -> Recording:
    return recorded(model, ddim, [draw(seed, 2, 5, 8) for seed in range(2)])[0]


def planned(model: nn.Module, recording: Recording, **options: Any) -> Plan:
    return Plan.from_trajectory(model, recording, schedule=3, rank=2, **options)


@pytest.fixture(scope="module")
def plan(model: nn.Module, recording: Recording) -> Plan:
    return planned(model, recording)


def assert_same(got: SamplerTables | None, expected: SamplerTables | None) -> None:
    assert got is not None
    assert expected is not None
    for field in fields(SamplerTables):
        if field.name != "inputs":
            assert getattr(got, field.name) == getattr(expected, field.name), field.name
    assert list(got.inputs) == list(expected.inputs)
    for name, table in expected.inputs.items():
        assert got.inputs[name].dtype == table.dtype
        assert torch.equal(got.inputs[name], table)


# --- what is kept ---------------------------------------------------------------------------------


def test_a_plan_knows_the_sampler_of_finished_runs(plan: Plan) -> None:
    assert plan.sampler is not None
    assert (plan.sampler.latent, plan.sampler.parts) == ("hidden_states", 2)
    assert len(plan.sampler.updates) == STEPS
    assert list(plan.sampler.inputs) == ["timestep"]
    assert plan.no_sampler == ""


def test_the_sampler_survives_saving(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan")
    names = sorted(path.name for path in (tmp_path / "plan").iterdir())
    assert names == sorted((PLAN_FILE, SAMPLER_FILE, STATISTICS_FILE))
    loaded = Plan.load(tmp_path / "plan")
    assert_same(loaded.sampler, plan.sampler)
    assert (loaded.no_sampler, loaded.recipe) == ("", plan.recipe)


def test_a_plan_that_ran_nothing_says_so_before_and_after_saving(
    model: nn.Module, recording: Recording, tmp_path: Path
) -> None:
    plan = planned(model, recording, correct=False)
    plan.save(tmp_path / "plan")
    assert not (tmp_path / "plan" / SAMPLER_FILE).exists()
    for one in (plan, Plan.load(tmp_path / "plan")):
        assert (one.sampler, one.no_sampler) == (None, NOT_ASKED)


def test_a_sampler_that_adds_noise_is_not_known_and_the_plan_says_why(
    model: nn.Module, tmp_path: Path
) -> None:
    noisy, _ = recorded(model, flow(noisy=0.3), [draw(1, 2, 5, 8)])
    plan = planned(model, noisy)
    plan.save(tmp_path / "plan")
    for one in (plan, Plan.load(tmp_path / "plan")):
        assert one.sampler is None
        assert "no fixed weighted sum" in one.no_sampler
        assert one.recipe.correction == f"not fitted: {one.no_sampler}"


def test_without_its_result_a_run_leaves_the_last_update_unknown(model: nn.Module) -> None:
    open_runs, _ = recorded(model, ddim, [draw(1, 2, 5, 8)], finish=False)
    plan = planned(model, open_runs)
    assert plan.sampler is None
    assert plan.no_sampler
    assert plan.recipe.output_weights is not None  # of all steps but the last


# --- what a change leaves -------------------------------------------------------------------------


def test_the_sampler_stays_with_another_rank_or_schedule_of_the_same_length(plan: Plan) -> None:
    for changed in (plan.with_rank(4), plan.with_schedule("RCRCRC"), plan.with_schedule("R" * 6)):
        assert changed.sampler is plan.sampler
        assert changed.no_sampler == ""


def test_a_schedule_of_another_length_has_no_sampler(plan: Plan) -> None:
    changed = plan.with_schedule((R, C, C))
    assert (changed.sampler, changed.no_sampler) == (None, "the plan was given another length")
    assert plan.sampler is not None


# --- damage ---------------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    written = json.loads((folder / PLAN_FILE).read_text())
    change(written)
    written["sha256"] = sum_of(written)
    (folder / PLAN_FILE).write_text(json.dumps(written))


def swap(folder: Path) -> None:
    tables = load_file(folder / SAMPLER_FILE)
    save_file({name: table + 1 for name, table in tables.items()}, folder / SAMPLER_FILE)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda at: (at / SAMPLER_FILE).unlink(), "No such file"),
    "cut short": (
        lambda at: (at / SAMPLER_FILE).write_bytes((at / SAMPLER_FILE).read_bytes()[:-4]),
        f"{SAMPLER_FILE} is not the file the plan was saved with",
    ),
    "other tables": (swap, f"{SAMPLER_FILE} is not the file the plan was saved with"),
    "no digest": (
        lambda at: edit(at, lambda w: w["files"].pop(SAMPLER_FILE)),
        f"{PLAN_FILE} lists other files than {SAMPLER_FILE}, {STATISTICS_FILE}",
    ),
    "half the numbers": (lambda at: edit(at, lambda w: w["sampler"].pop("updates")), "updates"),
    "no numbers in a row": (
        lambda at: edit(at, lambda w: w["sampler"].update(updates=[["much"]])),
        "updates",
    ),
    "tables of other lengths": (
        lambda at: edit(at, lambda w: w["sampler"].update(scales=[1.0])),
        "tables of the sampler that do not belong together",
    ),
    "another latent": (
        lambda at: edit(at, lambda w: w["sampler"].update(latent="x")),
        "tables of the sampler that do not belong together",
    ),
    "numbers that are none": (
        lambda at: edit(at, lambda w: w["sampler"]["scales"].append(math.nan)),
        "sampler.scales.6: Input should be a finite number",
    ),
    "no reason": (lambda at: edit(at, lambda w: w.pop("no_sampler")), "no_sampler"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_sampler_is_refused_with_path_and_reason(
    plan: Plan, tmp_path: Path, damage: str
) -> None:
    spoil, reason = DAMAGES[damage]
    plan.save(tmp_path / "plan")
    spoil(tmp_path / "plan")
    start = f"plan: {tmp_path / 'plan'}: expected a folder written by Plan.save, got "
    with pytest.raises(PlanError, match=f"^{re.escape(start)}") as caught:
        Plan.load(tmp_path / "plan")
    assert reason in str(caught.value)
