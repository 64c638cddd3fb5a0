"""Joint attention: one branch over two streams, nested branches, and what their modes compute."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import shake
from support.toys import CHANNELS, classified, left_without
from torch import Tensor, nn
from torch.nn import functional as F

from calicache.graph_passes import (
    Granularity,
    Plan,
    SiteMode,
    SiteRule,
    StepMode,
    optimize,
    record,
    uniform_schedule,
)
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.operations import LINEAR
from calicache.graph_passes.graph.surgery import module_path
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.rewriting.insertion import cache_name
from calicache.graph_passes.sites.branches import ResidualBranch, find_branches

# --- joint attention over two streams -----------------------------------------------------------


class JointAttention(nn.Module):
    """One attention over text and image tokens, with projections of their own."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "out"):
            setattr(self, name, nn.Linear(CHANNELS, CHANNELS))
            setattr(self, f"text_{name}", nn.Linear(CHANNELS, CHANNELS))

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        x, text = F.layer_norm(x, (CHANNELS,)), F.layer_norm(text, (CHANNELS,))
        q = torch.cat([self.text_q(text), self.q(x)], dim=1)
        k = torch.cat([self.text_k(text), self.k(x)], dim=1)
        v = torch.cat([self.text_v(text), self.v(x)], dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        lengths = [text.shape[1], x.shape[1]]
        of_text, of_image = mixed.split(lengths, dim=1)
        return self.out(of_image), self.text_out(of_text)


class JointBlock(nn.Module):
    """Joint attention, then an MLP on the image tokens; `exits` are what the streams are given."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = JointAttention()
        self.mlp = nn.Sequential(
            nn.LayerNorm(CHANNELS),
            nn.Linear(CHANNELS, 2 * CHANNELS),
            nn.GELU(),
            nn.Linear(2 * CHANNELS, CHANNELS),
        )

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        of_image, of_text = self.attn(x, text)
        x, text = x + of_image, text + of_text
        return x + self.mlp(x), text


class JointModel(nn.Module):
    """Three blocks; what the last one gives to the text is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.blocks = nn.ModuleList(JointBlock() for _ in range(3))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x, text = block(x, text)
        return self.head(x)


Joint = tuple[CapturedGraph, dict[str, Dependence], dict[str, ResidualBranch]]


@pytest.fixture(scope="module")
def joint() -> Joint:
    captured, classes = classified(JointModel())
    branches, rejections = find_branches(captured.graph, classes)
    assert rejections == []
    return captured, classes, {branch.name: branch for branch in branches}


def layers_in(captured: CapturedGraph, branch: ResidualBranch) -> list[str]:
    nodes = map(captured.node, branch.nodes)
    return [module_path(n).removeprefix(f"{branch.name}.") for n in nodes if n.target is LINEAR]


@pytest.mark.slow
def test_a_joint_block_is_one_branch_and_its_mlp_another(joint: Joint) -> None:
    parts = ("attn", "mlp")
    assert list(joint[2]) == [f"blocks.{n}.{part}" for n in range(3) for part in parts]


def test_the_first_joint_branch_holds_no_layer_on_the_plain_text(joint: Joint) -> None:
    captured, classes, branches = joint
    first = branches["blocks.0.attn"]
    assert layers_in(captured, first) == ["q", "k", "v", "out", "text_out"]
    assert len(first.exits) == len(first.joins) == 2
    # The text is still `run`: the image tokens are the only latent value that goes in.
    assert module_path(captured.node(str(first.entry))) == "embed"
    assert classes[captured.node(first.joins[1]).args[0].name] is Dependence.RUN


def test_the_second_joint_branch_holds_both_sides_and_has_two_exits(joint: Joint) -> None:
    captured, classes, branches = joint
    second = branches["blocks.1.attn"]
    layers = layers_in(captured, second)
    sides = ("", "text_")
    assert sorted(layers) == sorted(f"{a}{b}" for a in sides for b in ("q", "k", "v", "out"))
    paths = [module_path(captured.node(name)) for name in second.exits]
    assert paths == ["blocks.1.attn.out", "blocks.1.attn.text_out"]
    for last, join in zip(second.exits, second.joins, strict=True):
        skip, added = captured.node(join).args[:2]
        assert (added.name, classes[skip.name]) == (last, Dependence.LATENT)
    assert second.entry is None


def test_keys_and_values_that_only_the_last_attention_needs_are_inside(joint: Joint) -> None:
    captured, _, branches = joint
    last, before = branches["blocks.2.attn"], branches["blocks.1.attn"]
    assert sorted(layers_in(captured, last)) == ["k", "out", "q", "text_k", "text_q", "text_v", "v"]
    assert len(last.exits) == 1
    # The text stream itself ends here too, but its last join stays outside.
    assert set(before.joins).isdisjoint(last.nodes)


def test_no_node_is_in_two_branches(joint: Joint) -> None:
    inside = [name for branch in joint[2].values() for name in branch.nodes]
    assert len(inside) == len(set(inside))


class Stack(nn.Module):
    """Blocks of some kinds one after the other, every layer used once."""

    LAYERS: ClassVar = {"single": 2, "parallel": 3, "nested": 3, "joint": 8}

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__()
        self.kinds = kinds
        self.blocks = nn.ModuleList(
            JointAttention()
            if kind == "joint"
            else nn.ModuleList(nn.Linear(CHANNELS, CHANNELS) for _ in range(self.LAYERS[kind]))
            for kind in kinds
        )

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            if kind == "joint":
                of_image, of_text = block(x, text)
                x, text = x + of_image, text + of_text
            elif kind == "single":
                x = x + block[1](F.gelu(block[0](F.layer_norm(x, (CHANNELS,)))))
            elif kind == "parallel":
                n = F.layer_norm(x, (CHANNELS,))
                x = x + block[0](n) + block[2](F.gelu(block[1](n)))
            else:
                h = block[0](x)
                x = x + block[2](torch.tanh(h + block[1](h)))
        return x, text


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(kinds=st.lists(st.sampled_from(list(Stack.LAYERS)), min_size=1, max_size=4))
def test_reuse_of_any_stack_removes_every_node_inside(kinds: list[str]) -> None:
    captured, classes = classified(Stack(kinds))
    branches, rejections = find_branches(captured.graph, classes)
    assert rejections == []
    # Of the first joint block, q, k and v of the text are `run` and in no branch.
    expected = [Stack.LAYERS[kind] for kind in kinds]
    if "joint" in kinds:
        expected[kinds.index("joint")] -= 3
    assert [len(layers_in(captured, branch)) for branch in branches] == expected
    for branch in branches:
        assert left_without(captured.graph, branch).isdisjoint(branch.nodes)


# --- joint attention: numbers -------------------------------------------------------------------

REFRESH, CALIBRATE, REUSE, _ = StepMode
STEPS = 6


@pytest.fixture(scope="module")
def joint_model() -> JointModel:
    torch.manual_seed(0)
    return shake(JointModel(), 0.2)


@pytest.fixture(scope="module")
def joint_calls() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    text = torch.randn(2, 5, CHANNELS)
    return [{"x": torch.randn(2, 3, CHANNELS), "text": text} for _ in range(STEPS)]


@pytest.fixture(scope="module")
def joint_recording(joint_model: JointModel, joint_calls: list[dict[str, Tensor]]) -> Recording:
    with record(joint_model) as recording, torch.no_grad():
        for call in joint_calls:
            joint_model(**call)
    return recording


def schedule_of(mode: StepMode) -> list[StepMode]:
    return uniform_schedule(STEPS, 3, mode)


def joint_outputs(
    model: JointModel,
    calls: list[dict[str, Tensor]],
    schedule: Sequence[StepMode],
    reused: Collection[str],
) -> list[Tensor]:
    """The outputs of all steps; on cheap steps these branches give what they last gave."""
    kept: dict[str, Any] = {}
    outputs = []
    for mode, call in zip(schedule, calls, strict=True):
        x, text = model.embed(call["x"]), call["text"]
        for number, block in enumerate(model.blocks):
            attn, mlp = f"blocks.{number}.attn", f"blocks.{number}.mlp"
            if mode is REFRESH or attn not in reused:
                kept[attn] = block.attn(x, text)
            x, text = x + kept[attn][0], text + kept[attn][1]
            if mode is REFRESH or mlp not in reused:
                kept[mlp] = block.mlp(x)
            x = x + kept[mlp]
        outputs.append(model.head(x))
    return outputs


ALL_BRANCHES = [f"blocks.{n}.{part}" for n in range(3) for part in ("attn", "mlp")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "rules", "reused"),
    [
        (REFRESH, (), ()),
        (CALIBRATE, (), ()),
        (REUSE, (), ALL_BRANCHES),
        (CALIBRATE, (SiteRule("blocks.1.attn", SiteMode.REUSE),), ["blocks.1.attn"]),
        (CALIBRATE, (SiteRule("*.attn", SiteMode.REUSE),), ALL_BRANCHES[::2]),
    ],
    ids=["refresh", "full rank", "reuse", "one joint branch reused", "all joint branches reused"],
)
def test_every_mode_of_a_joint_model_is_what_plain_torch_says(
    mode: StepMode,
    rules: tuple[SiteRule, ...],
    reused: Collection[str],
    joint_model: JointModel,
    joint_calls: list[dict[str, Tensor]],
    joint_recording: Recording,
) -> None:
    schedule = schedule_of(mode)
    plan = Plan.from_trajectory(
        joint_model,
        joint_recording,
        schedule=schedule,
        rank=CHANNELS,
        order=0,
        rules=rules,
        correct=False,
    )
    fast = optimize(joint_model, plan)
    expected = joint_outputs(joint_model, joint_calls, schedule, reused)
    for call, wanted in zip(joint_calls, expected, strict=True):
        # float32: every layer as y* + B A (x - x*), some ten of them one after the other.
        torch.testing.assert_close(fast(**call), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_reused_joint_branch_reads_two_caches_and_none_of_its_weights(
    joint_model: JointModel, joint_recording: Recording
) -> None:
    rules = (SiteRule("blocks.1.attn", SiteMode.REUSE),)
    plan = Plan.from_trajectory(
        joint_model, joint_recording, rank=CHANNELS, order=0, rules=rules, correct=False
    )
    fast = optimize(joint_model, plan)
    (target,) = [target for target in fast.compiled.targets if target.name == "blocks.1.attn"]
    variant = fast.compiled.variant_set.variants[CALIBRATE]
    assert {cache_name(node) for node in target.nodes} <= set(variant.reads)
    named = {str(n.target) for n in variant.module.graph.nodes if n.op == "get_attr"}
    assert not [name for name in named if "blocks.1.attn" in name]
    assert (target.rank, len(target.nodes)) == (0, 2)


class Nested(nn.Module):
    """A branch inside a branch that has layers of its own, and one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.inner, self.down, self.after = (
            nn.Linear(CHANNELS, CHANNELS) for _ in range(5)
        )

    def outer(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(torch.tanh(h + torch.tanh(self.inner(h))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.outer(x)
        return x + self.after(torch.tanh(x))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [CALIBRATE, REUSE], ids=["full rank", "reuse"])
def test_every_mode_of_a_nested_branch_is_what_plain_torch_says(mode: StepMode) -> None:
    model = shake(Nested(), 0.2)
    inputs = [torch.randn(2, 3, CHANNELS) for _ in range(STEPS)]
    with record(model) as recording, torch.no_grad():
        for x in inputs:
            model(x)
    schedule = schedule_of(mode)
    plan = Plan.from_trajectory(
        model, recording, schedule=schedule, rank=CHANNELS, order=0, correct=False
    )
    fast = optimize(model, plan)
    kept: list[Tensor] = []
    for now, x in zip(schedule, inputs, strict=True):
        e = model.embed(x)
        if now is REFRESH or mode is CALIBRATE:
            first = model.outer(e)
            kept = [first, model.after(torch.tanh(e + first))]
        # float32: every layer as y* + B A (x - x*), four of them one after the other.
        torch.testing.assert_close(fast(x), e + kept[0] + kept[1], rtol=1e-4, atol=1e-5)


def test_reuse_of_a_nested_branch_keeps_the_exit_of_the_outer_one_alone() -> None:
    model = shake(Nested(), 0.2)
    with record(model) as recording, torch.no_grad():
        for _ in range(STEPS):
            model(torch.randn(2, 3, CHANNELS))
    plan = Plan.from_trajectory(
        model, recording, schedule=schedule_of(REUSE), rank=CHANNELS, order=0, correct=False
    )
    fast = optimize(model, plan)
    paths = [
        module_path(fast.compiled.captured.node(cache.node))
        for cache in fast.compiled.variant_set.caches
    ]
    assert paths == ["down", "after"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blocks.0.attn", "blocks.1.attn"])
def test_a_joint_branch_is_no_one_map_as_a_whole(
    name: str, joint_model: JointModel, joint_recording: Recording
) -> None:
    rules = (SiteRule(name, SiteMode.CALIBRATE, granularity=Granularity.BRANCH),)
    plan = Plan.from_trajectory(
        joint_model, joint_recording, rank=CHANNELS, order=0, rules=rules, correct=False
    )
    fast = optimize(joint_model, plan)
    # Two exits in both; in the second, two entries too. Its layers are calibrated instead.
    reason = "not one map as a whole: several latent values go in or come out"
    assert [(r.name, r.reason) for r in fast.compiled.rejections if r.name == name] == [
        (name, reason)
    ]
    assert {t.granularity for t in fast.compiled.targets} == {Granularity.LINEAR}
