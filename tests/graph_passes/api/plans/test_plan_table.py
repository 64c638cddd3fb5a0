"""A plan as a table: a NumPy loop around the plain ONNX model gives what the model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from diffusion import GuidedDDIM
from support.models import STEPS, relative, sample_dit
from torch import Tensor

from calicache.graph_passes import Plan, Recording, StepMode, optimize, record

# float32 (6e-8) in another order over the steps of a run.
SAME = 1e-5


@pytest.fixture(scope="module")
def finished(dit) -> Recording:
    with record(dit) as recording:
        recording.finish(sample_dit(dit))
    return recording


def saved(plan: Plan, folder: Path) -> dict[str, Any]:
    plan.save(folder)
    table: dict[str, Any] = json.loads((folder / "plan-table.json").read_text())
    return table


def forecast(dit, recording: Recording, **wishes: Any) -> Plan:
    return Plan.from_trajectory(dit, recording, schedule="RFRFFR"[:STEPS], **wishes)


@pytest.mark.parametrize("correct", [True, False])
def test_table_has_the_plans_weights(correct: bool, dit, finished, tmp_path) -> None:
    plan = forecast(dit, finished, correct=correct, order=1)
    table = saved(plan, tmp_path / "plan")
    assert (table["format"], table["calls_per_step"]) == (1, 1)
    assert table["model"] == plan.binding.weights_hash
    assert table["latent"] == ("hidden_states" if correct else None)
    assert [row["timestep"] for row in table["steps"]] == list(plan.binding.grid.timesteps)
    modes = [mode is StepMode.REFRESH for mode in plan.schedule]
    assert [row["compute"] for row in table["steps"]] == modes
    outputs = plan.recipe.outputs
    assert outputs is not None
    for row, weights in zip(table["steps"], outputs, strict=True):
        written = [row["own"], *row["kept"], row["latent"]]
        assert written[: len(weights)] == list(weights)  # JSON keeps every bit
        assert len(row["kept"]) == 2


def test_plan_that_computes_every_step_has_plain_rows(dit, finished, tmp_path) -> None:
    plan = Plan.from_trajectory(dit, finished, schedule=1, rank=0, order=0, correct=False)
    rows = saved(plan, tmp_path / "plan")["steps"]
    assert {(r["compute"], r["own"], *r["kept"], r["latent"]) for r in rows} == {(True, 1, 0, 0)}


def test_plan_that_changes_the_model_has_no_table_and_loses_an_old_one(
    dit, finished, tmp_path
) -> None:
    forecast(dit, finished).save(tmp_path / "plan")
    assert (tmp_path / "plan/plan-table.json").exists()
    Plan.from_trajectory(dit, finished, schedule=3, rank=4).save(tmp_path / "plan")
    assert not (tmp_path / "plan/plan-table.json").exists()
    assert Plan.load(tmp_path / "plan").recipe.rank == 4


@pytest.mark.slow
def test_numpy_loop_around_the_plain_onnx_model_gives_the_same_images(
    dit, finished, tmp_path
) -> None:
    plan = forecast(dit, finished)
    table = saved(plan, tmp_path / "plan")
    names = [spec.name for spec in plan.binding.signature.tensors]
    example = tuple(finished.calls[0][name] for name in names)
    torch.onnx.export(dit, example, tmp_path / "plain.onnx", input_names=names, dynamo=True)
    plain = ort.InferenceSession(tmp_path / "plain.onnx")
    kept: list[np.ndarray] = []
    rows = iter(table["steps"])

    def predict(**inputs: Tensor) -> Tensor:
        row, x = next(rows), inputs[table["latent"]].numpy()
        output = np.sum([w * value for w, value in zip(row["kept"], kept, strict=False)], 0)
        if row["compute"]:
            own = plain.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
            output = output + row["own"] * own
            kept.insert(0, own)
        output[:, : x.shape[1]] += row["latent"] * x
        return torch.from_numpy(np.asarray(output, np.float32))

    noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([4, 7])
    got = GuidedDDIM(STEPS, 1.5, 10).sample(predict, noise, labels)
    expected = GuidedDDIM(STEPS, 1.5, 10).sample(optimize(dit, plan), noise, labels)
    assert relative(got, expected) < SAME
