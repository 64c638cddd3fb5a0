"""ONNX Runtime opening and running a model, with what it raises told in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calicache.export.artifact.manifest import Layout
from calicache.export.session.runtime import onnx_runtime
from calicache.graph_passes.common.errors import ExportError, RunError, reason_of


@contextmanager
def running(where: str) -> Iterator[None]:
    """What ONNX Runtime raises while it runs a model, in words.

    Args:
        where: what is run.

    Raises:
        RunError: it raised anything.
    """
    try:
        yield
    except Exception as error:  # ONNX Runtime has no common base for its errors
        raise RunError(
            where,
            expected="a model that ONNX Runtime can run with these inputs",
            got=reason_of(error),
            fix="Use another provider, export in another dtype, or use less memory.",
        ) from error


def check_cuda_graphs(layout: Layout, provider: str) -> None:
    """Refuse CUDA graphs where there are none.

    Raises:
        ExportError: of another layout or provider.
    """
    if layout is Layout.PAIR and provider == "CUDAExecutionProvider":
        return
    raise ExportError(
        "cuda_graphs",
        expected="layout pair on CUDAExecutionProvider",
        got=f"layout {layout.value} on {provider}",
        fix="Export with layout='pair', which has no control flow, or leave cuda_graphs off.",
    )


def open_model(
    file: Path,
    layout: Layout,
    provider: tuple[str, dict[str, Any]],
    options: Any,
) -> Any:
    """A model ready to run.

    Args:
        file: of the model.
        layout: of its artifact.
        provider: name and settings of an execution provider.
        options: SessionOptions of ONNX Runtime; None for the usual ones.

    Raises:
        ExportError: the provider cannot run it.
    """
    options = options or _default_options()
    try:
        return onnx_runtime().InferenceSession(file, options, providers=[provider])
    except Exception as error:  # ONNX Runtime has no common base for its errors
        control_flow = layout is not Layout.PAIR
        flat = ", or in the layout pair, which has no control flow" if control_flow else ""
        raise ExportError(
            f"provider {provider[0]}",
            expected="a model that it can run",
            got=str(error),
            fix=f"Use another provider, export in another dtype{flat}.",
        ) from error


def checking_options() -> Any:
    """SessionOptions for models that are opened and not run: their weights stay in the file.

    A session that is to run packs them anew for its kernels, which takes as much memory again.
    """
    options = onnx_runtime().SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _default_options() -> Any:
    options = onnx_runtime().SessionOptions()
    # Threads that go on spinning after a run would slow down the session of the next mode.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
