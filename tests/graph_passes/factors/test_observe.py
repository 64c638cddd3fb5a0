"""Recorded calls run through the graph: which are run, what is refused, the paper's shares."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from model import FashionDiT
from support.analyses import analysis_of, part, replaced, seen_by
from support.models import STEPS, diffusers_calls, half_precision, modes, relative, shake
from torch import Tensor, fx, nn

from calicache.graph_passes import (
    Recording,
    record,
)
from calicache.graph_passes.common.errors import ObserveError
from calicache.graph_passes.common.progress import Meter, Progress
from calicache.graph_passes.factors.statistics import ChannelStatistics
from calicache.graph_passes.settings.choices import Weighting
from calicache.graph_passes.sites.analysis import Analysis

MEASURED = (Weighting.ACTIVATION, Weighting.INCREMENT)
NAN_MESSAGE = (
    "observe: node {node}, recorded step {step}: expected finite activations, got NaN or Inf. "
    "Check the model's weights and dtype, and the recorded inputs."
)


def hooked(model: nn.Module, names: list[str], recording: Recording) -> dict[str, list[Tensor]]:
    """Inputs and outputs of layers over all steps, each stacked to (steps, B, N, C)."""
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in names}
    handles = []
    for name in names:

        def keep(_layer, args, output, name=name):
            seen[name][0].append(args[0])
            seen[name][1].append(output)

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        for call in recording.calls:
            model(**recording.signature.unflatten(list(call.values())))
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


@pytest.mark.slow
@pytest.mark.parametrize("weighting", MEASURED)
@pytest.mark.parametrize("which", ["dit", "diffusers"])
def test_streaming_statistics_equal_those_over_everything_at_once(
    which: str, weighting: Weighting, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue("dit" if which == "dit" else "diffusers_dit")
    recording = request.getfixturevalue(f"{which}_recording")
    analysis = analysis_of(model, recording)
    statistics = seen_by(analysis, recording, weighting)
    names = [site.name for site in analysis.sites.linears]
    assert list(statistics) == names
    for name, sides in hooked(model, names, recording).items():
        if weighting is Weighting.INCREMENT:
            sides = [side.diff(dim=0) for side in sides]
        x, y = (magnitude(side) for side in sides)
        # Values of 0 .. 1 from float32 activations, whose small differences cancel.
        assert_same(statistics[name], (x, y), atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", MEASURED)
def test_statistics_are_float32_shares_on_the_cpu(
    dit_analysis: Analysis, dit_recording: Recording, weighting: Weighting
) -> None:
    statistics = seen_by(dit_analysis, dit_recording, weighting)
    for site in dit_analysis.sites.linears:
        shares = statistics[site.name]
        assert (shares.input.shape, shares.output.shape) == (
            (site.in_features,),
            (site.out_features,),
        )
        for values in (shares.input, shares.output):
            assert values.dtype == torch.float32
            assert values.device.type == "cpu"
            assert 0.0 <= float(values.min()) < float(values.max()) <= 1.0


class Attended(nn.Module):
    """torch's own attention, whose last layer takes rows (N B, C), and a latent of no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x, x, x, need_weights=False)[0] if x.ndim == 3 else x
        return x + self.fc2(self.fc1(x).relu())


@pytest.mark.parametrize("weighting", MEASURED)
@pytest.mark.parametrize(
    ("shape", "name"), [((3, 5, 8), "attn.out_proj"), ((3, 8), "fc1"), ((3, 8), "fc2")]
)
def test_a_row_without_tokens_is_a_sample_of_one(
    weighting: Weighting, shape: tuple[int, ...], name: str
) -> None:
    model = shake(Attended(), 0.3)
    with record(model) as recording:
        for _ in range(STEPS):
            model(torch.randn(shape))
    analysis = analysis_of(model, recording)
    statistics = seen_by(analysis, recording, weighting)
    x, y = rows_of(analysis, recording, name)
    if weighting is Weighting.INCREMENT:
        x, y = x.diff(dim=0), y.diff(dim=0)
    # Values of 0 .. 1 from float32 activations, whose small differences cancel.
    assert_same(statistics[name], (magnitude(x), magnitude(y)), atol=2e-6)


