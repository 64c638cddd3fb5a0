"""Packaging: folders, import names and the declaration of both stay one thing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import typer
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("graph_passes", "export", "tools")


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code from the repository root."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def declared() -> dict[str, dict[str, str] | list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def packages_on_disk() -> dict[str, str]:
    """Import name to folder, for every folder with an `__init__.py`."""
    folders = [path.parent for name in FOLDERS for path in (ROOT / name).rglob("__init__.py")]
    relative = [folder.relative_to(ROOT).as_posix() for folder in folders]
    inside = {f"calicache.{folder.replace('/', '.')}": folder for folder in relative}
    return {"calicache": "calicache", **inside}


def test_declared_packages_are_the_folders_on_disk() -> None:
    assert sorted(declared()["packages"]) == sorted(packages_on_disk())
    assert len(packages_on_disk()) >= len(FOLDERS)


def test_declared_folders_lead_to_the_packages() -> None:
    mapping, folders = declared()["package-dir"], packages_on_disk()
    assert {name: folders[name] for name in mapping} == mapping
    # setuptools finds a subpackage under its parent's folder.
    assert {f"calicache.{name}" for name in FOLDERS} <= set(mapping)


def test_every_module_lies_in_a_package() -> None:
    modules = [path for name in FOLDERS for path in (ROOT / name).rglob("*.py")]
    assert len(modules) > len(FOLDERS)
    assert [path for path in modules if not (path.parent / "__init__.py").exists()] == []


@pytest.mark.parametrize("name", FOLDERS)
def test_bare_import_from_the_root_names_the_right_one(name: str) -> None:
    result = python(f"import {name}")
    assert result.returncode == 1
    assert f"ImportError: import calicache.{name}" in result.stderr


@pytest.mark.parametrize("name", FOLDERS)
def test_namespace_import_loads_the_folder(name: str) -> None:
    module = importlib.import_module(f"calicache.{name}")
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / name / "__init__.py"


def test_type_checker_links_resolve_to_the_folders() -> None:
    links = {path.name: path for path in (ROOT / ".typecheck" / "calicache").iterdir()}
    assert sorted(links) == [
        "__init__.py",
        "__init__.pyi",
        "__main__.py",
        "export",
        "graph_passes",
        "lazy_names.py",
        "tools",
    ]
    assert all(link.is_symlink() for link in links.values())
    assert {name: link.resolve() for name, link in links.items()} == {
        "__init__.py": ROOT / "calicache" / "__init__.py",
        "__init__.pyi": ROOT / "calicache" / "__init__.pyi",
        "__main__.py": ROOT / "calicache" / "__main__.py",
        "lazy_names.py": ROOT / "calicache" / "lazy_names.py",
        **{name: ROOT / name for name in FOLDERS},
    }
    assert not any(Path(link.readlink()).is_absolute() for link in links.values())


@pytest.mark.parametrize("name", FOLDERS)
def test_no_module_has_the_name_of_one_it_would_hide(name: str) -> None:
    stems = {path.stem for path in (ROOT / name).rglob("*.py")}
    assert "__init__" in stems
    assert stems & {"inspect", "trace", "onnx"} == set()


@pytest.mark.parametrize("name", ["graph_passes", "export"])
def test_public_names_exist_once(name: str) -> None:
    module = importlib.import_module(f"calicache.{name}")
    assert [public for public in module.__all__ if not hasattr(module, public)] == []
    assert len(set(module.__all__)) == len(module.__all__) > 0


def test_command_is_installed() -> None:
    (command,) = entry_points(group="console_scripts", name="calicache")
    assert isinstance(command.load(), typer.Typer)


STATE = """
import json, logging, os, random, signal, sys, torch
def state():
    return {
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "grad": torch.is_grad_enabled(),
        "random": [hash(random.getstate()), torch.get_rng_state().sum().item()],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "environment": dict(os.environ),
        "handlers": [len(logging.root.handlers), logging.root.level],
        "path": list(sys.path),
        "hooks": [sys.excepthook is sys.__excepthook__, str(signal.getsignal(signal.SIGINT))],
    }
before = state()
import calicache.graph_passes, calicache.export
calicache.graph_passes.optimize, calicache.export.export_onnx  # loads all of both
after = state()
import calicache.tools
print(json.dumps([before, after]))
"""


@pytest.mark.slow
def test_import_changes_no_global_state_and_is_silent() -> None:
    result = python(STATE)
    assert (result.returncode, result.stderr) == (0, "")
    before, after = json.loads(result.stdout)  # nothing else was printed
    assert len(before) == 11
    assert after == before


def test_workflow_runs_the_whole_check_and_keeps_the_screenshots() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (job,) = yaml.safe_load(text)["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    (kept,) = [step["with"]["path"] for step in job["steps"] if "with" in step]
    assert kept.split() == ["out/report.png", "out/browser-*.png"]
    tests = ROOT / "tests"
    assert '"out" / "report.png"' in (tests / "tools/report/test_report.py").read_text()
    assert 'OUT / f"browser-{width}.png"' in (tests / "samples/test_browser.py").read_text()
