"""ONNX Runtime as it is installed: providers by its own names, or none at all and how to get it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from support.artifacts import exported

from calicache.export import Session, export_onnx, load_artifact
from calicache.export.session.runtime import device_of, named_provider, onnx_runtime
from calicache.graph_passes import OptimizedModel, optimize
from calicache.graph_passes.common.errors import ExportError

AVAILABLE = ort.get_available_providers()


@pytest.fixture(scope="module")
def fast(dit, dit_plan) -> OptimizedModel:
    return optimize(dit, dit_plan)


@pytest.fixture(scope="module")
def artifact(fast) -> Path:
    return exported(fast)


@pytest.mark.slow
@pytest.mark.parametrize("provider", AVAILABLE)
def test_every_provider_that_is_there_runs_steps(provider: str, artifact, dit_recording) -> None:
    expected = [Session(artifact).step(k, **call) for k, call in enumerate(dit_recording.calls[:1])]
    for form in (provider, (provider, {})):
        session = Session(artifact, provider=form)
        got = [session.step(k, **call) for k, call in enumerate(dit_recording.calls[:1])]
        # Other kernels may round in another order, and some to 11 bits.
        np.testing.assert_allclose(got, expected, rtol=0, atol=5e-3)


@pytest.mark.slow
def test_settings_reach_onnx_runtime(artifact, monkeypatch) -> None:
    """The providers that run everywhere have no settings that a session would tell."""
    seen = []

    def spy(*arguments: Any, providers: Any) -> ort.InferenceSession:
        seen.extend(providers)
        return InferenceSession(*arguments, providers=providers)

    InferenceSession = ort.InferenceSession
    monkeypatch.setattr(ort, "InferenceSession", spy)
    Session(artifact, provider=("CPUExecutionProvider", {"arena": "small"}))
    assert seen == [("CPUExecutionProvider", {"arena": "small"})]


def test_an_unknown_provider_is_refused_with_those_that_are_there() -> None:
    with pytest.raises(ExportError) as caught:
        named_provider("MoonExecutionProvider")
    assert caught.value.expected == " | ".join(AVAILABLE)
    assert "MoonExecutionProvider" in caught.value.got


@pytest.mark.parametrize("provider", [None, 3, ("CPUExecutionProvider",), ("a", "b", "c")])
def test_what_is_no_provider_is_refused(provider: Any) -> None:
    with pytest.raises(ExportError, match="a name, or a name and settings"):
        named_provider(provider)


def test_settings_are_a_dict() -> None:
    with pytest.raises(ExportError, match="provider settings: expected a value of the class dict"):
        named_provider(("CPUExecutionProvider", ["fast"]))


@pytest.mark.parametrize("name", ["Cpu", "Cuda", "CudaPinned", "Moon"])
def test_memory_that_cannot_be_bound_is_the_hosts(name: str) -> None:
    session = SimpleNamespace(get_input_memory_infos=lambda: [SimpleNamespace(name=name)])
    there = name == "Cuda" and "CUDAExecutionProvider" in AVAILABLE
    assert device_of(session) == ("cuda" if there else "cpu")


def test_the_package_loads_without_onnx_runtime() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "import calicache.export, calicache.tools.cli\n"
        "from calicache import Session, export_onnx\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_onnx_runtime_an_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"calicache\[cpu\].*calicache\[gpu\]"):
        onnx_runtime()


@pytest.mark.slow
def test_an_export_without_a_check_needs_no_onnx_runtime(fast, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    manifest = export_onnx(fast, tmp_path / "d", check=False)
    assert load_artifact(tmp_path / "d") == manifest
    with pytest.raises(ExportError, match="check=False"):
        export_onnx(fast, tmp_path / "e")
    assert not (tmp_path / "e").exists()
