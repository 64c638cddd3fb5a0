"""The console command: every subcommand has help with an example."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from calicache.tools.cli import app

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_installed_command_lists_every_subcommand() -> None:
    command = str(Path(sys.executable).parent / "calicache")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"inspect", "diff", "plan", "latency", "bench"} <= set(COMMANDS)
    assert all(re.search(rf"\b{name}\b", done.stdout) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_fits_80_columns(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80"})
    assert done.exit_code == 0
    assert f"Example: calicache {name} " in done.output
    assert max(len(line) for line in done.output.splitlines()) <= 80


@pytest.mark.parametrize("name", ["inspect", "diff"])
def test_help_documents_the_exit_codes(name: str) -> None:
    assert "Exit codes: " in CliRunner().invoke(app, [name, "--help"]).output
