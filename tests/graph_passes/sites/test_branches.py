"""Residual branches by structure: two real models, and a tiny one for every shape of graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toys import Forward, JoinedLayers, joined_graph, left_without
from torch import Tensor, fx
from torch.nn import functional as F

from calicache.graph_passes.graph.operations import ADD, LINEAR
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.sites.analysis import Analysis
from calicache.graph_passes.sites.branches import ResidualBranch, find_branches

Summary = tuple[str, str | None, str, str]
Findings = tuple[list[Summary], list[tuple[str, str]]]


def summary(branch: ResidualBranch) -> Summary:
    """Name, entry, exits and joins; several names with spaces between them."""
    return branch.name, branch.entry, " ".join(branch.exits), " ".join(branch.joins)


def findings(path: Forward) -> Findings:
    """(name, entry, exits, joins) of all branches, (node, reason) of all rejections."""
    captured, classes = joined_graph(path)
    branches, rejections = find_branches(captured.graph, classes)
    return (
        list(map(summary, branches)),
        [(r.node, r.reason) for r in rejections],
    )


def branches_of(path: Forward) -> list[Summary]:
    return findings(path)[0]


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
        assert left_without(graph, branch).isdisjoint(branch.nodes)
        assert linears & set(branch.nodes)


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


# --- what is none, and why --------------------------------------------------------------------


def test_of_a_chain_inside_an_outer_residual_the_links_are_kept() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        h = m.a(x)
        h = h + m.b(h)
        h = h + m.c(h)
        return x + m.d(h)

    branches, rejections = findings(path)
    assert branches == [("b", "linear", "linear_1", "add"), ("c", "add", "linear_2", "add_1")]
    assert rejections == [("add_2", "contains other residual branches (joined at add)")]


def test_an_outer_residual_without_layers_of_its_own_is_rejected() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        return x + torch.tanh(x + m.a(x))

    branches, rejections = findings(path)
    assert branches == [("a", "x", "linear", "add")]
    assert rejections == [("add_1", "contains other residual branches (joined at add)")]


def test_layers_that_only_escape_make_no_branch() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Any:
        h = m.a(x)
        return x + F.gelu(h), h

    branches, rejections = findings(path)
    assert branches == []
    assert rejections == [("add", "all its linear layers are also used outside it")]


def test_a_latent_add_without_a_linear_is_rejected() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        x = x + F.gelu(x)
        return x + m.a(x)

    branches, rejections = findings(path)
    assert branches == [("a", "add", "linear", "add_1")]
    assert rejections == [("add", "the branch has no linear layer")]


def test_a_value_added_to_its_own_copy_is_rejected_once() -> None:
    rejections = findings(lambda m, x, _: m.a(x + x.clone()))[1]
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
    branches, rejections = findings(path)
    assert branches == []
    assert rejections == []


def test_a_step_known_residual_is_left_alone() -> None:
    def path(m: JoinedLayers, x: Tensor, text: Tensor) -> Tensor:
        text = text + m.a(text)
        return x * text.mean(dim=1, keepdim=True)

    captured, classes = joined_graph(path)
    assert [n.name for n in captured.graph.nodes if n.target is ADD] == ["add"]
    assert find_branches(captured.graph, classes) == ([], [])
