"""The front door: sixteen names, loaded when they are asked for."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import calicache

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "speed_up",
    "restore",
    "record",
    "Recording",
    "Plan",
    "Front",
    "optimize",
    "OptimizedModel",
    "StepMode",
    "SiteMode",
    "SiteRule",
    "LatencyTable",
    "export_onnx",
    "Session",
    "CalicacheError",
    "__version__",
]


def loaded_by(code: str) -> list[str]:
    """Top-level packages in memory after some code has run in a new process."""
    report = "; import json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    result = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return list(json.loads(result.stdout))


def test_the_names_are_these() -> None:
    assert calicache.__all__ == NAMES
    assert set(NAMES) <= set(dir(calicache))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_leads_to_what_is_called_so(name: str) -> None:
    value = getattr(calicache, name)
    assert isinstance(value, str) if name == "__version__" else value.__name__ == name
    assert getattr(calicache, name) == value


def test_the_import_loads_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "onnx", "onnxruntime", "networkx", "pydantic", "safetensors"}
    assert heavy.isdisjoint(loaded_by("import calicache"))


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'calicache' has no attribute 'Trajectory'"):
        _ = calicache.Trajectory


def test_type_checkers_see_the_same_names() -> None:
    stub = ast.parse((ROOT / "calicache" / "__init__.pyi").read_text())
    imported = {
        a.asname for node in stub.body if isinstance(node, ast.ImportFrom) for a in node.names
    }
    declared = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    assert imported | declared == set(NAMES)
    homes = {
        a.asname: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for a in node.names
    }
    assert homes == calicache._HOMES
