"""The machine and the versions that figures were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("calicache", "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy")

Environment = Mapping[str, Mapping[str, str | int]]


def environment() -> dict[str, dict[str, str | int]]:
    """`machine` and `versions`, for the head of a JSON file with measurements."""
    versions: dict[str, str | int] = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # one ONNX Runtime excludes the other
            versions[name] = version(name)
    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count() or 1,
            "threads": torch.get_num_threads(),
        },
        "versions": {"python": platform.python_version(), **versions},
    }


def _processor() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
