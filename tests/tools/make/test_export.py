"""calicache export: from a model file and a recording to an artifact, by commands alone."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small.subjects import small_model, small_runs
from typer.testing import CliRunner, Result

from calicache.export import Layout, Session, load_artifact
from calicache.graph_passes import Plan, optimize
from calicache.tools.cli import app
from calicache.tools.terminal.model_file import load_model

MODEL = "from support.small.subjects import small_model\n\ndef build():\n    return small_model()\n"


def calicache(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file and a recording, as a user has them."""
    place = tmp_path_factory.mktemp("the user's own")
    (place / "my model.py").write_text(MODEL)
    small_runs(small_model(), 3).save(place / "runs.safetensors")
    return place


@pytest.mark.slow
def test_commands_alone_lead_to_an_artifact_that_runs(folder: Path) -> None:
    model, plan, other = f"{folder / 'my model.py'}:build", folder / "plan", folder / "a point"
    artifact = folder / "small.onnx.d"
    for command in (
        ("search", model, folder / "runs.safetensors", "-o", plan, "--budget", "0.7"),
        ("take", plan, "0", "-o", other),
        ("export", model, other, "-o", artifact, "--layout", "sampler"),
    ):
        done = calicache(*command)
        assert done.exit_code == 0, done.output
    manifest = load_artifact(artifact)
    assert (manifest.layout, manifest.front) == (Layout.SAMPLER, Plan.load(other).front)
    told = words(done.stdout)
    assert f"MACs {manifest.run_share:.3f} of the full run" in told
    assert f"calicache inspect {shlex.quote(str(artifact))}" in told
    assert "\x1b" not in done.output

    fast = optimize(load_model(model), Plan.load(other))
    x = noise = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        for step in range(6):
            x = x - 0.1 * fast(x, torch.full((2,), 1 - step / 6))
    sampled = Session(artifact).sample(noise)
    # Both in float32; the exported sampler adds in another order.
    np.testing.assert_allclose(sampled, x.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_options_of_the_command_are_those_of_the_function(folder: Path, tmp_path: Path) -> None:
    plan, artifact = tmp_path / "plan", tmp_path / "any.onnx.d"
    runs = small_runs(small_model())
    Plan.from_trajectory(small_model(), runs, schedule=2, rank=2).save(plan)
    wishes = ("--attention", "standard", "--dynamic", "batch", "--precision", "float16")
    model = f"{folder / 'my model.py'}:build"
    done = calicache("export", model, plan, "-o", artifact, *wishes)
    assert done.exit_code == 0, done.output
    manifest = load_artifact(artifact)
    assert (manifest.attention, manifest.precision) == ("standard", "float16")
    assert [*manifest.sizes_of({})] == ["batch"]
    done = calicache("export", model, plan, "-o", tmp_path / "b", "--dynamic", "rows")
    assert "dynamic: expected batch | prompt | tokens, got 'rows'" in words(done.stderr)


def test_an_artifact_is_the_only_folder_that_is_replaced(folder: Path, tmp_path: Path) -> None:
    small = small_runs(small_model())
    Plan.from_trajectory(small_model(), small, schedule=2, rank=2).save(tmp_path / "plan")
    done = calicache("export", f"{folder / 'my model.py'}:build", tmp_path / "plan", "-o", tmp_path)
    assert done.exit_code == 1
    assert "expected a new folder, or an artifact to replace" in words(done.stderr)
    assert (tmp_path / "plan").is_dir()


def test_another_layout_is_a_usage_error(folder: Path, tmp_path: Path) -> None:
    done = calicache("export", "m.py:f", folder, "-o", tmp_path / "a", "--layout", "loop")
    assert done.exit_code != 0
    assert not (tmp_path / "a").exists()
