"""How far an error reaches the output: against products of matrices, and against hooks."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from model import FashionDiT
from support.models import shake
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from calicache.graph_passes import (
    CapturedGraph,
    Granularity,
    Recording,
    Sites,
    classify_nodes,
    find_sites,
    record,
)
from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.graph.capture import capture
from calicache.graph_passes.search.sensitivity import BACK, sensitivities
from calicache.graph_passes.sites.targets import assign

WIDTH, STEPS = 6, 5
# float32 runs on both sides; sums of a few hundred squares.
RTOL = 1e-4

Subject = tuple[CapturedGraph, Sites, Recording]


def subject_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Subject:
    """The model seen over a few calls with noise."""
    shake(model, 0.3)
    draw = torch.Generator().manual_seed(3)
    with record(model.to(dtype)) as recording:
        for _ in range(STEPS):
            model(torch.randn(2, 5, WIDTH, generator=draw).to(dtype))
    return *_analysed(model, recording), recording


def _analysed(model: nn.Module, recording: Recording) -> tuple[CapturedGraph, Sites]:
    captured = capture(model, recording.signature)
    return captured, find_sites(captured, classify_nodes(captured, recording.dependence))


def gains_of(subject: Subject, *steps: int, joint: bool = False) -> dict[str, float]:
    captured, sites, recording = subject
    targets, _ = assign(captured, sites, rank=1, joint=joint)
    (run,) = recording.runs
    return sensitivities(captured, sites, targets, run, steps or (2, 4))


def share(change: Tensor | Sequence[Tensor], of: Tensor | Sequence[Tensor]) -> float:
    """|change|^2 / |of|^2."""

    def energy(value: Tensor | Sequence[Tensor]) -> float:
        values = [value] if isinstance(value, Tensor) else value
        return sum(float(part.double().square().sum()) for part in values)

    return energy(change) / energy(of)


def assert_gains(got: dict[str, float], expected: dict[str, float]) -> None:
    assert set(got) == set(expected)
    for name, gain in expected.items():
        assert math.isclose(got[name], gain, rel_tol=RTOL), name


# --- linear models: the effect can be written down ----------------------------------------------


class Two(nn.Module):
    """W1 and W2 of a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class Chain(nn.Module):
    """h + W h twice, with a layer on the stream between them, then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Two(), Two()
        self.between, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(x + self.first(x))
        return self.head(x + self.second(x))


def chain_gains(model: Chain, inputs: Sequence[Tensor], steps: Sequence[int]) -> dict[str, float]:
    """What every change makes of the output, by the weights alone."""
    first, second = model.first, model.second
    whole = second.down.weight @ second.up.weight  # (C, C)
    to_end = model.head.weight @ (torch.eye(WIDTH) + whole)
    moves: dict[str, list[Tensor]] = {}
    for step in steps:
        x = inputs[step - BACK] - inputs[step]  # biases cancel
        up = x @ first.up.weight.T
        moves.setdefault("first.up", []).append(up)
        moves.setdefault("first.down", []).append(up @ first.down.weight.T)
        x = (x + moves["first.down"][-1]) @ model.between.weight.T
        moves.setdefault("between", []).append(x)
        up = x @ second.up.weight.T
        moves.setdefault("second.up", []).append(up)
        moves.setdefault("second.down", []).append(up @ second.down.weight.T)

    def gain(name: str, matrix: Tensor) -> float:
        return share([move @ matrix.T for move in moves[name]], moves[name])

    branches = {
        "first": gain("first.down", to_end @ model.between.weight),
        "second": gain("second.down", model.head.weight),
    }
    return {
        **branches,
        "first.up": gain("first.up", first.down.weight) * branches["first"],
        "first.down": branches["first"],
        "between": gain("between", to_end),
        "second.up": gain("second.up", second.down.weight) * branches["second"],
        "second.down": branches["second"],
    }


@pytest.fixture(scope="module")
def chain() -> tuple[Chain, Subject]:
    torch.manual_seed(0)
    model = Chain()
    return model, subject_of(model)


@pytest.mark.parametrize("steps", [(2,), (2, 3, 4), (4,)])
def test_gains_of_a_linear_model_are_those_of_its_matrices(
    chain: tuple[Chain, Subject], steps: tuple[int, ...]
) -> None:
    model, subject = chain
    inputs = [next(iter(call.values())) for call in subject[2].calls]
    assert_gains(gains_of(subject, *steps), chain_gains(model, inputs, steps))


def test_every_measured_step_is_counted(chain: tuple[Chain, Subject]) -> None:
    captured, sites, recording = chain[1]
    meter = Meter(0)
    sensitivities(captured, sites, (), recording.runs[0], (2, 3, 4), meter)
    assert meter.done == 3


def test_branches_are_measured_without_any_target(chain: tuple[Chain, Subject]) -> None:
    captured, sites, recording = chain[1]
    got = sensitivities(captured, sites, (), recording.runs[0], (2, 4))
    both = gains_of(chain[1])
    assert got == {"first": both["first"], "second": both["second"]}


def test_graph_and_weights_are_left_alone(chain: tuple[Chain, Subject]) -> None:
    model, subject = chain
    before = {name: value.clone() for name, value in model.state_dict().items()}
    written = str(subject[0].graph)
    assert gains_of(subject) == gains_of(subject)  # to the bit
    assert str(subject[0].graph) == written
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Masked(Chain):
    """The output is read off the channels that the second branch does not write."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(x + self.first(x))
        return (x + (1 - self.mask) * self.second(x)) * self.mask


