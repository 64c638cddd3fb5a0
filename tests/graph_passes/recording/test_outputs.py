"""What the model returned is part of a recording: nothing that was computed is computed again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from model import FashionDiT
from support.models import STEPS, sample_dit
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calicache.graph_passes import Plan
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.recording.recorder import record
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.timestep import Call
from calicache.graph_passes.sampler import recover

TIMES = (9.0, 5.0, 1.0)


class Doubled(nn.Module):
    """Gives its input twofold, a tensor first of all."""

    def forward(self, x: Tensor, timestep: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        if float(timestep[0]) < 0:
            raise RuntimeError("no such time")
        return 2 * sign * x, timestep


def recorded(signs: Sequence[float] = (1.0,), runs: int = 1) -> Recording:
    """Runs over `TIMES` in which a step calls once for every sign."""
    model = Doubled()
    with record(model) as recording:
        for _ in range(runs):
            for time in TIMES:
                x = torch.randn(2, 3)
                for sign in signs:
                    model(x, torch.full((2,), time), sign=torch.full((2, 1), sign))
            recording.finish(torch.zeros(2, 3))
    return recording


def expected(recording: Recording) -> list[list[Tensor]]:
    return [[2 * call["sign"] * call["x"] for call in run] for run in recording.runs]


def assert_outputs(recording: Recording) -> None:
    pairs = zip(recording.run_outputs, expected(recording), strict=True)
    for known, wanted in pairs:
        assert len(known) == len(wanted)
        for one, other in zip(known, wanted, strict=True):
            assert one is not None
            assert torch.equal(one, other)


@pytest.mark.parametrize("signs", [(1.0,), (1.0, -1.0)])
@pytest.mark.parametrize("way", ["as it is", "loaded", "by step", "runs taken", "first calls"])
def test_every_call_has_its_own(signs: tuple[float, ...], way: str, tmp_path: Path) -> None:
    recording = recorded(signs, runs=2)
    assert recording.calls_per_step == len(signs)
    if way == "loaded":
        recording.save(tmp_path / "runs")
        recording = Recording.load(tmp_path / "runs")
    elif way == "by step":
        recording = recording.by_step()
        assert recording.calls[0]["x"].shape == (2 * len(signs), 3)
    elif way == "runs taken":
        recording = recording.by_step().take_runs([1, 0, 1])
        recording.save(tmp_path / "twice")
        recording = Recording.load(tmp_path / "twice")
    elif way == "first calls":
        recording = recording.first_calls()
        assert all(float(call["sign"].mean()) == 1.0 for call in recording.calls)
    assert_outputs(recording)


def test_a_call_that_failed_has_none() -> None:
    model = Doubled()
    sign = torch.ones(2, 1)
    with record(model) as recording:
        with pytest.raises(RuntimeError, match="no such time"):
            model(torch.ones(2, 3), torch.full((2,), -1.0), sign)
        model(torch.ones(2, 3), torch.full((2,), 9.0), sign)
    assert list(recording.outputs) == [1]


def test_a_model_that_returns_no_tensor_first_has_none() -> None:
    class Words(nn.Module):
        def forward(self, x: Tensor) -> tuple[str, Tensor]:
            return "x", x

    model = Words()
    with record(model) as recording:
        model(torch.ones(2))
    assert not recording.outputs


def test_what_the_caller_writes_to_afterwards_is_not_kept() -> None:
    model = Doubled()
    with record(model) as recording:
        output, _ = model(torch.ones(2, 3), torch.full((2,), 9.0), torch.ones(2, 1))
        output.zero_()
    assert torch.equal(recording.outputs[0], torch.full((2, 3), 2.0))


@dataclass
class Output:
    """As diffusers' models return theirs."""

    sample: Tensor


pytree.register_dataclass(Output)


def test_the_field_of_an_output_object_counts() -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Output:
            return Output(-x)

    model = Wrapped()
    with record(model) as recording:
        model(torch.ones(2))
    assert torch.equal(recording.outputs[0], -torch.ones(2))


@pytest.fixture
def plain_calls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One for every call of the plain model."""
    calls: list[None] = []
    run_plain = recover.run_plain

    def counted(captured: CapturedGraph, call: Call) -> Tensor:
        calls.append(None)
        return run_plain(captured, call)

    monkeypatch.setattr(recover, "run_plain", counted)
    return calls


def test_a_plan_is_fitted_to_the_recorded_outputs(dit: FashionDiT, plain_calls: list[None]) -> None:
    with record(dit) as recording:
        recording.finish(sample_dit(dit, seed=1))
    without = Recording(recording.calls, recording.signature, recording.results)
    expected = Plan.from_trajectory(dit, without, schedule=3, rank=4)
    assert len(plain_calls) == STEPS
    plan = Plan.from_trajectory(dit, recording, schedule=3, rank=4)
    assert len(plain_calls) == STEPS + 1  # to see that it is the recorded model
    # Fitted to outputs that were summed in another order: float32 through least squares.
    torch.testing.assert_close(
        torch.tensor(plan.recipe.output_weights),
        torch.tensor(expected.recipe.output_weights),
        rtol=1e-2,
        atol=1e-4,
    )


def test_outputs_of_other_weights_do_not_count(dit: FashionDiT, plain_calls: list[None]) -> None:
    """Then the latents are not what the sampler makes of the model's own outputs."""
    with record(dit) as recording:
        recording.finish(sample_dit(dit, seed=1))
    other = copy.deepcopy(dit)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    plan = Plan.from_trajectory(other, recording, schedule=3, rank=4)
    assert len(plain_calls) == STEPS + 1
    assert plan.recipe.output_weights is None
    assert "no fixed weighted sum" in plan.recipe.correction
