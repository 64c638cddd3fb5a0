"""Residual branches by structure: two real models, and a tiny one for every shape of graph."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import shake
from support.toys import CHANNELS, Forward, JoinedLayers, classified, joined_graph
from torch import Tensor, fx, nn
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
from calicache.graph_passes.graph.operations import ADD, LINEAR
from calicache.graph_passes.graph.surgery import finish, module_path
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.rewriting.insertion import cache_name
from calicache.graph_passes.sites.analysis import Analysis
from calicache.graph_passes.sites.branches import ResidualBranch, find_branches

Summary = tuple[str, str | None, str, str]
Found = tuple[list[Summary], list[tuple[str, str]]]


def summary(branch: ResidualBranch) -> Summary:
    """Name, entry, exits and joins; several names with spaces between them."""
    return branch.name, branch.entry, " ".join(branch.exits), " ".join(branch.joins)


def found(path: Forward) -> Found:
    """(name, entry, exits, joins) of all branches, (node, reason) of all rejections."""
    captured, classes = joined_graph(path)
    branches, rejections = find_branches(captured.graph, classes)
    return (
        list(map(summary, branches)),
        [(r.node, r.reason) for r in rejections],
    )


def branches_of(path: Forward) -> list[Summary]:
    return found(path)[0]


# --- two real models --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_branches(
    dit_analysis: Analysis, diffusers_analysis: Analysis
) -> dict[str, tuple[fx.Graph, Any, Any]]:
    return {
        name: (a.captured.graph, a.classes, find_branches(a.captured.graph, a.classes))
        for name, a in (("dit", dit_analysis), ("diffusers", diffusers_analysis))
    }


def test_branches_of_the_sample_dit(real_branches: Any) -> None:
    branches, rejections = real_branches["dit"][2]
    assert list(map(summary, branches)) == [
        ("blocks.0.attn", "add", "mul_2", "add_4"),
        ("blocks.0.mlp", "add_4", "mul_4", "add_7"),
        ("blocks.1.attn", "add_7", "mul_6", "add_10"),
        ("blocks.1.mlp", "add_10", "mul_8", "add_13"),
    ]
    assert rejections == []


def test_branches_of_the_diffusers_dit(real_branches: Any) -> None:
    branches, rejections = real_branches["diffusers"][2]
    assert list(map(summary, branches)) == [
        ("transformer_blocks.0.attn1", "add", "mul_4", "add_4"),
        ("transformer_blocks.0.ff.net", "add_4", "mul_6", "add_7"),
        ("transformer_blocks.1.attn1", "add_7", "mul_11", "add_11"),
        ("transformer_blocks.1.ff.net", "add_11", "mul_13", "add_14"),
    ]
    assert rejections == []


@pytest.mark.parametrize("model", ["dit", "diffusers"])
def test_a_branch_reads_one_latent_value_and_gives_one(model: str, real_branches: Any) -> None:
    graph, classes, (branches, _) = real_branches[model]
    nodes = {node.name: node for node in graph.nodes}
    for branch in branches:
        for name in branch.nodes:
            latent = {
                n.name for n in nodes[name].all_input_nodes if classes[n.name] is Dependence.LATENT
            }
            assert latent <= {branch.entry, *branch.nodes}
            users = {user.name for user in nodes[name].users}
            assert users <= set(branch.joins if name in branch.exits else branch.nodes)


@pytest.mark.parametrize("model", ["dit", "diffusers"])
def test_a_branch_can_be_cut_out_at_its_exits(model: str, real_branches: Any) -> None:
    graph, _, (branches, _) = real_branches[model]
    linears = {node.name for node in graph.nodes if node.target is LINEAR}
    for branch in branches:
        assert _left_without(graph, branch).isdisjoint(branch.nodes)
        assert linears & set(branch.nodes)


def _left_without(graph: fx.Graph, branch: ResidualBranch) -> set[str]:
    copies: dict[fx.Node, fx.Node] = {}
    rest = fx.Graph()
    rest.output(rest.graph_copy(graph, copies))
    for last in [copies[node] for node in copies if node.name in branch.exits]:
        with rest.inserting_before(last):
            cached = rest.placeholder("cached")
        last.replace_all_uses_with(cached)
    return {node.name for node in finish(rest).nodes}


# --- what is a branch -------------------------------------------------------------------------


def test_plain_residual_on_either_side_of_the_add() -> None:
    assert branches_of(lambda m, x, _: x + m.a(x)) == [("a", "x", "linear", "add")]
    assert branches_of(lambda m, x, _: m.a(x) + x) == [("a", "x", "linear", "add")]


def test_skip_through_reshape_and_transpose() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(2, -1, 3).transpose(1, 2) + m.b(m.norm(m.a(x)))

    assert branches_of(path) == [("model", "x", "linear_1", "add")]


def test_tokens_moved_before_the_branch_are_where_it_starts() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        x = m.a(x).transpose(1, 2).clone().transpose(1, 2)
        return x + m.b(m.norm(x))

    assert branches_of(path) == [("b", "transpose_1", "linear_1", "add")]


def test_attention_and_mlp_in_parallel_are_one_branch() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        n = m.norm(x)
        mixed = m.d(F.scaled_dot_product_attention(m.a(n), m.b(n), m.c(n)))
        return x + (mixed + m.e(n))

    assert branches_of(path) == [("model", "x", "add", "add_1")]


def test_branches_in_series_start_where_the_last_one_joined() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        x = x + m.a(x)
        return m.norm(x + m.b(x))

    assert branches_of(path) == [("a", "x", "linear", "add"), ("b", "add", "linear_1", "add_1")]


def test_a_layer_called_twice_gives_two_names() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        x = x + m.a(x)
        return x + m.a(x)

    assert [name for name, *_ in branches_of(path)] == ["a", "a@1"]


def test_text_may_enter_a_branch_anywhere() -> None:
    def path(m: JoinedLayers, x: Tensor, text: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(m.a(m.norm(x)), m.b(text), m.c(text))
        return x + m.d(mixed)

    assert branches_of(path) == [("model", "x", "linear_3", "add")]


def test_the_exit_may_be_read_again_after_the_join() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        y = m.b(m.a(x))
        return (x + y) * y

    assert branches_of(path) == [("model", "x", "linear_1", "add")]


def test_rotary_positions_inside_a_branch_are_no_branch_of_their_own() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        q = m.a(x)
        turned = torch.cat([-q[..., 2:], q[..., :2]], dim=-1)
        return x + m.b(q * 0.6 + turned * 0.8)

    assert branches_of(path) == [("model", "x", "linear_1", "add_1")]


def test_an_activation_written_by_hand_does_not_hide_its_branch() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        h = m.a(x)
        gelu = 0.5 * h * (1 + torch.tanh(0.79788 * (h + 0.044715 * h**3)))
        return x + m.b(gelu)

    assert branches_of(path) == [("model", "x", "linear_1", "add_2")]


@settings(max_examples=6, deadline=None)
@given(kinds=st.lists(st.sampled_from(["mlp", "gated", "plain", "norm"]), min_size=1, max_size=5))
def test_a_chain_has_as_many_branches_as_residual_blocks(kinds: list[str]) -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        for kind in kinds:
            if kind == "mlp":
                x = x + m.b(F.gelu(m.a(m.norm(x))))
            elif kind == "gated":
                x = m.e(F.silu(m.c(x)) * m.d(x)) + x
            else:
                x = m.a(x) if kind == "plain" else m.norm(x)
        return x

    branches = branches_of(path)
    assert len(branches) == sum(kind in ("mlp", "gated") for kind in kinds)
    assert len({name for name, *_ in branches}) == len(branches)


# --- several exits, several entries, branches inside branches -----------------------------------


def test_parallel_branches_added_one_after_the_other_share_their_norm() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        n = m.norm(x)
        return x + m.a(n) + m.b(n)

    captured, classes = joined_graph(path)
    (branch,), rejections = find_branches(captured.graph, classes)
    assert summary(branch) == ("model", "x", "linear linear_1", "add add_1")
    assert branch.nodes == ("layer_norm", "linear", "linear_1")
    assert rejections == []


def test_attention_and_mlp_added_one_after_the_other_are_one_branch() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        n = m.norm(x)
        mixed = m.d(F.scaled_dot_product_attention(m.a(n), m.b(n), m.c(n)))
        return x + mixed + m.e(F.gelu(n))

    assert branches_of(path) == [("model", "x", "linear_3 linear_4", "add add_1")]


def test_parallel_branches_that_share_nothing_are_two_that_start_at_one_value() -> None:
    branches = branches_of(lambda m, x, _: x + m.a(m.norm(x)) + m.b(x))
    assert branches == [("a", "x", "linear", "add"), ("b", "x", "linear_1", "add_1")]


def test_a_nested_branch_is_taken_in_by_an_outer_one_with_layers_of_its_own() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        h = m.a(x)
        return x + m.c(h + m.b(h))

    captured, classes = joined_graph(path)
    (branch,), rejections = find_branches(captured.graph, classes)
    assert (branch.name, branch.entry, branch.exits[-1]) == ("model", "x", "linear_2")
    assert branch.nodes == ("linear", "linear_1", "add", "linear_2")
    assert rejections == []


def test_a_second_latent_entry_leaves_the_branch_without_the_one() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        y = m.norm(x)
        return y + m.b(y * m.a(x))

    captured, classes = joined_graph(path)
    (branch,), rejections = find_branches(captured.graph, classes)
    assert summary(branch) == ("model", None, "linear_1", "add")
    assert branch.nodes == ("linear", "mul", "linear_1")
    assert rejections == []


def test_a_value_that_escapes_stays_outside_with_what_makes_it() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Any:
        h = m.b(m.norm(m.a(x)))
        return x + m.d(F.gelu(m.c(h))), h

    captured, classes = joined_graph(path)
    (branch,), rejections = find_branches(captured.graph, classes)
    assert summary(branch) == ("model", "linear_1", "linear_3", "add")
    assert branch.nodes == ("linear_2", "gelu", "linear_3")
    assert rejections == []


def test_an_exit_read_elsewhere_keeps_no_node_but_itself_inside() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Any:
        h = m.a(x)
        y = m.b(F.gelu(h))
        return x + y, y * h

    captured, classes = joined_graph(path)
    (branch,), _ = find_branches(captured.graph, classes)
    assert branch.nodes == ("gelu", "linear_1")


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
        assert _left_without(captured.graph, branch).isdisjoint(branch.nodes)


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
    made = []
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
        made.append(model.head(x))
    return made


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


# --- what is none, and why --------------------------------------------------------------------


def test_of_a_chain_inside_an_outer_residual_the_links_are_kept() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        h = m.a(x)
        h = h + m.b(h)
        h = h + m.c(h)
        return x + m.d(h)

    branches, rejections = found(path)
    assert branches == [("b", "linear", "linear_1", "add"), ("c", "add", "linear_2", "add_1")]
    assert rejections == [("add_2", "contains other residual branches (joined at add)")]


def test_an_outer_residual_without_layers_of_its_own_is_rejected() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        return x + torch.tanh(x + m.a(x))

    branches, rejections = found(path)
    assert branches == [("a", "x", "linear", "add")]
    assert rejections == [("add_1", "contains other residual branches (joined at add)")]


def test_layers_that_only_escape_make_no_branch() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Any:
        h = m.a(x)
        return x + F.gelu(h), h

    branches, rejections = found(path)
    assert branches == []
    assert rejections == [("add", "all its linear layers are also used outside it")]


def test_a_latent_add_without_a_linear_is_rejected() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        x = x + F.gelu(x)
        return x + m.a(x)

    branches, rejections = found(path)
    assert branches == [("a", "add", "linear", "add_1")]
    assert rejections == [("add", "the branch has no linear layer")]


def test_a_value_added_to_its_own_copy_is_rejected_once() -> None:
    rejections = found(lambda m, x, _: m.a(x + x.clone()))[1]
    assert rejections == [("add", "the branch has no linear layer")]


@pytest.mark.parametrize(
    "path",
    [
        lambda m, x, _: m.a(x) + m.b(x),  # two projections, no skip
        lambda m, x, _: m.a(x + x),
        lambda m, x, _: m.a(x + 1.0),
        lambda m, x, text: m.a(x) + text[:, :3],  # the other operand is not latent
        lambda m, x, _: m.a(x) - x,  # not an add
    ],
)
def test_adds_that_join_no_skip_are_not_even_candidates(path: Forward) -> None:
    branches, rejections = found(path)
    assert branches == []
    assert rejections == []


def test_a_step_known_residual_is_left_alone() -> None:
    def path(m: JoinedLayers, x: Tensor, text: Tensor) -> Tensor:
        text = text + m.a(text)
        return x * text.mean(dim=1, keepdim=True)

    captured, classes = joined_graph(path)
    assert [n.name for n in captured.graph.nodes if n.target is ADD] == ["add"]
    assert find_branches(captured.graph, classes) == ([], [])
