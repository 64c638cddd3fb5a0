"""The small plan, artifact and recording that are looked at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.small.subjects import small_folder

from calicache.export import Manifest, load_artifact
from calicache.graph_passes import Plan


@pytest.fixture(scope="module")
def home() -> Path:
    return small_folder()


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    """To break."""
    return Path(shutil.copytree(home, tmp_path / "copy"))


@pytest.fixture(scope="module")
def plan(home: Path) -> Plan:
    return Plan.load(home / "plan")


@pytest.fixture(scope="module")
def manifest(home: Path) -> Manifest:
    return load_artifact(home / "dit.onnx.d")
