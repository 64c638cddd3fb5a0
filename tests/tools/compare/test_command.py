"""calicache compare, from files to text, JSON and PNG, as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.artifacts import exported
from support.comparisons import C, R, ddim, draw, flow, recorded, residual
from typer.testing import CliRunner, Result

from calicache.export import export_onnx
from calicache.graph_passes import Plan, Recording, optimize
from calicache.graph_passes.common.disk.bounds import MAX_WEIGHT
from calicache.tools.cli import app
from calicache.tools.compare.comparison import compare

pytestmark = pytest.mark.slow

DECODERS = """
def images():
    return lambda latents: latents[:, None].expand(-1, 3, -1, -1).tanh()


def number():
    return 3


def broken():
    return lambda latents: latents.no_such_method()
"""
MODEL = """
from support.comparisons import residual as build
"""


@dataclass(frozen=True, slots=True)
class Given:
    """Files of a model with images, and of one with tokens."""

    artifact: Path
    runs: Path
    tokens: Path
    token_runs: Path
    diverging: Path
    large_runs: Path
    decoders: Path
    model: Path


@pytest.fixture(scope="module")
def given(dit, dit_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("the user's own files")
    files = Given(
        folder / "dit.onnx.d",
        folder / "runs of it.safetensors",
        folder / "tokens.onnx.d",
        folder / "tokens.safetensors",
        folder / "diverging.onnx.d",
        folder / "large.safetensors",
        folder / "my decoders.py",
        folder / "my model.py",
    )
    shutil.copytree(exported(optimize(dit, dit_plan)), files.artifact)
    recorded(dit, ddim, [draw(seed, 2, 1, 28, 28) for seed in (3, 4)])[0].save(files.runs)
    tokens, _ = recorded(residual(), flow(), [draw(1, 2, 5, 8)])
    plan = Plan.from_trajectory(residual(), tokens, schedule=(R, C) * 3, rank=4)
    export_onnx(optimize(residual(), plan), files.tokens)
    tokens.save(files.token_runs)
    table = plan.recipe.output_weights
    assert table is not None
    # The largest weights that a plan may have, at all steps but the first, and latents that five
    # such steps take out of float32's range.
    recorded(residual(), flow(), [1e15 * draw(1, 2, 5, 8)])[0].save(files.large_runs)
    worst = (table[0], *(((MAX_WEIGHT,) * len(table[0]),) * (len(table) - 1)))
    huge = replace(plan.recipe, output_weights=worst)
    export_onnx(optimize(residual(), replace(plan, recipe=huge)), files.diverging)
    files.decoders.write_text(DECODERS)
    files.model.write_text(MODEL)
    return files


def calicache(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def words(text: str) -> str:
    return " ".join(text.split())


def test_text_has_steps_totals_and_grid(given: Given, tmp_path: Path) -> None:
    path = tmp_path / "a grid.png"
    done = calicache("compare", given.artifact, "--recording", given.runs, "--grid", path)
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.stdout.splitlines()]
    modes = ["REFRESH", "CALIBRATE", "CALIBRATE"] * 2
    steps = [row for row in rows if len(row) == 6 and row[1].isupper() and row[0].isdigit()]
    assert [(row[0], row[1]) for row in steps] == [(str(k), m) for k, m in enumerate(modes)]
    shown = words(done.stdout)
    assert "4 samples" in shown
    assert "of latents, data range 1" in shown  # nobody trained the model
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (3 * 116 - 4, 96 + 4 * 116, 3)


def test_json_has_what_the_library_finds(given: Given) -> None:
    arguments = ("compare", given.artifact, "--recording", given.runs, "--runs", "1", "--json")
    done = calicache(*arguments)
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    comparison = compare(given.artifact, Recording.load(given.runs), runs=1)
    assert data["final"]["worst"] == comparison.final.worst
    assert [row["error"]["mean"] for row in data["steps"]] == [
        row.error.mean for row in comparison.steps if row.error is not None
    ]
    assert (data["runs"], data["samples"], data["grid"]) == (1, 2, None)
    assert data["environment"]["versions"]["onnxruntime"]
    assert data["cached_seconds"] > 0
    assert json.loads(calicache(*arguments).stdout).keys() == data.keys()


def test_piped_output_is_plain_and_fits_80_columns(given: Given) -> None:
    command = [str(Path(sys.executable).parent / "calicache"), "compare", str(given.artifact)]
    command += ["--recording", str(given.runs), "--runs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_decoder_makes_the_grid_of_latents(given: Given, tmp_path: Path) -> None:
    path = tmp_path / "g.png"
    arguments = ("compare", given.tokens, "--recording", given.token_runs, "--grid", path)
    done = calicache(*arguments, "--decoder", f"{given.decoders}:images")
    assert done.exit_code == 0, done.output
    assert "of decoded images, data range 2" in words(done.stdout)
    assert path.is_file()


def refusal(*arguments: str | Path) -> str:
    done = calicache("compare", *arguments)
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    return words(done.stderr)


def test_grid_without_images_is_refused_before_anything_is_run(
    given: Given, tmp_path: Path
) -> None:
    path = tmp_path / "g.png"
    message = refusal(given.tokens, "--recording", given.token_runs, "--grid", path)
    assert f"grid {path}: expected images".replace(" ", "") in message.replace(" ", "")
    assert "(2, 5, 8)" in message
    assert not path.exists()


def test_run_that_diverged_is_told_and_has_no_grid(given: Given, tmp_path: Path) -> None:
    arguments = (given.diverging, "--recording", given.large_runs)
    arguments = (*arguments, "--decoder", f"{given.decoders}:images")
    done = calicache("compare", *arguments, "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert (data["final"]["mean"], data["measures"]) == (None, None)
    assert data["steps"][0]["error"]["mean"] < 1e-5  # rounding, before the step that diverges
    assert data["no_measures"] == "the cached run diverged: its result is not finite"
    message = refusal(*arguments, "--grid", tmp_path / "g.png")
    assert "expected results that can be drawn, got the cached run diverged" in message
    assert not (tmp_path / "g.png").exists()


def test_decoder_that_is_none_is_refused(given: Given) -> None:
    arguments = (given.tokens, "--recording", given.token_runs, "--decoder")
    number = refusal(*arguments, f"{given.decoders}:number")
    assert "expected a function that returns a decoder of latents, got int 3." in number
    broken = refusal(*arguments, f"{given.decoders}:broken")
    assert "compare: decoder: expected a function from latents (2, 5, 8) to images" in broken


def test_other_recording_is_refused(given: Given) -> None:
    message = refusal(given.artifact, "--recording", given.token_runs)
    assert "input hidden_states: expected float32 (4, 1, 28, 28)" in message
    assert "got float32 (2, 5, 8) in the recording" in message


def test_runs_without_results_are_refused_with_a_grid_too(
    given: Given, dit, tmp_path: Path
) -> None:
    path = tmp_path / "open.safetensors"
    recorded(dit, ddim, [draw(3, 2, 1, 28, 28)], finish=False)[0].save(path)
    for more in ((), ("--grid", tmp_path / "g.png")):
        message = refusal(given.artifact, "--recording", path, *more)
        assert "compare: run 0: expected its result" in message


def test_missing_files_are_refused(given: Given, tmp_path: Path) -> None:
    assert "artifact: " in refusal(tmp_path, "--recording", given.runs)
    assert "expected a recording" in refusal(
        given.artifact, "--recording", tmp_path / "none.safetensors"
    )


def test_wrong_provider_is_refused(given: Given) -> None:
    arguments = (given.artifact, "--recording", given.runs, "--provider", "NoSuchProvider")
    said = refusal(*arguments)
    assert "CPUExecutionProvider" in said
    assert "got 'NoSuchProvider'" in said
