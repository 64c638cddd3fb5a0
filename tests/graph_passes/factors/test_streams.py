"""Second moments of increments against the plan's own anchors."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from model import FashionDiT
from support.analyses import PAPER, analysis_of, part, replaced, seen_by, targets_of
from support.models import STEPS, half_precision, modes, relative
from torch import Tensor, fx

from calicache.graph_passes import (
    CalibrationTarget,
    CapturedGraph,
    Granularity,
    Recording,
    StepMode,
)
from calicache.graph_passes.common.errors import ObserveError
from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.factors.observe import observe
from calicache.graph_passes.factors.statistics import SecondMoments, Statistics
from calicache.graph_passes.settings.choices import Weighting
from calicache.graph_passes.sites.analysis import Analysis

Values = dict[str, Tensor]
MEASURED = (Weighting.ACTIVATION, Weighting.INCREMENT)
REFRESH, CALIBRATE, REUSE, FORECAST = StepMode


def values_of(captured: CapturedGraph, recording: Recording, names: set[str]) -> list[Values]:
    """float64 rows (T, C) of some nodes in every call, as the plain graph has them."""
    seen = []
    for call in recording.calls:
        values: Values = {}
        environment = dict(
            zip(
                [node for node in captured.graph.nodes if node.op == "placeholder"],
                call.values(),
                strict=True,
            )
        )
        for node in captured.graph.nodes:
            if node.op == "get_attr":
                environment[node] = captured.attribute(str(node.target))
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg(
                    (node.args, dict(node.kwargs)), environment.__getitem__
                )
                with torch.no_grad():
                    environment[node] = node.target(*args, **kwargs)
            if node.name in names:
                values[node.name] = environment[node].double().flatten(0, -2)
        seen.append(values)
    return seen


def increment(run: list[Tensor], schedule: tuple[StepMode, ...], step: int, order: int) -> Tensor:
    """A value less the polynomial through its last order + 1 refreshes, solved exactly."""
    places = [k for k in range(step) if schedule[k] is REFRESH][-order - 1 :]
    anchor = torch.zeros_like(run[step])
    for place in places:
        weight = Fraction(1)
        for other in places:
            weight *= Fraction(step - other, place - other) if other != place else 1
        anchor += float(weight) * run[place]
    return run[step] - anchor


def expected_moments(
    captured: CapturedGraph,
    target: CalibrationTarget,
    runs: list[Recording],
    schedule: tuple[StepMode, ...],
    order: int,
) -> dict[str, Tensor]:
    """Mean outer products, and squared lengths, over all tokens of all CALIBRATE steps."""
    xs, ys = [], []
    for recording in runs:
        values = values_of(captured, recording, {target.input_node, *target.nodes})
        x = [step[target.input_node] for step in values]
        y = [torch.cat([step[name] for name in target.nodes], dim=-1) for step in values]
        for step in range(len(values)):
            if schedule[step] is CALIBRATE:
                xs.append(increment(x, schedule, step, order))
                ys.append(increment(y, schedule, step, order))
    dx, dy = torch.cat(xs), torch.cat(ys)
    if target.granularity is Granularity.BRANCH:
        energy = dy.square().sum(dim=1).mean()
        return {"input": dx.T @ dx / len(dx), "cross": dx.T @ dy / len(dx), "energy": energy}
    if sum(target.out_features) < target.in_features:
        return {"output": dy.T @ dy / len(dx)}
    return {"input": dx.T @ dx / len(dx)}


def assert_moments(got: Statistics, expected: dict[str, Tensor]) -> None:
    assert isinstance(got, SecondMoments)
    assert set(got.tensors()) == set(expected)
    for name, value in got.tensors().items():
        assert value.dtype == torch.float32
        assert value.device.type == "cpu"
        # Increments are float32 differences, up to 10 times smaller than the values (1e-6 of
        # an increment each); their products add up over some hundred tokens. Relative to the
        # largest entry, as the small ones are sums that cancel.
        atol = 1e-5 * float(expected[name].abs().max())
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=atol)


SCHEDULES = ["RCCRCC", "RRCRCC", "RRRCUC", "RCRURC", "RFCRRC"]


@pytest.mark.slow
@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_moments_are_those_of_the_increments_against_the_anchors(
    dit_analysis: Analysis,
    dit_recording: Recording,
    schedule: str,
    order: int,
    granularity: Granularity,
) -> None:
    captured, steps = dit_analysis.captured, modes(schedule)
    targets = targets_of(dit_analysis, 2, granularity=granularity, joint=True)
    got = observe(captured, targets, dit_recording, Weighting.COVARIANCE, steps, order)
    assert list(got) == [target.name for target in targets]
    for target in targets:
        expected = expected_moments(captured, target, [dit_recording], steps, order)
        assert_moments(got[target.name], expected)


def test_steps_that_nothing_looks_at_are_not_run(
    dit_analysis: Analysis, dit_recording: Recording
) -> None:
    """FORECAST steps need no statistics: values there may be anything, and change nothing."""
    targets = targets_of(dit_analysis, 2, joint=True)
    schedule = modes("RCFRFC")
    calls = [dict(call) for call in dit_recording.calls]
    for step in (2, 4):
        calls[step]["hidden_states"] = torch.full_like(calls[step]["hidden_states"], float("nan"))
    poisoned = Recording(calls, dit_recording.signature)
    plain, got = (
        observe(dit_analysis.captured, targets, recording, Weighting.COVARIANCE, schedule, 1)
        for recording in (dit_recording, poisoned)
    )
    for name, moments in plain.items():
        for key, value in moments.tensors().items():
            assert torch.equal(value, got[name].tensors()[key])
    with pytest.raises(ObserveError, match="NaN"):
        seen_by(dit_analysis, poisoned, Weighting.INCREMENT, schedule)


def test_moments_are_of_the_smaller_side(dit_analysis: Analysis, dit_recording: Recording) -> None:
    targets = targets_of(dit_analysis, 2, joint=True)
    got = observe(dit_analysis.captured, targets, dit_recording, Weighting.COVARIANCE, PAPER)
    shapes = {
        name.removeprefix("blocks.1."): {n: tuple(v.shape) for n, v in moments.tensors().items()}
        for name, moments in got.items()
        if name.startswith("blocks.1.")
    }
    assert shapes == {
        "attn.q+k+v": {"input": (32, 32)},
        "attn.proj": {"input": (32, 32)},
        "mlp.fc1": {"input": (32, 32)},
        "mlp.fc2": {"output": (32, 32)},
    }


@pytest.mark.parametrize("granularity", list(Granularity))
def test_moments_of_two_runs_are_the_mean_of_both(
    dit_analysis: Analysis,
    dit_recording: Recording,
    second_run: Recording,
    granularity: Granularity,
) -> None:
    captured, schedule = dit_analysis.captured, modes("RCRRCC")
    targets = targets_of(dit_analysis, 2, granularity=granularity, joint=True)
    short = part(second_run, 0, 1, 2, 3, 4)  # 2 CALIBRATE steps, where the first run has 3
    both = Recording([*dit_recording.calls, *short.calls], dit_recording.signature)
    assert [len(run) for run in both.runs] == [STEPS, 5]
    joint, first, second = (
        observe(captured, targets, recording, Weighting.COVARIANCE, schedule, 2)
        for recording in (both, dit_recording, short)
    )
    for target in targets:
        one, other = first[target.name].tensors(), second[target.name].tensors()
        for name, value in joint[target.name].tensors().items():
            expected = (3 * one[name].double() + 2 * other[name].double()) / 5
            # The same float64 sums; only the float32 results are rounded.
            atol = 3e-7 * float(expected.abs().max())
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=atol)
            assert relative(one[name], other[name]) > 1e-3
        runs = [dit_recording, short]
        assert_moments(joint[target.name], expected_moments(captured, target, runs, schedule, 2))


@pytest.mark.parametrize("weighting", list(Weighting))
def test_whole_branches_always_need_moments(
    dit_analysis: Analysis, dit_recording: Recording, weighting: Weighting
) -> None:
    targets = targets_of(dit_analysis, 2, granularity=Granularity.BRANCH)
    got = observe(dit_analysis.captured, targets, dit_recording, weighting, PAPER)
    names = [tuple(moments.tensors()) for moments in got.values()]
    assert names == [("input", "cross", "energy")] * 4


@pytest.mark.parametrize("weighting", list(Weighting))
def test_targets_of_rank_0_run_nothing(
    dit_analysis: Analysis, dit_recording: Recording, weighting: Weighting
) -> None:
    bad = torch.full((4, 1, 28, 28), math.nan)
    poisoned = replaced(dit_recording, 0, "hidden_states", bad)
    targets = targets_of(dit_analysis, 0, granularity=Granularity.BRANCH)
    assert observe(dit_analysis.captured, targets, poisoned, weighting, PAPER) == {}
    assert observe(dit_analysis.captured, (), poisoned, weighting, PAPER) == {}


@pytest.mark.parametrize("schedule", ["R", "RURFRU", "RRRRRC"])
def test_runs_without_a_calibrate_step_have_no_moments(
    dit_analysis: Analysis, dit_recording: Recording, schedule: str
) -> None:
    short = part(dit_recording, 0, 1, 2, 3, 4)  # the last step is never reached
    with pytest.raises(ObserveError) as caught:
        seen_by(dit_analysis, short, Weighting.COVARIANCE, modes(schedule))
    assert str(caught.value) == (
        "observe: recording: expected a run with a CALIBRATE step after a REFRESH step, "
        "got no increment. Record a whole sampler run."
    )


def test_steps_beyond_the_schedule_are_not_run(
    dit_analysis: Analysis, dit_recording: Recording, second_run: Recording
) -> None:
    both = Recording([*dit_recording.calls, *second_run.calls], dit_recording.signature)
    meter = Meter(0)
    got = seen_by(dit_analysis, both, Weighting.COVARIANCE, modes("RCC"), meter)
    assert meter.done == 6
    runs = [part(dit_recording, 0, 1, 2), part(second_run, 0, 1, 2)]
    targets = targets_of(dit_analysis, 1)
    expected = expected_moments(dit_analysis.captured, targets[0], runs, modes("RCC"), 0)
    assert_moments(got[targets[0].name], expected)


@pytest.mark.slow
def test_half_precision_increments_are_taken_in_float32(dit: FashionDiT) -> None:
    half, recording = half_precision(dit)
    analysis = analysis_of(half, recording)
    targets = targets_of(analysis, 2, joint=True)
    schedule = modes("RRC")
    got = observe(analysis.captured, targets, recording, Weighting.COVARIANCE, schedule, 1)
    for target in targets:
        # Differences in float16 would be off by 1e-3 and more.
        assert_moments(
            got[target.name], expected_moments(analysis.captured, target, [recording], schedule, 1)
        )
