"""The plan of the house: layers, sizes of folders, and where an import may stand."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("graph_passes", "export", "tools", "tests")
ENTRIES = 12

CONTRACTS = [
    contract["name"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
]
FORBIDDEN_IMPORTS = {
    "tools use export, export uses graph_passes": ("export/latency.py", "calicache.tools.cli"),
    "rooms of graph_passes": ("graph_passes/sites/sites.py", "calicache.graph_passes.search"),
    "rooms of export": ("export/session/session.py", "calicache.export.layouts.step"),
    "rooms of tools": ("tools/terminal/__init__.py", "calicache.tools.cli"),
    "no circles, between rooms or inside one": (
        "graph_passes/recording/signature.py",
        "calicache.graph_passes.recording.recorder",
    ),
    "rooms import one another, not the front of their house": (
        "graph_passes/sites/sites.py",
        "calicache.graph_passes",
    ),
}


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the package `calicache` in a folder, against the contracts of the repository."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    return subprocess.run(
        [*command, ROOT / "pyproject.toml"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def package_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the whole package."""
    folder = tmp_path_factory.mktemp("contracts")
    shutil.copytree(
        ROOT / ".typecheck" / "calicache",
        folder / "calicache",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return folder


def test_imports_keep_the_contracts() -> None:
    result = lint_imports(ROOT / ".typecheck")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(CONTRACTS)} kept, 0 broken" in result.stdout


@pytest.mark.parametrize("contract", CONTRACTS)
def test_forbidden_import_is_caught(contract: str, package_copy: Path) -> None:
    name, module = FORBIDDEN_IMPORTS[contract]
    path = package_copy / "calicache" / name
    text = path.read_text()
    path.write_text(f"{text}\nimport {module}\n")
    try:
        result = lint_imports(package_copy)
    finally:
        path.write_text(text)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{contract} BROKEN" in result.stdout


def test_no_folder_has_more_entries_than_one_sees_at_a_glance() -> None:
    """A stub is the other half of its module."""
    folders = [
        folder
        for name in FOLDERS
        for folder in (ROOT / name, *(ROOT / name).rglob("*"))
        if folder.is_dir() and folder.name != "__pycache__"
    ]
    counts = {
        folder.relative_to(ROOT).as_posix(): sum(
            entry.name != "__pycache__" and entry.suffix != ".pyi" for entry in folder.iterdir()
        )
        for folder in folders
    }
    assert len(counts) > 30
    assert {name: count for name, count in counts.items() if count > ENTRIES} == {}


FORBIDDEN_CODE = {
    "TID251": "from typing import TYPE_CHECKING\n",
    "TID253": "import pygraphviz\n",
    "PLC0415": "def draw() -> None:\n    import numpy\n",
}


@pytest.mark.parametrize("rule", FORBIDDEN_CODE)
def test_style_forbids_imports_that_hide(rule: str) -> None:
    """Nothing but optional libraries is imported in functions; those are imported nowhere else."""
    command = ["ruff", "check", "--no-cache", "--output-format", "concise", "--stdin-filename"]
    result = subprocess.run(
        [sys.executable, "-m", *command, "tools/draw.py", "-"],
        cwd=ROOT,
        input=FORBIDDEN_CODE[rule],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert f": {rule} " in result.stdout


def test_test_modules_import_no_test_module() -> None:
    texts = {path.name: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    pattern = re.compile(r"^\s*(?:from|import) (?:\w+\.)*test_", re.MULTILINE)
    assert pattern.search("import os\nfrom tools.test_other import helper\n")
    assert [name for name, text in texts.items() if pattern.search(text)] == []
