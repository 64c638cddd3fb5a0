"""The console command: help with an example everywhere, and work that takes what is given."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from calicache.export import Attention, Layout, Precision
from calicache.tools import commands
from calicache.tools.bench.models import MODELS
from calicache.tools.cli import WORK, app
from calicache.tools.graph.command import GraphFormat

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
PATHS = {
    "search": ("MODEL", "runs", "-o", "plan"),
    "take": ("plan", "0", "-o", "other"),
    "export": ("MODEL", "plan", "-o", "artifact"),
    "latency": ("MODEL", "runs", "-o", "table.json"),
    "inspect": ("plan",),
    "diff": ("plan", "plan"),
    "graph": ("artifact",),
    "report": ("plan", "-o", "report.html"),
    "evaluate": ("MODEL", "plan", "-o", "evaluation"),
    "compare": ("artifact", "--recording", "runs"),
}


def test_the_installed_command_lists_every_subcommand() -> None:
    command = str(Path(sys.executable).parent / "calicache")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"search", "take", "export", "inspect", "bench"} <= set(COMMANDS)
    assert all(re.search(rf"\b{name}\b", done.stdout) for name in COMMANDS)


def test_version_is_that_of_the_package() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"calicache {version('calicache')}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_fits_80_columns(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80"})
    assert done.exit_code == 0
    assert f"Example: calicache {name} " in done.output
    assert max(len(line) for line in done.output.splitlines()) <= 80
    assert "<bool>" not in done.output


@pytest.mark.parametrize("name", ["inspect", "diff"])
def test_help_documents_the_exit_codes(name: str) -> None:
    assert "Exit codes: " in CliRunner().invoke(app, [name, "--help"]).output


@pytest.mark.parametrize("command", WORK, ids=lambda command: command.__name__)
def test_work_takes_what_the_command_line_gives(command: Callable[..., None]) -> None:
    work = getattr(importlib.import_module(WORK[command]), command.__name__)
    assert list(inspect.signature(work).parameters) == list(inspect.signature(command).parameters)
    given, taken = get_type_hints(command), get_type_hints(work)
    # Lists of words here, a str there.
    choices = {"layout", "form", "attention", "precision", "dtype"}
    assert {n: t for n, t in given.items() if n not in choices} == {
        n: t for n, t in taken.items() if n not in choices
    }


def test_choices_are_those_of_the_library() -> None:
    choices = {**get_type_hints(commands.export), **get_type_hints(commands.graph)}
    library = {
        "layout": Layout,
        "attention": Attention,
        "precision": Precision,
        "form": GraphFormat,
    }
    for name, kind in library.items():
        assert list(choices[name].__args__) == list(kind)
    assert ", ".join(MODELS) == commands.BENCH_MODELS


IN_A_NEW_PROCESS = """
import json, sys
from typer.testing import CliRunner
from calicache.tools.cli import app
done = CliRunner().invoke(app, sys.argv[1:])
loaded = sorted({"torch", "onnx", "numpy"} & set(sys.modules))
print(json.dumps([done.exit_code, done.stderr, loaded]))
"""


@pytest.mark.parametrize("name", PATHS)
def test_a_wrong_path_is_told_without_loading_torch(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("raise RuntimeError\n")
    arguments = [a.replace("MODEL", "model.py:build") for a in PATHS[name]]
    done = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS, name, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    code, told, loaded = json.loads(done.stdout)
    assert (code, loaded) == (1, [])
    assert "got no such path" in " ".join(told.split())
