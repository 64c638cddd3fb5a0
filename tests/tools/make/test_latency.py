"""calicache latency: a table measured from a model file, and a plan that counts in its seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from calicache.graph_passes import Plan, Recording, record
from calicache.graph_passes.common.disk.hashing import hash_weights
from calicache.graph_passes.settings.latency import LatencyTable
from calicache.tools.cli import app
from calicache.tools.terminal.model_file import load_model

STEPS = 6
MODEL = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.entry, self.exit = nn.Linear(4, 16), nn.Linear(16, 4)
        self.time = nn.Linear(1, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, timestep):
        hidden = self.entry(x) + self.time(timestep.to(x.dtype)[:, None] / 1000)[:, None]
        for block in self.blocks:
            hidden = block(hidden)
        return self.exit(hidden)


def build():
    torch.manual_seed(0)
    return Mixer().eval()
"""


def calicache(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def words(text: str) -> str:
    return " ".join(text.split())


def recorded(model: torch.nn.Module) -> Recording:
    def sample(seed: int) -> Tensor:
        x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(seed))
        for now in torch.linspace(999, 0, STEPS).long():
            with torch.no_grad():
                x = 0.98 * x - 0.1 * model(x, now.expand(2))
        return x

    with record(model) as recording:
        for seed in range(3):
            recording.finish(sample(seed))
    return recording


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("the user's own")
    (folder / "my mixer.py").write_text(MODEL)
    spec = f"{folder / 'my mixer.py'}:build"
    recorded(load_model(spec)).save(folder / "runs.safetensors")
    return spec, folder / "runs.safetensors"


@pytest.fixture(scope="module")
def measured(
    given: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Result, Path]:
    path = tmp_path_factory.mktemp("latency") / "a table.json"
    arguments = (*given, "-o", path, "--order", "1", "--repeats", "2")
    return calicache("latency", *arguments), path


@pytest.mark.slow
def test_table_is_saved_and_shown(measured: tuple[Result, Path], given: tuple[str, Path]) -> None:
    done, path = measured
    assert done.exit_code == 0, done.output
    table = LatencyTable.load(path)
    assert table.order == 1
    assert table.weights_hash == hash_weights(load_model(given[0]))
    shown = done.stdout.splitlines()
    for row in table.rows:
        share = f"{row.step / table.plain:.3f}"
        assert any({row.group, str(row.choice), share} <= set(line.split()) for line in shown)
    assert f"forecast 0 {table.forecast / table.plain:.3f}" in words(done.stdout)
    assert "CPUExecutionProvider, order 1" in done.stdout
    assert f"--latency '{path}'" in done.stdout
    moved = float(table.environment["plain_spread"]) > 0.1
    assert ("something else ran on this machine" in words(done.stdout)) == moved


@pytest.mark.slow
def test_output_is_plain_and_fits_80_columns(
    measured: tuple[Result, Path],
) -> None:
    done, path = measured
    assert "\x1b" not in done.output
    lines = [line for line in done.stdout.splitlines() if str(path) not in line]
    assert max(map(len, lines)) <= 80


@pytest.mark.slow
def test_plan_counts_in_measured_seconds(
    measured: tuple[Result, Path], given: tuple[str, Path], tmp_path: Path
) -> None:
    # Calls of a model this small take no less time on any step; those of a large one do.
    table = LatencyTable.load(measured[1])
    rows = tuple(replace(row, refresh=1.1, step=0.5) for row in table.rows)
    replace(table, plain=1.0, forecast=0.05, rows=rows).save(tmp_path / "large.json")
    output = tmp_path / "timed plan"
    arguments = (*given, "-o", output, "--budget", "0.8", "--latency", tmp_path / "large.json")
    done = calicache("search", *arguments)
    assert done.exit_code == 0, done.output
    front = Plan.load(output).front
    assert front is not None
    assert front.unit == table.runtime
    assert front.points[front.choice].cost <= 0.8
    assert f"of the full run, in seconds of {table.runtime}" in words(done.stdout)
    assert f"in seconds of {table.runtime}" in words(calicache("inspect", output).stdout)


def test_a_table_can_be_measured_again(
    measured: tuple[Result, Path], given: tuple[str, Path]
) -> None:
    # Refused for what comes after the look at the output.
    no_recording = given[0].rpartition(":")[0]
    done = calicache("latency", given[0], no_recording, "-o", measured[1])
    assert done.exit_code == 1
    assert "record: " in words(done.stderr)


def test_other_files_and_folders_are_not_replaced(given: tuple[str, Path], tmp_path: Path) -> None:
    before = given[1].read_bytes()
    for output, got in ((given[1], "a latency table to replace, got"), (tmp_path, "got a folder")):
        done = calicache("latency", *given, "-o", output)
        assert done.exit_code == 1
        assert got in words(done.stderr)
    assert given[1].read_bytes() == before


def test_wrong_provider_is_refused(given: tuple[str, Path], tmp_path: Path) -> None:
    done = calicache("latency", *given, "-o", tmp_path / "t.json", "--provider", "NoSuchProvider")
    assert done.exit_code == 1
    assert "CPUExecutionProvider" in words(done.stderr)
    assert not (tmp_path / "t.json").exists()
