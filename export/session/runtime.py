"""ONNX Runtime itself, loaded when it is needed: its packages exclude one another."""

from __future__ import annotations

from typing import Any

import numpy as np

from calicache.graph_passes.common.arguments import of_kind
from calicache.graph_passes.common.errors import ExportError

OrtValue = Any  # of ONNX Runtime: a tensor on a device
# A name, or a name and the provider's own settings.
Provider = str | tuple[str, dict[str, Any]]


def onnx_runtime() -> Any:
    """The package `onnxruntime`.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(
            "onnxruntime",
            expected="ONNX Runtime",
            got=str(error),
            fix='Install one: pip install "calicache[cpu]", or "calicache[gpu]" for CUDA and '
            "TensorRT. To export without it, pass check=False and no precision.",
        ) from error
    return onnxruntime


def named_provider(provider: Provider) -> tuple[str, dict[str, Any]]:
    """A provider's name and its settings.

    Raises:
        ExportError: it is none, or this ONNX Runtime does not have it.
    """
    name, settings = (provider, {}) if isinstance(provider, str) else _pair(provider)
    valid = onnx_runtime().get_available_providers()
    if name not in valid:
        raise ExportError(
            "provider",
            expected=" | ".join(valid),
            got=repr(name),
            fix="Choose one of these, or install the onnxruntime package that has it.",
        )
    return name, settings


def _pair(provider: object) -> tuple[str, dict[str, Any]]:
    if not isinstance(provider, tuple | list) or len(provider) != 2:
        raise ExportError(
            "provider",
            expected="a name, or a name and settings",
            got=repr(provider),
            fix='Pass "CPUExecutionProvider", or ("CPUExecutionProvider", {}).',
        )
    name, settings = provider
    return str(name), of_kind("provider settings", settings, dict, ExportError)


def device_of(session: Any) -> str:
    """Where a session has its inputs, as IOBinding calls it; the host where it has no name for it.

    Args:
        session: of ONNX Runtime.
    """
    values = onnx_runtime().OrtValue
    for kind in dict.fromkeys(info.name.lower() for info in session.get_input_memory_infos()):
        if kind != "cpu":
            try:
                values.ortvalue_from_shape_and_type([1], np.float32, kind)
            except Exception:  # ONNX Runtime has no common base for its errors
                continue
            return str(kind)
    return "cpu"
