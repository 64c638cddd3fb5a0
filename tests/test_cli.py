"""The console command, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from calicache.export import export_onnx
from calicache.graph_passes import Plan, optimize, uniform_schedule
from calicache.graph_passes.plan import StepMode
from calicache.tools.inspect_artifact import format_count, schedule_strip


@pytest.fixture(scope="module")
def artifact(dit, dit_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "a path with spaces.onnx.d"
    export_onnx(optimize(dit, dit_plan), folder)
    return folder


def calicache(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "calicache"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_inspect_prints_sites_rejections_schedule_and_totals(artifact: Path) -> None:
    done = calicache("inspect", artifact)
    assert done.returncode == 0, done.stderr
    for part in (
        "blocks.0.attn.q",
        "blocks.1.mlp.fc2",
        "RCCRCC",
        "final_proj",
        "outside every residual branch",
        "CALIBRATE",
        "whole run",
        "rank 4",
    ):
        assert part in done.stdout
    line = next(row for row in done.stdout.splitlines() if "blocks.0.mlp.fc1" in row)
    name, in_features, out_features, rank, energy, *_ = line.split()
    assert (name, in_features, out_features, rank) == ("blocks.0.mlp.fc1", "32", "128", "4")
    assert 0.0 < float(energy) < 1.0


def test_piped_output_is_plain_and_fits_80_columns(artifact: Path) -> None:
    text = calicache("inspect", artifact).stdout
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_json_has_the_manifest(artifact: Path) -> None:
    manifest = json.loads(calicache("inspect", artifact, "--json").stdout)
    assert manifest == json.loads((artifact / "manifest.json").read_text())


def test_a_damaged_artifact_is_told_apart_with_exit_code_1(artifact: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.d"
    broken.mkdir()
    (broken / "manifest.json").write_bytes((artifact / "manifest.json").read_bytes())
    done = calicache("inspect", broken)
    assert done.returncode == 1
    assert "no file" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_help_has_an_example() -> None:
    assert "Example: calicache inspect" in calicache("inspect", "--help").stdout


def test_schedule_strip_breaks_after_fifty_steps() -> None:
    schedule = uniform_schedule(51, 2, StepMode.REUSE)
    lines = [line.plain for line in schedule_strip(schedule)]
    assert lines[0] == "   0  " + "RU" * 25
    assert lines[1] == "  50  R"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1000, "1 k"), (1.234e9, "1.23 G"), (5e13, "50 T")]
)
def test_format_count(value: float, text: str) -> None:
    assert format_count(value) == text