def test_branch_that_does_not_reach_the_output_counts_nothing() -> None:
    gains = gains_of(subject_of(Masked()))
    assert {name: gains[name] for name in ("second", "second.up", "second.down")} == {
        "second": 0.0,
        "second.up": 0.0,
        "second.down": 0.0,
    }
    assert all(gains[name] > 0 for name in ("first", "first.up", "first.down", "between"))


def test_value_that_does_not_move_counts_nothing(chain: tuple[Chain, Subject]) -> None:
    captured, sites, recording = chain[1]
    targets, _ = assign(captured, sites, rank=1)
    run = [recording.calls[0]] * STEPS
    gains = sensitivities(captured, sites, targets, run, (2, 3))
    assert set(gains.values()) == {0.0}


# --- several exits, siblings, names -------------------------------------------------------------


class Parallel(nn.Module):
    """Two layers on one norm, both added: one branch with two exits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.left, self.right = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n = F.layer_norm(x, (WIDTH,))
        return 2 * (x + self.left(n) + self.right(n))


def test_branch_with_several_exits_is_followed_from_all_of_them_at_once() -> None:
    model = Parallel()
    subject = subject_of(model)
    (branch,) = subject[1].branches
    assert len(branch.exits) == 2
    inputs = [next(iter(call.values())) for call in subject[2].calls]
    norms = [F.layer_norm(model.embed(x), (WIDTH,)) for x in inputs]
    moved = [norms[step - BACK] - norms[step] for step in (2, 4)]
    left, right = ([n @ w.weight.T for n in moved] for w in (model.left, model.right))
    both = share([2 * (a + b) for a, b in zip(left, right, strict=True)], [*left, *right])
    # One layer changes one exit by all that it is changed itself.
    apart = gains_of(subject)
    assert_gains(apart, {branch.name: both, "left": both, "right": both})
    assert_gains(gains_of(subject, joint=True), {branch.name: both, "left+right": both})


class Attention(nn.Module):
    """One head of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Blocks(nn.Module):
    """Residual attention and a residual layer that is a module of its own, nothing linear."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.single = Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(F.layer_norm(x, (WIDTH,)))
        return torch.tanh(x + self.single(F.silu(x)))


class Replayed:
    """Runs a model with the outputs of some modules set to those of another call."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model, self.names = model, names

    def _run(self, x: Tensor, hook: Callable[[str], Any]) -> Tensor:
        handles = [
            self.model.get_submodule(name).register_forward_hook(hook(name)) for name in self.names
        ]
        try:
            result = self.model(x)
        finally:
            for handle in handles:
                handle.remove()
        assert isinstance(result, Tensor)
        return result

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        """What the modules return."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            return lambda *call: seen.update({name: call[-1]})

        self._run(x, keep)
        return seen

    def change(self, x: Tensor, values: dict[str, Tensor]) -> Tensor:
        """Of the model's output, where the modules return these values."""
        return self._run(x, lambda name: lambda *_: values[name]) - self.model(x)


