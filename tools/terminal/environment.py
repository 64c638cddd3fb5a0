"""The machine and the versions that figures were measured on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("calicache", "torch", "onnx", "onnxruntime", "numpy")


def environment() -> dict[str, dict[str, str | int]]:
    """`machine` and `versions`, for the head of a JSON file with measurements."""
    versions: dict[str, str | int] = {name: version(name) for name in PACKAGES}
    return {
        "machine": {"processor": cpu_name(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **versions},
    }


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
