"""The console command, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import sample_dit

from calicache.export import Layout, export_onnx, read_sampler
from calicache.graph_passes import Plan, StepMode, optimize, record, uniform_schedule
from calicache.tools.inspect_artifact import format_count, schedule_strip


@pytest.fixture(scope="module")
def artifact(dit, dit_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "a path with spaces.onnx.d"
    export_onnx(optimize(dit, dit_plan), folder)
    return folder


@pytest.fixture(scope="module")
def forecast_artifact(dit, forecast_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "forecast.onnx.d"
    export_onnx(optimize(dit, forecast_plan), folder)
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
        "before the first residual branch or after the last",
        "CALIBRATE",
        "whole run",
        "rank 4, order 0, weighting increment",
        "not asked for",
    ):
        assert part in done.stdout
    line = next(row for row in done.stdout.splitlines() if "blocks.0.mlp.fc1" in row)
    name, in_features, out_features, rank, energy, *_ = line.split()
    assert (name, in_features, out_features, rank) == ("blocks.0.mlp.fc1", "32", "128", "4")
    assert 0.0 < float(energy) < 1.0


@pytest.mark.parametrize("layout", list(Layout))
def test_inspect_takes_every_layout(dit, dit_plan: Plan, tmp_path: Path, layout: Layout) -> None:
    with record(dit) as trajectory:
        trajectory.finish(sample_dit(dit))
    fast = optimize(dit, dit_plan)
    sampler = read_sampler(fast, trajectory) if layout is Layout.SAMPLER else None
    export_onnx(fast, tmp_path / "d", layout, sampler)
    done = calicache("inspect", tmp_path / "d")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"calicache artifact, layout {layout}")
    words = " ".join(done.stdout.split())  # the terminal breaks lines
    assert ("guidance scale 1.5" in words) == (layout is Layout.SAMPLER)


def test_inspect_prints_order_output_weights_and_all_four_modes(forecast_artifact: Path) -> None:
    done = calicache("inspect", forecast_artifact)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert any("rank 4, order 2, weighting covariance" in row for row in rows)
    line = next(row for row in rows if row.startswith("output weights"))
    assert line.split(maxsplit=2)[2].rstrip() == "fitted to the recorded runs"
    assert "   0  RCRURF" in done.stdout
    assert "R refresh, C calibrate, U reuse, F forecast" in done.stdout
    totals = {row.split()[0]: row.split()[1:] for row in rows if row.strip()}
    assert [totals[mode.name][0] for mode in StepMode] == ["3", "1", "1", "1"]
    assert totals["FORECAST"] == ["1", "0", "0.000"]
    assert totals["caches"][0] == "3"  # kept refreshes
    assert "blocks.0.attn.q+k+v" in done.stdout


def test_inspect_says_why_there_are_no_output_weights(dit, dit_plan: Plan, tmp_path: Path) -> None:
    changed = dit_plan.with_rank(2)
    export_onnx(optimize(dit, changed), tmp_path / "d")
    assert changed.settings.correction.startswith("not fitted")
    assert changed.settings.correction in calicache("inspect", tmp_path / "d").stdout


@pytest.mark.parametrize("name", ["artifact", "forecast_artifact"])
def test_piped_output_is_plain_and_fits_80_columns(
    name: str, request: pytest.FixtureRequest
) -> None:
    text = calicache("inspect", request.getfixturevalue(name)).stdout
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
    assert lines[2].strip() == "R refresh, C calibrate, U reuse, F forecast"


def test_schedule_strip_has_a_letter_for_every_mode() -> None:
    assert next(schedule_strip(tuple(StepMode))).plain == "   0  RCUF"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1000, "1 k"), (1.234e9, "1.23 G"), (5e13, "50 T")]
)
def test_format_count(value: float, text: str) -> None:
    assert format_count(value) == text
