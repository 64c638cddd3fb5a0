"""Exports that are opened before they take their place, and arguments that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from support.models import relative, shake
from support.small.subjects import small_model, small_plan, small_runs
from torch import Tensor, nn

from calicache.export import Session, export_onnx, load_artifact, measure_latency, read_sampler
from calicache.export.lowerings import attention
from calicache.graph_passes import OptimizedModel, Plan, optimize, record
from calicache.graph_passes.common.errors import ArtifactError, CalicacheError, ExportError

pytestmark = pytest.mark.slow


class Attended(nn.Module):
    """Attention alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)[:, None]
        return x + self.o(F.scaled_dot_product_attention(q, q, q)[:, 0])


def attended(dtype: torch.dtype) -> OptimizedModel:
    model = shake(Attended()).to(dtype)
    with record(model) as recording, torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 5, 7, dtype=dtype))
    return optimize(model, Plan.from_trajectory(model, recording, rank=2, order=0, correct=False))


@pytest.fixture(scope="module")
def fast() -> OptimizedModel:
    model = small_model()
    return optimize(model, small_plan(model, small_runs(model)))


def test_a_model_that_is_not_valid_is_refused_and_leaves_what_was_there(
    fast: OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float64 in an operator that is not defined for it, which nothing but the operator tells."""
    before = export_onnx(fast, tmp_path / "d")
    monkeypatch.setattr(attention, "KERNELS", (torch.float64,))
    with pytest.raises(ExportError, match=r"expected a model that it can run.*MultiHeadAttention"):
        export_onnx(attended(torch.float64), tmp_path / "d")
    assert load_artifact(tmp_path / "d") == before
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_without_the_check_it_is_written_and_a_session_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "KERNELS", (torch.float64,))
    export_onnx(attended(torch.float64), tmp_path / "d", check=False)
    with pytest.raises(ExportError, match="MultiHeadAttention"):
        Session(tmp_path / "d")


def test_a_kernel_that_the_cpu_has_not_is_no_reason_to_refuse(tmp_path: Path) -> None:
    export_onnx(attended(torch.bfloat16), tmp_path / "d")
    onnx.checker.check_model(tmp_path / "d" / "model.onnx", full_check=True)
    with pytest.raises(ExportError, match="CPUExecutionProvider"):
        Session(tmp_path / "d")


def test_a_model_of_small_tensors_alone_has_no_file_of_weights(tmp_path: Path) -> None:
    fast = attended(torch.float32)
    manifest = export_onnx(fast, tmp_path / "d")
    assert "weights.bin" not in {record.name for record in manifest.files}
    x = torch.randn(2, 5, 7)
    with torch.no_grad():
        # The same products of 8 terms in another order.
        assert relative(torch.from_numpy(Session(tmp_path / "d").step(0, x=x)), fast(x)) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimized": "model"}, "optimized: expected a value of the class OptimizedModel"),
        ({"path": 3}, "path: expected a path as text"),
        ({"layout": "whole"}, r"layout: expected step \| pair \| sampler, got 'whole'"),
        ({"layout": ["step"]}, r"layout: expected step \| pair \| sampler, got \['step'\]"),
        ({"layout": None}, r"layout: expected step \| pair \| sampler, got None"),
        ({"layout": "sampler", "sampler": 3}, "sampler: expected a value of the class Sampler"),
    ],
)
def test_wrong_arguments_of_an_export_are_refused(
    fast: OptimizedModel, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    arguments = {"optimized": fast, "path": tmp_path / "d"} | change
    with pytest.raises(ExportError, match=f"^export: {message}"):
        export_onnx(**arguments)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "change",
    [
        {"model": "model"},
        {"recording": "recording"},
        {"order": "1"},
        {"ranks": 4},
        {"ranks": (2.5,)},
        {"repeats": "7"},
        {"path": 3},
        {"provider": None},
        {"on_progress": 3},
    ],
    ids=str,
)
def test_wrong_arguments_of_a_measurement_are_refused(change: dict[str, Any]) -> None:
    model = small_model()
    arguments = {"model": model, "recording": small_runs(model), "repeats": 1} | change
    with pytest.raises(CalicacheError) as caught:
        measure_latency(**arguments)
    assert next(iter(change)) in caught.value.where


@pytest.mark.parametrize("wrong", ["optimized", "recording"])
def test_wrong_arguments_of_reading_a_sampler_are_refused(fast: OptimizedModel, wrong: str) -> None:
    arguments: dict[str, Any] = {"optimized": fast, "recording": small_runs(small_model())}
    with pytest.raises(ExportError, match=f"^export: {wrong}: expected a value of the class"):
        read_sampler(**arguments | {wrong: 3})


@pytest.mark.parametrize("path", [3, None, "a\0b"])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(ArtifactError, match=r"^artifact: path: expected a path as text"):
        load_artifact(path)
