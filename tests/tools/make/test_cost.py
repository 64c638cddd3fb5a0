"""calicache cost: what it counts without weights is what the model with weights has."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from support.small.bench import tiny
from typer.testing import CliRunner, Result

from calicache.graph_passes import Plan, Recording, optimize, record
from calicache.graph_passes.factors.statistics import named_tensors
from calicache.tools.cli import app

TINY = f"{Path(__file__).parents[2] / 'support' / 'small' / 'bench.py'}:tiny"
STEPS, RANK, ORDER = 7, 8, 1
SETTINGS = ("--steps", STEPS, "--rank", RANK, "--order", ORDER)


def cost(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["cost", *map(str, arguments)])


def counted(*arguments: object) -> dict[str, Any]:
    done = cost(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refusal(*arguments: object) -> str:
    done = cost(*arguments)
    assert done.exit_code == 1
    return " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    return counted(TINY, *SETTINGS)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny().build()


@pytest.fixture(scope="module")
def recording(model: torch.nn.Module) -> Recording:
    with record(model) as recording:
        recording.finish(tiny().sample(model, tiny().draw(1), STEPS))
    return recording


@pytest.fixture(scope="module")
def plan(model: torch.nn.Module, recording: Recording) -> Plan:
    return Plan.from_trajectory(model, recording, rank=RANK, order=ORDER, correct=False)


def test_weights_are_counted_without_them(said: dict[str, Any], model: torch.nn.Module) -> None:
    tensors = dict(chain(model.named_parameters(), model.named_buffers())).values()
    assert said["parameters"] == sum(value.numel() for value in model.parameters())
    assert said["weight_bytes"] == sum(value.nbytes for value in tensors)
    assert said["dtype"] == "float32"


@pytest.mark.slow
def test_macs_and_caches_are_those_of_the_optimised_model(
    said: dict[str, Any], model: torch.nn.Module, plan: Plan
) -> None:
    fast = optimize(model, plan)
    own = fast.compiled.cost
    assert said["call_macs"] == own.plain_macs
    assert {name: mode["macs"] for name, mode in said["modes"].items()}["CALIBRATE"] == next(
        macs for mode, macs in own.modes.items() if mode.name == "CALIBRATE"
    )
    assert said["request_bytes"] == fast.run_bytes == said["modes"]["CALIBRATE"]["request_bytes"]
    assert said["run_share"] == own.run_share(plan.recipe.schedule)
    factors = fast.compiled.factors.values()
    assert said["factor_bytes"] == sum(f.up.nbytes + f.down.nbytes for f in factors)
    assert said["targets"] == len(fast.compiled.targets)


@pytest.mark.slow
def test_statistics_are_those_of_the_plan(said: dict[str, Any], plan: Plan) -> None:
    saved = named_tensors(plan.statistics).values()
    assert said["statistics_bytes"] == sum(value.nbytes for value in saved)
    assert said["search_statistics_bytes"] > said["statistics_bytes"]


@pytest.mark.slow
def test_recorded_run_is_as_large(said: dict[str, Any], recording: Recording) -> None:
    tensors = {id(value): value for call in recording.calls for value in call.values()}
    tensors |= {id(value): value for value in recording.outputs.values()}
    assert said["recording_bytes"] == sum(value.nbytes for value in tensors.values())


@pytest.mark.slow
def test_stages_are_more_for_more_runs(said: dict[str, Any]) -> None:
    def calls(scale: dict[str, Any]) -> float:
        return sum(stage["calls"] for stage in scale["search"])

    stages = {stage["name"]: stage for stage in said["planning"]}
    assert stages["observe increments"]["calls"] == STEPS  # R and C alone
    more = counted(TINY, *SETTINGS, "--runs", 9)
    # Three times as many runs; what sensitivities take stays as it is.
    assert 2 < calls(more) / calls(said) < 3


@pytest.mark.slow
def test_a_recording_and_a_plan_give_the_form_too(
    said: dict[str, Any], recording: Recording, plan: Plan, tmp_path: Path
) -> None:
    recording.save(tmp_path / "runs.safetensors")
    plan.save(tmp_path / "plan")
    by_recording = counted(TINY, "--recording", tmp_path / "runs.safetensors", *SETTINGS[2:])
    assert by_recording == said
    assert counted(TINY, "--plan", tmp_path / "plan") == said


@pytest.mark.slow
def test_a_config_alone_will_do(
    said: dict[str, Any], model: torch.nn.Module, tmp_path: Path
) -> None:
    assert isinstance(model, DiTTransformer2DModel)
    model.save_config(tmp_path)
    inputs = ("hidden_states=2x4x8x8", "timestep=2:int64", "class_labels=2:int64")
    options = [part for text in inputs for part in ("--input", text)]
    assert counted(tmp_path, *options, *SETTINGS) == said
    half = counted(tmp_path, *options, *SETTINGS, "--dtype", "bfloat16")
    assert half["dtype"] == "bfloat16"
    assert half["request_bytes"] * 2 == said["request_bytes"]


@pytest.mark.slow
def test_tables_fit_80_columns() -> None:
    done = cost(TINY, *SETTINGS)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "try candidates" in done.stdout


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    assert "FILE.py:FUNCTION" in refusal("no-such-model")
    (tmp_path / "model.py").write_text(
        "import torch\n"
        "def alone(): return torch.nn.Linear(2, 2)\n"
        "def reads(): return torch.nn.Linear(int(torch.ones(1)), 2)\n"
    )
    alone = f"{tmp_path / 'model.py'}:alone"
    assert "--input" in refusal(alone)
    assert "NAME=SIZES" in refusal(alone, "--input", "x=two")
    assert "one named hidden_states, the latent" in refusal(alone, "--input", "x=2x2")
    assert "line 3 of model.py" in refusal(f"{tmp_path / 'model.py'}:reads")
    assert "config.json" in refusal(tmp_path)
    assert "all arguments" in refusal(alone, "--input", "x=2x2", "--latent", "x")
