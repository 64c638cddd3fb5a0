from __future__ import annotations

import math

import pytest
import torch
from conftest import STEPS, diffusers_calls, relative, sample_dit
from diffusers import DiTTransformer2DModel
from model import FashionDiT
from torch import Tensor, nn

from calicache.graph_passes import (
    CapturedGraph,
    Sites,
    Trajectory,
    capture,
    find_sites,
    observe,
    record,
)
from calicache.graph_passes.decompose import ChannelStatistics, Weighting
from calicache.graph_passes.dependence import classify_inputs, classify_nodes
from calicache.graph_passes.errors import ObserveError

MEASURED = (Weighting.ACTIVATION, Weighting.INCREMENT)
NAN_MESSAGE = (
    "observe: node {node}, recorded step {step}: expected finite activations, got NaN or Inf. "
    "Check the model's weights and dtype, and the recorded inputs."
)


def find(model: nn.Module, trajectory: Trajectory) -> tuple[CapturedGraph, Sites]:
    captured = capture(model, trajectory.signature)
    return captured, find_sites(captured, classify_nodes(captured, classify_inputs(trajectory)))


def part(trajectory: Trajectory, *indices: int) -> Trajectory:
    return Trajectory([trajectory.calls[k] for k in indices], trajectory.signatures)


def replaced(trajectory: Trajectory, step: int, name: str, value: Tensor) -> Trajectory:
    calls = list(trajectory.calls)
    calls[step] = {**calls[step], name: value}
    return Trajectory(calls, trajectory.signatures)


@pytest.fixture(scope="module")
def dit_found(dit: FashionDiT, dit_trajectory: Trajectory) -> tuple[CapturedGraph, Sites]:
    return find(dit, dit_trajectory)


@pytest.fixture(scope="module")
def second_run(dit: FashionDiT) -> Trajectory:
    with record(dit) as trajectory:
        sample_dit(dit, seed=2)
    return trajectory


def hooked(model: nn.Module, names: list[str], trajectory: Trajectory) -> dict[str, list[Tensor]]:
    """Inputs and outputs of layers over all steps, each stacked to (steps, B, N, C)."""
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in names}
    handles = []
    for name in names:

        def keep(_layer, args, output, name=name):
            seen[name][0].append(args[0])
            seen[name][1].append(output)

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        for call in trajectory.calls:
            model(**trajectory.signature.unflatten(list(call.values())))
    for handle in handles:
        handle.remove()
    return {name: [torch.stack(side).double() for side in both] for name, both in seen.items()}


def magnitude(values: Tensor) -> Tensor:
    """(steps, B, N, C) to (C,): all samples in one batch."""
    mean = values.abs().mean(dim=2).flatten(0, 1)
    low, high = mean.min(dim=1).values[:, None], mean.max(dim=1).values[:, None]
    return ((mean - low) / (high - low + 1e-6)).mean(dim=0)


