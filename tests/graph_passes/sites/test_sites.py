"""Linear sites: which are found, how they are grouped, and why the others are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.toys import Classified, Forward, JoinedLayers, joined_graph
from torch import Tensor, nn
from torch.nn import functional as F

from calicache.graph_passes.common.errors import SiteError
from calicache.graph_passes.graph.capture import capture
from calicache.graph_passes.graph.dependence import classify_nodes
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.signature import flatten_call
from calicache.graph_passes.sites.analysis import Analysis
from calicache.graph_passes.sites.sites import (
    EXPERTS,
    Rejection,
    Sites,
    find_sites,
    require_sites,
)

OUTSIDE = "before the first residual branch or after the last"


@pytest.fixture(scope="module")
def dit_graph(dit_analysis: Analysis) -> Classified:
    return dit_analysis.captured, dict(dit_analysis.classes)


@pytest.fixture(scope="module")
def diffusers_graph(diffusers_analysis: Analysis) -> Classified:
    return diffusers_analysis.captured, dict(diffusers_analysis.classes)


def tiny_sites(path: Forward, **arguments: Any) -> Sites:
    sites = find_sites(*joined_graph(path), **arguments)
    require_sites(sites)
    return sites


def names(sites: Sites) -> list[str]:
    return [site.name for site in sites.linears]


def reasons(sites: Sites) -> dict[str, str]:
    return {rejection.name: rejection.reason for rejection in sites.rejections}


# --- two real models --------------------------------------------------------------------------

GOLDEN = """\
blocks.0.attn.q: linear_4(add_3) 32 -> 32, 196 tokens, in blocks.0.attn
blocks.0.attn.k: linear_5(add_3) 32 -> 32, 196 tokens, in blocks.0.attn
blocks.0.attn.v: linear_6(add_3) 32 -> 32, 196 tokens, in blocks.0.attn
blocks.0.attn.proj: linear_7(view_4) 32 -> 32, 196 tokens, in blocks.0.attn
blocks.0.mlp.fc1: linear_8(add_6) 32 -> 128, 196 tokens, in blocks.0.mlp
blocks.0.mlp.fc2: linear_9(gelu) 128 -> 32, 196 tokens, in blocks.0.mlp
blocks.1.attn.q: linear_11(add_9) 32 -> 32, 196 tokens, in blocks.1.attn
blocks.1.attn.k: linear_12(add_9) 32 -> 32, 196 tokens, in blocks.1.attn
blocks.1.attn.v: linear_13(add_9) 32 -> 32, 196 tokens, in blocks.1.attn
blocks.1.attn.proj: linear_14(view_8) 32 -> 32, 196 tokens, in blocks.1.attn
blocks.1.mlp.fc1: linear_15(add_12) 32 -> 128, 196 tokens, in blocks.1.mlp
blocks.1.mlp.fc2: linear_16(gelu_1) 128 -> 32, 196 tokens, in blocks.1.mlp
not patch_embed (linear): before the first residual branch or after the last
not final_proj (linear_18): before the first residual branch or after the last
"""


def test_sites_and_rejections_of_the_sample_dit(dit_graph: Classified) -> None:
    sites = find_sites(*dit_graph)
    lines = [
        f"{s.name}: {s.node}({s.input_node}) {s.in_features} -> {s.out_features}, "
        f"{s.tokens} tokens, in {s.branch}\n"
        for s in sites.linears
    ]
    lines += [f"not {r.name} ({r.node}): {r.reason}\n" for r in sites.rejections]
    assert "".join(lines) == GOLDEN


def test_sites_of_the_diffusers_dit(diffusers_graph: Classified) -> None:
    sites = find_sites(*diffusers_graph)
    layers = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj"]
    expected = [f"transformer_blocks.{n}.{x}" for n in (0, 1) for x in [*layers, "ff.net.2"]]
    assert names(sites) == expected
    # 4 rows of 16 patches each.
    assert {site.tokens for site in sites.linears} == {64}
    assert reasons(sites) == {"proj_out_2": OUTSIDE}


@pytest.mark.parametrize("model", ["dit", "diffusers"])
def test_weight_and_bias_targets_lead_to_the_layers_own_tensors(
    model: str, request: pytest.FixtureRequest
) -> None:
    graph: Classified = request.getfixturevalue(f"{model}_graph")
    module: nn.Module = request.getfixturevalue("dit" if model == "dit" else "diffusers_dit")
    for site in find_sites(*graph).linears:
        layer = module.get_submodule(site.name)
        assert isinstance(layer, nn.Linear)
        assert graph[0].attribute(site.weight).data_ptr() == layer.weight.data_ptr()
        assert graph[0].attribute(str(site.bias)).data_ptr() == layer.bias.data_ptr()
        assert (site.out_features, site.in_features) == tuple(layer.weight.shape)


@pytest.mark.parametrize("model", ["dit", "diffusers"])
def test_q_k_and_v_are_siblings(model: str, request: pytest.FixtureRequest) -> None:
    sites = find_sites(*request.getfixturevalue(f"{model}_graph"))
    shared = [group.sites for group in sites.groups if len(group.sites) > 1]
    assert [[name[-1] for name in group] for group in shared] == [["q", "k", "v"]] * 2
    assert sorted(name for group in sites.groups for name in group.sites) == sorted(names(sites))


# --- include and exclude ----------------------------------------------------------------------


def test_include_keeps_what_matches_and_rejects_the_rest_with_the_reason(
    dit_graph: Classified,
) -> None:
    sites = find_sites(*dit_graph, include=["*.mlp.*", "blocks.1.attn.proj"])
    assert len(names(sites)) == 5
    assert [branch.name for branch in sites.branches] == [
        "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp",
    ]  # fmt: skip
    expected = "matches no include pattern of *.mlp.*, blocks.1.attn.proj"
    assert reasons(sites)["blocks.0.attn.q"] == expected


def test_exclude_wins_over_include(dit_graph: Classified) -> None:
    sites = find_sites(*dit_graph, include=["blocks.0.*"], exclude=["*.fc?", "*.q"])
    assert names(sites) == [f"blocks.0.attn.{name}" for name in ("k", "v", "proj")]
    assert reasons(sites)["blocks.0.mlp.fc1"] == "excluded by pattern *.fc?"
    assert reasons(sites)["blocks.0.attn.q"] == "excluded by pattern *.q"
    assert sites.groups[0].sites == ("blocks.0.attn.k", "blocks.0.attn.v")


def test_patterns_do_not_hide_a_structural_reason(dit_graph: Classified) -> None:
    sites = find_sites(*dit_graph, exclude=["patch_embed"])
    assert reasons(sites)["patch_embed"] == OUTSIDE


def test_patterns_that_leave_nothing_are_an_error_with_the_reasons(dit_graph: Classified) -> None:
    with pytest.raises(SiteError) as caught:
        require_sites(find_sites(*dit_graph, include=["attention.*"]))
    message = str(caught.value)
    assert "sites: model: expected a latent-dependent linear layer inside a residual" in message
    assert "blocks.0.attn.q: matches no include pattern of attention.*" in message
    assert "Check the include and exclude patterns" in message


# --- tiny models ------------------------------------------------------------------------------


@pytest.mark.slow
def test_gate_and_up_projection_are_siblings() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        n = m.norm(x)
        return x + m.c(F.silu(m.a(n)) * m.b(n))

    sites = tiny_sites(path)
    assert [group.sites for group in sites.groups] == [("a", "b"), ("c",)]
    assert sites.groups[0].input_node == "layer_norm"


@pytest.mark.slow
def test_a_layer_called_twice_is_two_sites_with_one_weight() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        x = x + m.a(x)
        return x + m.a(x)

    sites = tiny_sites(path)
    assert [(s.name, s.weight, s.branch) for s in sites.linears] == [
        ("a", "a.weight", "a"),
        ("a@1", "a.weight", "a@1"),
    ]


@pytest.mark.slow
def test_a_parameter_without_a_layer_is_a_site_without_bias() -> None:
    sites = tiny_sites(lambda m, x, _: x + F.linear(x, m.matrix))
    assert [(s.name, s.weight, s.bias) for s in sites.linears] == [("matrix", "matrix", None)]


@pytest.mark.slow
def test_a_computed_weight_is_rejected() -> None:
    sites = tiny_sites(lambda m, x, _: x + F.linear(m.a(x), m.matrix * 2))
    assert names(sites) == ["a"]
    assert list(reasons(sites).values()) == ["its weight or bias is computed, not a parameter"]


@pytest.mark.slow
def test_a_computed_bias_is_rejected() -> None:
    sites = tiny_sites(lambda m, x, text: x + F.linear(m.a(x), m.matrix, text.mean((0, 1))))
    assert names(sites) == ["a"]
    assert list(reasons(sites).values()) == ["its weight or bias is computed, not a parameter"]


@pytest.mark.slow
def test_a_layer_on_the_text_is_neither_site_nor_rejection() -> None:
    def path(m: JoinedLayers, x: Tensor, text: Tensor) -> Tensor:
        return x + m.c(F.scaled_dot_product_attention(m.a(x), m.b(text), m.b(text)))

    sites = tiny_sites(path)
    assert names(sites) == ["a", "c"]
    assert sites.rejections == ()


def test_layers_of_a_rejected_branch_are_rejected_with_it() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Any:
        x = x + m.a(x)
        h = m.b(x)
        return x + F.gelu(h), m.c(h)

    sites = tiny_sites(path)
    assert names(sites) == ["a"]
    assert sites.rejections == (
        Rejection("model", "add_1", "all its linear layers are also used outside it"),
        Rejection("b", "linear_1", OUTSIDE),
        Rejection("c", "linear_2", OUTSIDE),
    )


# --- on the stream itself ---------------------------------------------------------------------


def between(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
    """A layer before the first branch, one between two, one after the last."""
    x = m.norm(m.a(x))
    x = m.c(x + m.b(x))
    x = x + m.d(x)
    return m.e(x)


def test_a_layer_between_two_branches_is_a_site_without_a_branch() -> None:
    sites = tiny_sites(between)
    assert [(s.name, s.branch) for s in sites.linears] == [("b", "b"), ("c", None), ("d", "d")]
    assert [branch.name for branch in sites.branches] == ["b", "d"]
    assert reasons(sites) == {"a": OUTSIDE, "e": OUTSIDE}


@pytest.mark.slow
def test_patterns_choose_among_layers_between_branches() -> None:
    assert names(tiny_sites(between, exclude=["c"])) == ["b", "d"]
    alone = tiny_sites(between, include=["c"])
    assert (names(alone), alone.branches) == (["c"], ())


def test_a_layer_that_no_later_branch_joins_is_after_the_last() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Any:
        x = x + m.a(x)
        return x + m.b(x), m.c(x)

    sites = tiny_sites(path)
    assert names(sites) == ["a", "b"]
    assert reasons(sites) == {"c": OUTSIDE}


def test_what_escapes_from_one_branch_into_the_next_is_between_them() -> None:
    def path(m: JoinedLayers, x: Tensor, _: Tensor) -> Tensor:
        x = x + m.a(x)
        h = m.b(x)
        x = x + m.c(F.gelu(h))
        return x + m.d(h)

    sites = tiny_sites(path)
    places = [(s.name, s.branch) for s in sites.linears]
    assert places == [("a", "a"), ("b", "model"), ("c", "model"), ("d", "model")]


def test_tokens_count_all_rows_of_the_input() -> None:
    captured, classes = joined_graph(lambda m, x, _: x + m.a(x), shape=(2, 3, 5, 4))
    assert [site.tokens for site in find_sites(captured, classes).linears] == [30]


def test_a_layer_on_packed_tokens_is_token_wise() -> None:
    captured, classes = joined_graph(lambda m, x, _: x + m.a(x), shape=(3, 4))
    (site,) = find_sites(captured, classes).linears
    assert (site.name, site.tokens, site.branch) == ("a", 3, "a")


def test_a_layer_on_one_vector_is_not_token_wise() -> None:
    captured, classes = joined_graph(lambda m, x, _: x + m.a(x), shape=(4,))
    with pytest.raises(SiteError, match=r"a: not token-wise: its input has shape \(4,\)"):
        require_sites(find_sites(captured, classes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (lambda *values: values[1] * 2, "the graph has no linear layer on the latent stream"),
        (lambda m, x, text: x * m.a(text).mean(), "no linear layer on the latent stream"),
        (lambda m, x, _: m.a(x), f"a: {OUTSIDE}"),
        (lambda m, x, _: m.norm(x) + m.b(m.norm(x) * m.a(x)), f"b: {OUTSIDE}"),
        (lambda m, x, _: x + F.linear(x, torch.relu(m.matrix)), "its weight or bias is computed"),
    ],
)
def test_a_model_without_sites_is_an_error_with_the_reasons(path: Forward, reason: str) -> None:
    with pytest.raises(SiteError) as caught:
        tiny_sites(path)
    assert str(caught.value).startswith("sites: model: expected a latent-dependent linear layer")
    assert reason in caught.value.got


def test_experts_are_left_alone_with_a_rejection() -> None:
    class Experts(nn.Module):
        """Two experts over one sequence, in one product by a stack of weights."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.weights = nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.fc(x)
            return x + torch.matmul(x, self.weights).sum(0, keepdim=True)

    model = Experts().eval()
    captured = capture(model, flatten_call(model, (torch.randn(2, 3, 4),), {}).signature())
    sites = find_sites(captured, classify_nodes(captured, {"x": Dependence.LATENT}))
    assert [site.name for site in sites.linears] == ["fc"]
    assert EXPERTS in [rejection.reason for rejection in sites.rejections]