def rows_of(analysis: Analysis, recording: Recording, name: str) -> tuple[Tensor, Tensor]:
    """What goes into a layer and comes out of it, (steps, rows, 1, C) in float64."""
    site = next(site for site in analysis.sites.linears if site.name == name)
    values: dict[str, list[Tensor]] = {site.input_node: [], site.node: []}

    class Seen(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in values:
                values[n.name].append(value)
            return value

    for call in recording.calls:
        with torch.no_grad():
            Seen(analysis.captured.module).run(*call.values())
    x, y = (torch.stack(values[node]).double()[:, :, None] for node in (site.input_node, site.node))
    return x, y


def test_increments_never_cross_from_one_run_to_the_next(
    dit_analysis: Analysis, dit_recording: Recording, second_run: Recording
) -> None:
    short = part(second_run, 0, 1, 2)
    both = Recording([*dit_recording.calls, *short.calls], dit_recording.signature)
    assert [len(run) for run in both.runs] == [STEPS, 3]
    joint, first, second = (
        seen_by(dit_analysis, recording, Weighting.INCREMENT)
        for recording in (both, dit_recording, short)
    )
    for name, statistics in joint.items():
        # 5 increments of the first run and 2 of the second.
        x = (5 * first[name].input + 2 * second[name].input) / 7
        y = (5 * first[name].output + 2 * second[name].output) / 7
        # A mean of the same float64 terms; only the float32 results are rounded.
        assert_same(statistics, (x, y), atol=3e-7)
    query = "blocks.0.attn.q"  # the runs differ, or the mean would say nothing
    assert relative(first[query].input, second[query].input) > 1e-3


def test_weighting_none_runs_nothing(dit_analysis: Analysis, dit_recording: Recording) -> None:
    bad = torch.full((4, 1, 28, 28), math.nan)
    poisoned = replaced(dit_recording, 0, "hidden_states", bad)
    meter = Meter(STEPS)
    assert seen_by(dit_analysis, poisoned, Weighting.NONE, meter=meter) == {}
    assert meter.done == 0


@pytest.mark.parametrize("weighting", [*MEASURED, Weighting.COVARIANCE])
def test_every_step_of_every_run_is_reported(
    dit_analysis: Analysis,
    dit_recording: Recording,
    second_run: Recording,
    weighting: Weighting,
) -> None:
    both = Recording([*dit_recording.calls, *second_run.calls], dit_recording.signature)
    seen: list[Progress] = []
    seen_by(dit_analysis, both, weighting, meter=Meter(2 * STEPS, seen.append))
    assert [progress.done for progress in seen] == list(range(1, 2 * STEPS + 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("step", [0, 1, 3, STEPS - 1])
@pytest.mark.parametrize("weighting", [*MEASURED, Weighting.COVARIANCE])
def test_bad_input_names_the_first_node_and_the_step(
    dit_analysis: Analysis,
    dit_recording: Recording,
    weighting: Weighting,
    step: int,
    bad: float,
) -> None:
    images = dit_recording.calls[step]["hidden_states"].clone()
    images[2, 0, 5, 5] = bad
    poisoned = replaced(dit_recording, step, "hidden_states", images)
    with pytest.raises(ObserveError) as caught:
        seen_by(dit_analysis, poisoned, weighting)
    node = dit_analysis.sites.linears[0].input_node
    assert str(caught.value) == NAN_MESSAGE.format(node=node, step=step)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", [*MEASURED, Weighting.COVARIANCE])
def test_bad_weight_names_the_first_node_it_reaches(
    dit: FashionDiT, dit_recording: Recording, weighting: Weighting
) -> None:
    broken = FashionDiT(dit.config).eval()
    broken.load_state_dict(dit.state_dict())
    with torch.no_grad():
        broken.blocks[1].mlp.fc1.weight[3, 3] = math.nan
    analysis = analysis_of(broken, dit_recording)
    node = next(site.node for site in analysis.sites.linears if site.name == "blocks.1.mlp.fc1")
    with pytest.raises(ObserveError) as caught:
        seen_by(analysis, dit_recording, weighting)
    assert str(caught.value) == NAN_MESSAGE.format(node=node, step=0)


def test_runs_of_one_step_have_no_increment(
    dit_analysis: Analysis, dit_recording: Recording
) -> None:
    single = part(dit_recording, 0)
    with pytest.raises(ObserveError) as caught:
        seen_by(dit_analysis, single, Weighting.INCREMENT)
    assert str(caught.value) == (
        "observe: recording: expected a run of at least 2 steps, got no increment. "
        "Record a whole sampler run."
    )
    assert len(seen_by(dit_analysis, single, Weighting.ACTIVATION)) == 12


@pytest.mark.slow
@pytest.mark.parametrize("weighting", MEASURED)
def test_half_precision_model_is_accumulated_in_float64(
    dit: FashionDiT, weighting: Weighting
) -> None:
    half, recording = half_precision(dit)
    analysis = analysis_of(half, recording)
    statistics = seen_by(analysis, recording, weighting)
    names = [site.name for site in analysis.sites.linears]
    for name, sides in hooked(half, names, recording).items():
        if weighting is Weighting.INCREMENT:
            sides = [side.diff(dim=0) for side in sides]
        # From the float16 values on, all is float64; differences or sums in float16 are off
        # by 1e-4 and more.
        assert_same(statistics[name], (magnitude(sides[0]), magnitude(sides[1])), atol=1e-6)


@pytest.mark.slow
def test_observing_a_diffusers_model_leaves_no_hook_and_no_change(
    diffusers_dit: DiTTransformer2DModel,
    diffusers_recording: Recording,
    diffusers_analysis: Analysis,
) -> None:
    before = diffusers_calls(diffusers_dit, steps=2)
    for weighting in (Weighting.INCREMENT, Weighting.COVARIANCE):
        seen_by(diffusers_analysis, diffusers_recording, weighting)
    after = diffusers_calls(diffusers_dit, steps=2)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


class Loud(nn.Module):
    """A residual branch on a stream so large that its sum is no float32 number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            self.first.weight *= 1e-38

    def forward(self, x: Tensor) -> Tensor:
        stream = 1e38 * (1 + x.abs().clamp(max=1.0))
        return stream + self.second(torch.tanh(self.first(stream)))


def test_large_values_are_no_bad_ones() -> None:
    model = Loud().eval()
    with record(model) as recording, torch.no_grad():
        for _ in range(2):
            x = torch.randn(2, 5, 8)
            model(x)
    stream = 1e38 * (1 + x.abs().clamp(max=1.0))
    assert stream.isfinite().all()
    assert stream.sum().isinf()
    analysis = analysis_of(model, recording)
    by_name = seen_by(analysis, recording, Weighting.ACTIVATION, modes("RC"))
    for name in ("first", "second"):
        statistics = by_name[name]
        assert isinstance(statistics, ChannelStatistics)
        assert statistics.input.isfinite().all()
        assert float(statistics.input.max()) > 0