def hooked_gain(model: nn.Module, names: Sequence[str], inputs: Sequence[Tensor]) -> float:
    """|change of the model's output|^2 over |change of the modules'|^2."""
    replayed = Replayed(model, names)
    changes, moves = [], []
    for step in (2, 4):
        earlier, now = replayed.outputs(inputs[step - BACK]), replayed.outputs(inputs[step])
        changes.append(replayed.change(inputs[step], earlier))
        moves += [earlier[name] - now[name] for name in names]
    return share(changes, moves)


def test_gains_of_a_model_that_is_not_linear_are_those_of_hooks() -> None:
    model = Blocks()
    subject = subject_of(model)
    inputs = [next(iter(call.values())) for call in subject[2].calls]
    gains = gains_of(subject, joint=True)
    # The branch's exit is its last layer: one hook sets the whole of it.
    attention = hooked_gain(model, ["attn.proj"], inputs)
    single = hooked_gain(model, ["single"], inputs)
    inside = hooked_gain(model.attn, ["q", "k", "v"], [F.layer_norm(x, (WIDTH,)) for x in inputs])
    assert_gains(
        gains,
        {
            "attn": attention,
            "attn.proj": attention,
            "attn.q+k+v": inside * attention,
            "single": single,  # the branch and its only layer have one name
        },
    )


def test_halved_layer_of_a_branch_of_the_same_name_is_followed_through_it() -> None:
    class Halved(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x + 0.5 * self.single(F.silu(x)))

    model = Halved()
    subject = subject_of(model)
    assert [branch.name for branch in subject[1].branches] == ["single"]
    inputs = [next(iter(call.values())) for call in subject[2].calls]
    assert_gains(gains_of(subject), {"single": hooked_gain(model, ["single"], inputs)})


# --- the sample's architecture, and memory ------------------------------------------------------


@pytest.mark.slow
def test_all_branches_and_layers_of_a_dit_reach_its_output(
    dit: FashionDiT, dit_recording: Recording
) -> None:
    captured, sites = _analysed(dit, dit_recording)
    targets, _ = assign(captured, sites, rank=1, joint=True)
    gains = sensitivities(captured, sites, targets, dit_recording.runs[0], (2, 5))
    names = {target.name for target in targets} | {branch.name for branch in sites.branches}
    assert set(gains) == names
    assert all(math.isfinite(gain) and gain > 0 for gain in gains.values())
    # Whole branches given as targets change nothing: they are measured in any case.
    whole, _ = assign(captured, sites, rank=1, granularity=Granularity.BRANCH)
    assert {target.name for target in whole} <= names


def test_gains_of_a_float64_model_are_exact_to_its_digits() -> None:
    model = Blocks()
    subject = subject_of(model, torch.float64)
    inputs = [next(iter(call.values())) for call in subject[2].calls]
    gains = gains_of(subject)
    for name, layer in (("attn", "attn.proj"), ("single", "single")):
        # float64 all the way; sums of a few hundred squares.
        assert math.isclose(gains[name], hooked_gain(model, [layer], inputs), rel_tol=1e-12)


class Long(nn.Module):
    """Two branches with many values between their two layers, two of them used at once."""

    LENGTH = 40

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Two(), Two()

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.first, self.second):
            y = part.up(x)
            for _ in range(self.LENGTH):
                y = torch.sin(y) + y
            x = x + part.down(y)
        return x


class Alive(TorchDispatchMode):
    """Counts the tensors that operations have made and that something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.made = [ref for ref in self.made if ref() is not None]
            self.made.append(weakref.ref(result))
            self.most = max(self.most, len(self.made))
        return result


@pytest.mark.slow
def test_few_values_are_held() -> None:
    captured, sites, recording = subject_of(Long())
    nodes = len(captured.graph.nodes)
    targets, _ = assign(captured, sites, rank=1)
    watched = len(targets) + 1  # a branch's exit is its last layer; and the output
    with Alive() as alive:
        gains = sensitivities(captured, sites, targets, recording.runs[0], (2, 3, 4))
    assert set(gains) == {"first", "second", *(target.name for target in targets)}
    assert nodes > 160
    # Of five watched values those of this step, of an earlier one and of the one before that,
    # what is under way in two runs, and sums of squares: 27 when this was written.
    assert watched == 5
    assert alive.most <= 40, f"{alive.most} values held of {nodes} nodes"
