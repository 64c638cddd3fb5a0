"""The same artifacts on CUDAExecutionProvider: agreement, caches on the device, CUDA graphs."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from diffusion import GuidedDDIM
from model import FashionDiT, FashionDiTConfig
from support.artifacts import kept_refreshes
from support.models import STEPS, relative, sample_dit, shake

from calicache.export import Session, export_onnx, read_sampler
from calicache.graph_passes import Plan, StepMode, optimize, record

CUDA = "CUDAExecutionProvider"
# CUDA GEMMs round to TF32 (2^-11 = 5e-4) a few layers deep.
SAME = 5e-3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        CUDA not in ort.get_available_providers(),
        reason=f"this onnxruntime has no {CUDA}: install onnxruntime-gpu",
    ),
]


@pytest.fixture(scope="module")
def fast(dit, forecast_plan):
    """All modes, order 2, output weights."""
    return optimize(dit, forecast_plan)


def run(session: Session, calls: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.from_numpy(session.step(k, **call)) for k, call in enumerate(calls)]


@pytest.mark.parametrize("layout", ["step", "pair"])
def test_steps_agree_with_torch_and_caches_stay_on_the_device(
    layout: str, fast, dit_recording, tmp_path
) -> None:
    export_onnx(fast, tmp_path / "d", layout=layout)
    session = Session(tmp_path / "d", provider=CUDA)
    fast.reset()
    for got, call in zip(run(session, dit_recording.calls), dit_recording.calls, strict=True):
        assert relative(got, fast(**call)) < SAME
    kept = [value for caches in kept_refreshes(session) for value in caches.values()]
    assert {value.device_name() for value in kept} == {"cuda"}


def test_sampler_agrees_with_torch(dit, fast, tmp_path) -> None:
    with record(dit) as recording:
        recording.finish(sample_dit(dit))
    export_onnx(fast, tmp_path / "d", layout="sampler", sampler=read_sampler(fast, recording))
    noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([4, 7, 10, 10])
    got = Session(tmp_path / "d", provider=CUDA).sample(noise, class_labels=labels)
    fast.reset()
    expected = GuidedDDIM(STEPS, 1.5, 10).sample(fast, noise, labels[:2])
    assert relative(torch.from_numpy(got), expected) < SAME


def test_cuda_graphs_replay_what_the_plain_session_runs(fast, dit_recording, tmp_path) -> None:
    export_onnx(fast, tmp_path / "d", layout="pair")
    plain, captured = (
        Session(tmp_path / "d", provider=CUDA),
        Session(tmp_path / "d", provider=CUDA, cuda_graphs=True),
    )
    expected = run(plain, dit_recording.calls)
    counts = []
    for _ in range(4):  # allocate, capture, replay, replay
        got = run(captured, dit_recording.calls)
        # The same kernels on the same values; CUDA sums in an order of its own.
        assert all(relative(a, b) < 1e-5 for a, b in zip(got, expected, strict=True))
        counts.append(len(captured._graphs))
    assert counts[1] == counts[2] == counts[3] == STEPS


def test_float16_agrees_with_float32(tmp_path) -> None:
    torch.manual_seed(0)
    model = shake(FashionDiT(FashionDiTConfig(width=32, depth=2, frequency_channels=32))).half()
    with record(model) as recording:
        sample_dit(lambda **inputs: model(**{k: _half(v) for k, v in inputs.items()}).float())
    plan = Plan.from_trajectory(model, recording, schedule=3, rank=4)
    export_onnx(optimize(model, plan), tmp_path / "d", layout="pair")
    session, exact = Session(tmp_path / "d", provider=CUDA), model.float()
    for step, call in enumerate(recording.calls):
        got = torch.from_numpy(session.step(step, **call).astype(np.float32))
        if plan.schedule[step] is StepMode.REFRESH:
            wide = {k: v.float() if v.is_floating_point() else v for k, v in call.items()}
            # float16 has 11 bits (5e-4), a few layers deep.
            assert relative(got, exact(**wide)) < 2e-2


def _half(value: torch.Tensor) -> torch.Tensor:
    return value.half() if value.is_floating_point() else value
