"""Residual branches by structure: two real models, and a tiny one for every shape of graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from calicache.graph_passes.branches import ADD, LINEAR, ResidualBranch, find_branches
from calicache.graph_passes.capture import capture, finish
from calicache.graph_passes.dependence import Dependence, classify_inputs, classify_nodes
from calicache.graph_passes.record import Trajectory
from calicache.graph_passes.signature import flatten_call

CHANNELS = 4
Forward = Callable[..., Any]


class Tiny(nn.Module):
    """Some layers; `path` says how they are joined, which is all that matters here."""

    def __init__(self, path: Forward) -> None:
        super().__init__()
        for name in "abcde":
            setattr(self, name, nn.Linear(CHANNELS, CHANNELS))
        self.norm = nn.LayerNorm(CHANNELS)
        self.matrix = nn.Parameter(torch.randn(CHANNELS, CHANNELS))
        self.path = path

    def forward(self, x: Tensor, text: Tensor) -> Any:
        return self.path(self, x, text)


def tiny_graph(path: Forward, shape: tuple[int, ...] = (2, 3, CHANNELS)) -> Any:
    """The captured graph of a tiny model and its classes: x is latent, text is run."""
    model = Tiny(path).eval()
    call = flatten_call(model, (torch.randn(shape), torch.randn(2, 5, CHANNELS)), {})
    captured = capture(model, call.signature())
    inputs = {"x": Dependence.LATENT, "text": Dependence.RUN}
    return captured, classify_nodes(captured, inputs)


Found = tuple[list[tuple[str, str, str, str]], list[tuple[str, str]]]


def found(path: Forward) -> Found:
    """(name, entry, exit, join) of all branches, (node, reason) of all rejections."""
    captured, classes = tiny_graph(path)
    branches, rejections = find_branches(captured.graph, classes)
    return (
        [(b.name, b.entry, b.exit, b.join) for b in branches],
        [(r.node, r.reason) for r in rejections],
    )


def branches_of(path: Forward) -> list[tuple[str, str, str, str]]:
    return found(path)[0]


# --- two real models --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_branches(request: pytest.FixtureRequest) -> dict[str, tuple[fx.Graph, Any, Any]]:
    found = {}
    for name, model in (("dit", "dit"), ("diffusers", "diffusers_dit")):
        trajectory: Trajectory = request.getfixturevalue(f"{name}_trajectory")
        captured = capture(request.getfixturevalue(model), trajectory.signature)
        classes = classify_nodes(captured, classify_inputs(trajectory))
        found[name] = (captured.graph, classes, find_branches(captured.graph, classes))
    return found


def test_branches_of_the_sample_dit(real_branches: Any) -> None:
    branches, rejections = real_branches["dit"][2]
    assert [(b.name, b.entry, b.exit, b.join) for b in branches] == [
        ("blocks.0.attn", "add", "mul_2", "add_4"),
        ("blocks.0.mlp", "add_4", "mul_4", "add_7"),
        ("blocks.1.attn", "add_7", "mul_6", "add_10"),
        ("blocks.1.mlp", "add_10", "mul_8", "add_13"),
    ]
    assert rejections == []


def test_branches_of_the_diffusers_dit(real_branches: Any) -> None:
    branches, rejections = real_branches["diffusers"][2]
    assert [(b.name, b.entry, b.exit, b.join) for b in branches] == [
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
            assert users <= ({branch.join} if name == branch.exit else set(branch.nodes))


@pytest.mark.parametrize("model", ["dit", "diffusers"])
def test_a_branch_can_be_cut_out_at_its_exit(model: str, real_branches: Any) -> None:
    graph, _, (branches, _) = real_branches[model]
    linears = {node.name for node in graph.nodes if node.target is LINEAR}
    for branch in branches:
        assert _left_without(graph, branch).isdisjoint(branch.nodes)
        assert linears & set(branch.nodes)


def _left_without(graph: fx.Graph, branch: ResidualBranch) -> set[str]:
    copies: dict[fx.Node, fx.Node] = {}
    rest = fx.Graph()
    rest.output(rest.graph_copy(graph, copies))
    last = next(copies[node] for node in copies if node.name == branch.exit)
    with rest.inserting_before(last):
        cached = rest.placeholder("cached")
    last.replace_all_uses_with(cached)
    return {node.name for node in finish(rest).nodes}


# --- what is a branch -------------------------------------------------------------------------


def test_plain_residual_on_either_side_of_the_add() -> None:
    assert branches_of(lambda m, x, _: x + m.a(x)) == [("a", "x", "linear", "add")]
    assert branches_of(lambda m, x, _: m.a(x) + x) == [("a", "x", "linear", "add")]


def test_skip_through_reshape_and_transpose() -> None:
    def path(m: Tiny, x: Tensor, _: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(2, -1, 3).transpose(1, 2) + m.b(m.norm(m.a(x)))

    assert branches_of(path) == [("model", "x", "linear_1", "add")]


def test_tokens_moved_before_the_branch_are_where_it_starts() -> None:
    def path(m: Tiny, x: Tensor, _: Tensor) -> Tensor:
        x = m.a(x).transpose(1, 2).clone().transpose(1, 2)
        return x + m.b(m.norm(x))

    assert branches_of(path) == [("b", "transpose_1", "linear_1", "add")]


def test_attention_and_mlp_in_parallel_are_one_branch() -> None:
    def path(m: Tiny, x: Tensor, _: Tensor) -> Tensor:
        n = m.norm(x)
        mixed = m.d(F.scaled_dot_product_attention(m.a(n), m.b(n), m.c(n)))
        return x + (mixed + m.e(n))

    assert branches_of(path) == [("model", "x", "add", "add_1")]


def test_branches_in_series_start_where_the_last_one_joined() -> None:
    def path(m: Tiny, x: Tensor, _: Tensor) -> Tensor:
        x = x + m.a(x)
        return m.norm(x + m.b(x))

    assert branches_of(path) == [("a", "x", "linear", "add"), ("b", "add", "linear_1", "add_1")]


def test_a_layer_called_twice_gives_two_names() -> None:
    def path(m: Tiny, x: Tensor, _: Tensor) -> Tensor:
        x = x + m.a(x)
        return x + m.a(x)

    assert [name for name, *_ in branches_of(path)] == ["a", "a@1"]


def test_text_may_enter_a_branch_anywhere() -> None:
    def path(m: Tiny, x: Tensor, text: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(m.a(m.norm(x)), m.b(text), m.c(text))
        return x + m.d(mixed)

    assert branches_of(path) == [("model", "x", "linear_3", "add")]


def test_the_exit_may_be_read_again_after_the_join() -> None:
    def path(m: Tiny, x: Tensor, _: Tensor) -> Tensor:
        y = m.b(m.a(x))
        return (x + y) * y

    assert branches_of(path) == [("model", "x", "linear_1", "add")]


def test_rotary_positions_inside_a_branch_are_no_branch_of_their_own() -> None:
    def path(m: Tiny, x: Tensor, _: Tensor) -> Tensor:
        q = m.a(x)
        turned = torch.cat([-q[..., 2:], q[..., :2]], dim=-1)
        return x + m.b(q * 0.6 + turned * 0.8)

    assert branches_of(path) == [("model", "x", "linear_1", "add_1")]


def test_an_activation_written_by_hand_does_not_hide_its_branch() -> None:
    def path(m: Tiny, x: Tensor, _: Tensor) -> Tensor:
        h = m.a(x)
        gelu = 0.5 * h * (1 + torch.tanh(0.79788 * (h + 0.044715 * h**3)))
        return x + m.b(gelu)

    assert branches_of(path) == [("model", "x", "linear_1", "add_2")]


@settings(max_examples=6, deadline=None)
@given(kinds=st.lists(st.sampled_from(["mlp", "gated", "plain", "norm"]), min_size=1, max_size=5))
def test_a_chain_has_as_many_branches_as_residual_blocks(kinds: list[str]) -> None:
    def path(m: Tiny, x: Tensor, _: Tensor) -> Tensor:
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


# --- what is none, and why --------------------------------------------------------------------


def test_of_nested_residuals_the_inner_one_is_kept() -> None:
    def path(m: Tiny, x: Tensor, _: Tensor) -> Tensor:
        h = m.a(x)
        return x + m.c(h + m.b(h))

    branches, rejections = found(path)
    assert branches == [("b", "linear", "linear_1", "add")]
    assert rejections == [("add_1", "contains other residual branches (joined at add)")]


def test_a_value_that_escapes_is_named() -> None:
    def path(m: Tiny, x: Tensor, _: Tensor) -> Any:
        h = m.a(x)
        return x + m.b(h), h

    branches, rejections = found(path)
    assert branches == []
    assert rejections == [("add", "linear inside the branch is also used outside it")]


def test_a_second_latent_entry_is_rejected() -> None:
    def path(m: Tiny, x: Tensor, _: Tensor) -> Tensor:
        y = m.norm(x)
        return y + m.b(y * m.a(x))

    branches, rejections = found(path)
    assert branches == []
    assert rejections == [("add", "the branch has an entry besides layer_norm")]


def test_parallel_branches_added_one_after_the_other_share_their_norm() -> None:
    def path(m: Tiny, x: Tensor, _: Tensor) -> Tensor:
        n = m.norm(x)
        return x + m.a(n) + m.b(n)

    branches, rejections = found(path)
    assert branches == []
    assert rejections == [("add", "layer_norm inside the branch is also used outside it")]


def test_a_latent_add_without_a_linear_is_rejected() -> None:
    def path(m: Tiny, x: Tensor, _: Tensor) -> Tensor:
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
    def path(m: Tiny, x: Tensor, text: Tensor) -> Tensor:
        text = text + m.a(text)
        return x * text.mean(dim=1, keepdim=True)

    captured, classes = tiny_graph(path)
    assert [n.name for n in captured.graph.nodes if n.target is ADD] == ["add"]
    assert find_branches(captured.graph, classes) == ([], [])