def assert_same(got: ChannelStatistics, expected: tuple[Tensor, Tensor], *, atol: float) -> None:
    for one, other in zip((got.input, got.output), expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("weighting", MEASURED)
@pytest.mark.parametrize("which", ["dit", "diffusers"])
def test_streaming_statistics_equal_those_over_everything_at_once(
    which: str, weighting: Weighting, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue("dit" if which == "dit" else "diffusers_dit")
    trajectory = request.getfixturevalue(f"{which}_trajectory")
    captured, sites = find(model, trajectory)
    statistics = observe(captured, sites, trajectory, weighting)
    names = [site.name for site in sites.linears]
    assert list(statistics) == names
    for name, sides in hooked(model, names, trajectory).items():
        if weighting is Weighting.INCREMENT:
            sides = [side.diff(dim=0) for side in sides]
        x, y = (magnitude(side) for side in sides)
        # Values of 0 .. 1 from float32 activations, whose small differences cancel.
        assert_same(statistics[name], (x, y), atol=2e-6)


@pytest.mark.parametrize("weighting", MEASURED)
def test_statistics_are_float32_shares_on_the_cpu(
    dit_found: tuple[CapturedGraph, Sites], dit_trajectory: Trajectory, weighting: Weighting
) -> None:
    captured, sites = dit_found
    statistics = observe(captured, sites, dit_trajectory, weighting)
    for site in sites.linears:
        found = statistics[site.name]
        assert (found.input.shape, found.output.shape) == (
            (site.in_features,),
            (site.out_features,),
        )
        for values in (found.input, found.output):
            assert values.dtype == torch.float32
            assert values.device.type == "cpu"
            assert 0.0 <= float(values.min()) < float(values.max()) <= 1.0


def test_increments_never_cross_from_one_run_to_the_next(
    dit_found: tuple[CapturedGraph, Sites], dit_trajectory: Trajectory, second_run: Trajectory
) -> None:
    captured, sites = dit_found
    short = part(second_run, 0, 1, 2)
    both = Trajectory([*dit_trajectory.calls, *short.calls], dit_trajectory.signatures)
    assert [len(run) for run in both.runs] == [STEPS, 3]
    joint, first, second = (
        observe(captured, sites, trajectory, Weighting.INCREMENT)
        for trajectory in (both, dit_trajectory, short)
    )
    for name, statistics in joint.items():
        # 5 increments of the first run and 2 of the second.
        x = (5 * first[name].input + 2 * second[name].input) / 7
        y = (5 * first[name].output + 2 * second[name].output) / 7
        # A mean of the same float64 terms; only the float32 results are rounded.
        assert_same(statistics, (x, y), atol=3e-7)
    query = "blocks.0.attn.q"  # the runs differ, or the mean would say nothing
    assert relative(first[query].input, second[query].input) > 1e-3


def test_weighting_none_runs_nothing(
    dit_found: tuple[CapturedGraph, Sites], dit_trajectory: Trajectory
) -> None:
    bad = torch.full((4, 1, 28, 28), math.nan)
    poisoned = replaced(dit_trajectory, 0, "hidden_states", bad)
    seen: list[tuple[int, int]] = []
    statistics = observe(
        *dit_found, poisoned, Weighting.NONE, lambda done, total: seen.append((done, total))
    )
    assert statistics == {}
    assert seen == []


@pytest.mark.parametrize("weighting", MEASURED)
def test_every_step_of_every_run_is_reported(
    dit_found: tuple[CapturedGraph, Sites],
    dit_trajectory: Trajectory,
    second_run: Trajectory,
    weighting: Weighting,
) -> None:
    both = Trajectory([*dit_trajectory.calls, *second_run.calls], dit_trajectory.signatures)
    seen: list[tuple[int, int]] = []
    observe(*dit_found, both, weighting, lambda done, total: seen.append((done, total)))
    assert seen == [(k, 2 * STEPS) for k in range(1, 2 * STEPS + 1)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("step", [0, 1, 3, STEPS - 1])
@pytest.mark.parametrize("weighting", MEASURED)
def test_bad_input_names_the_first_node_and_the_step(
    dit_found: tuple[CapturedGraph, Sites],
    dit_trajectory: Trajectory,
    weighting: Weighting,
    step: int,
    bad: float,
) -> None:
    images = dit_trajectory.calls[step]["hidden_states"].clone()
    images[2, 0, 5, 5] = bad
    poisoned = replaced(dit_trajectory, step, "hidden_states", images)
    captured, sites = dit_found
    with pytest.raises(ObserveError) as caught:
        observe(captured, sites, poisoned, weighting)
    assert str(caught.value) == NAN_MESSAGE.format(node=sites.linears[0].input_node, step=step)


@pytest.mark.parametrize("weighting", MEASURED)
def test_bad_weight_names_the_first_node_it_reaches(
    dit: FashionDiT, dit_trajectory: Trajectory, weighting: Weighting
) -> None:
    broken = FashionDiT(dit.config).eval()
    broken.load_state_dict(dit.state_dict())
    with torch.no_grad():
        broken.blocks[1].mlp.fc1.weight[3, 3] = math.nan
    captured, sites = find(broken, dit_trajectory)
    node = next(site.node for site in sites.linears if site.name == "blocks.1.mlp.fc1")
    with pytest.raises(ObserveError) as caught:
        observe(captured, sites, dit_trajectory, weighting)
    assert str(caught.value) == NAN_MESSAGE.format(node=node, step=0)


def test_runs_of_one_step_have_no_increment(
    dit_found: tuple[CapturedGraph, Sites], dit_trajectory: Trajectory
) -> None:
    single = part(dit_trajectory, 0)
    with pytest.raises(ObserveError) as caught:
        observe(*dit_found, single, Weighting.INCREMENT)
    assert str(caught.value) == (
        "observe: trajectory: expected a run of at least 2 steps, got no increment. "
        "Record a whole sampler run."
    )
    assert len(observe(*dit_found, single, Weighting.ACTIVATION)) == 12


@pytest.mark.parametrize("weighting", MEASURED)
def test_half_precision_model_is_accumulated_in_float64(
    dit: FashionDiT, weighting: Weighting
) -> None:
    half = FashionDiT(dit.config).eval()
    half.load_state_dict(dit.state_dict())
    half.half()
    images = torch.randn(4, 1, 28, 28).half()
    with record(half) as trajectory, torch.no_grad():
        for now in (900, 600, 300):
            images = images - 0.2 * half(images, torch.full((4,), now), torch.arange(4))
    captured, sites = find(half, trajectory)
    statistics = observe(captured, sites, trajectory, weighting)
    names = [site.name for site in sites.linears]
    for name, sides in hooked(half, names, trajectory).items():
        if weighting is Weighting.INCREMENT:
            sides = [side.diff(dim=0) for side in sides]
        # From the float16 values on, all is float64; differences or sums in float16 are off
        # by 1e-4 and more.
        assert_same(statistics[name], (magnitude(sides[0]), magnitude(sides[1])), atol=1e-6)


def test_observing_a_diffusers_model_leaves_no_hook_and_no_change(
    diffusers_dit: DiTTransformer2DModel, diffusers_trajectory: Trajectory
) -> None:
    before = diffusers_calls(diffusers_dit, steps=2)
    observe(*find(diffusers_dit, diffusers_trajectory), diffusers_trajectory, Weighting.INCREMENT)
    after = diffusers_calls(diffusers_dit, steps=2)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
