"""Which nodes a CALIBRATE step replaces, at which rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.analyses import noise_analysis
from torch import Tensor, nn
from torch.nn import functional as F

from calicache.graph_passes import (
    CalibrationTarget,
    Granularity,
    Rejection,
    SiteMode,
    SiteRule,
)
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.settings.choices import BranchKind
from calicache.graph_passes.sites.analysis import Analysis
from calicache.graph_passes.sites.targets import assign

LINEAR, BRANCH = Granularity
CALIBRATE, REUSE, FULL = SiteMode
LAYERS = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
JOINT_LAYERS = ("attn.q+k+v", "attn.proj", "mlp.fc1", "mlp.fc2")


def targets_of(analysis: Analysis, rank: int = 4, **options: Any) -> dict[str, CalibrationTarget]:
    targets, rejections = assign(analysis.captured, analysis.sites, rank=rank, **options)
    assert rejections == ()
    assert len({target.name for target in targets}) == len(targets)
    return {target.name: target for target in targets}


def ranks_of(analysis: Analysis, *rules: SiteRule, **options: Any) -> dict[str, int]:
    return {name: t.rank for name, t in targets_of(analysis, rules=rules, **options).items()}


def refusal(analysis: Analysis, **options: Any) -> str:
    with pytest.raises(PlanError) as caught:
        assign(analysis.captured, analysis.sites, **options)
    return str(caught.value)


def test_every_site_is_a_target_by_default(dit_analysis: Analysis) -> None:
    targets = targets_of(dit_analysis)
    assert list(targets) == [f"blocks.{n}.{layer}" for n in (0, 1) for layer in LAYERS]
    for site in dit_analysis.sites.linears:
        assert targets[site.name] == CalibrationTarget(
            name=site.name,
            granularity=LINEAR,
            sites=(site.name,),
            input_node=site.input_node,
            nodes=(site.node,),
            weights=(site.weight,),
            in_features=site.in_features,
            out_features=(site.out_features,),
            tokens=site.tokens,
            rank=4,
        )


def test_macs_are_those_of_two_thin_products(dit_analysis: Analysis) -> None:
    assert targets_of(dit_analysis)["blocks.0.mlp.fc1"].calibrate_macs == 4 * 49 * 4 * (32 + 128)
    assert targets_of(dit_analysis, 0)["blocks.0.mlp.fc1"].calibrate_macs == 0


# --- sibling groups -----------------------------------------------------------------------------


def test_siblings_become_one_target_of_the_same_macs(dit_analysis: Analysis) -> None:
    apart, joint = targets_of(dit_analysis), targets_of(dit_analysis, joint=True)
    assert list(joint) == [f"blocks.{n}.{layer}" for n in (0, 1) for layer in JOINT_LAYERS]
    group = joint["blocks.1.attn.q+k+v"]
    members = [apart[f"blocks.1.attn.{name}"] for name in "qkv"]
    assert group.sites == tuple(member.name for member in members)
    assert group.nodes == tuple(member.nodes[0] for member in members)
    assert group.weights == tuple(member.weights[0] for member in members)
    assert group.input_node == members[0].input_node
    assert (group.in_features, group.out_features) == (32, (32, 32, 32))
    assert group.rank == 6  # 1.5 r
    assert group.calibrate_macs == sum(member.calibrate_macs for member in members)
    assert joint["blocks.1.mlp.fc1"] == apart["blocks.1.mlp.fc1"]


@pytest.mark.parametrize("rank", range(1, 33))
def test_joint_rank_never_costs_more_and_is_capped_at_full_rank(
    dit_analysis: Analysis, rank: int
) -> None:
    group = targets_of(dit_analysis, rank, joint=True)["blocks.0.attn.q+k+v"]
    assert group.rank == min(3 * rank // 2, 32)
    # An odd r leaves half a rank over.
    apart = 3 * 4 * 49 * rank * (32 + 32)
    assert group.calibrate_macs <= apart
    assert group.rank == 32 or apart - group.calibrate_macs < 4 * 49 * (32 + 96)


def test_rank_0_groups_return_their_anchors(dit_analysis: Analysis) -> None:
    group = targets_of(dit_analysis, 0, joint=True)["blocks.0.attn.q+k+v"]
    assert (group.rank, len(group.nodes)) == (0, 3)


def test_siblings_of_other_ranks_are_apart(dit_analysis: Analysis) -> None:
    ranks = ranks_of(dit_analysis, SiteRule("blocks.0.attn.k", CALIBRATE, rank=8), joint=True)
    assert ranks["blocks.0.attn.q+v"] == 5  # 4 x 2 x 64 / 96
    assert ranks["blocks.0.attn.k"] == 8
    assert ranks["blocks.1.attn.q+k+v"] == 6
    ranks = ranks_of(dit_analysis, SiteRule("*.attn.k", FULL), joint=True)
    assert list(ranks)[:2] == ["blocks.0.attn.q+v", "blocks.0.attn.proj"]


# --- rules --------------------------------------------------------------------------------------


def test_site_rules_give_rank_reuse_and_full(dit_analysis: Analysis) -> None:
    ranks = ranks_of(
        dit_analysis,
        SiteRule("blocks.0.attn.q", CALIBRATE, rank=9),
        SiteRule("*.attn.k", REUSE),
        SiteRule("*.fc?", FULL),
        SiteRule("*.attn.v", CALIBRATE),
    )
    assert ranks == {
        "blocks.0.attn.q": 9,
        "blocks.0.attn.k": 0,
        "blocks.0.attn.v": 4,
        "blocks.0.attn.proj": 4,
        "blocks.1.attn.q": 4,
        "blocks.1.attn.k": 0,
        "blocks.1.attn.v": 4,
        "blocks.1.attn.proj": 4,
    }


def test_first_rule_that_fits_counts(dit_analysis: Analysis) -> None:
    rules = SiteRule("*.q", CALIBRATE, rank=2), SiteRule("*.attn.*", CALIBRATE, rank=7)
    ranks = ranks_of(dit_analysis, *rules)
    assert [ranks[f"blocks.1.{layer}"] for layer in LAYERS] == [2, 7, 7, 7, 4, 4]
    assert ranks_of(dit_analysis, *rules[::-1])["blocks.1.attn.q"] == 7


def test_branch_rule_full_leaves_all_of_it_alone(dit_analysis: Analysis) -> None:
    ranks = ranks_of(dit_analysis, SiteRule("blocks.0.attn", FULL), SiteRule("blocks.1.mlp", FULL))
    assert list(ranks) == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"] + [
        f"blocks.1.{layer}" for layer in LAYERS[:4]
    ]


def test_branch_rule_reuse_returns_the_anchor_of_the_whole(dit_analysis: Analysis) -> None:
    targets = targets_of(dit_analysis, rules=[SiteRule("blocks.0.*", REUSE)])
    assert list(targets) == ["blocks.0.attn", "blocks.0.mlp"] + [
        f"blocks.1.{layer}" for layer in LAYERS
    ]
    branch = next(b for b in dit_analysis.sites.branches if b.name == "blocks.0.attn")
    assert targets["blocks.0.attn"] == CalibrationTarget(
        name="blocks.0.attn",
        granularity=BRANCH,
        sites=tuple(f"blocks.0.{layer}" for layer in LAYERS[:4]),
        input_node=branch.entry,
        nodes=branch.exits,
        weights=(),
        in_features=32,
        out_features=(32,),
        tokens=4 * 49,
        rank=0,
    )


def test_branch_rule_calibrates_the_whole_at_its_rank(dit_analysis: Analysis) -> None:
    targets = targets_of(dit_analysis, rules=[SiteRule("*.mlp", CALIBRATE, 5, BRANCH)], joint=True)
    assert list(targets) == [
        f"blocks.{n}.{layer}" for n in (0, 1) for layer in ("attn.q+k+v", "attn.proj", "mlp")
    ]
    whole = targets["blocks.1.mlp"]
    assert (whole.granularity, whole.rank, whole.weights) == (BRANCH, 5, ())
    assert whole.calibrate_macs == 4 * 49 * 5 * (32 + 32)


def test_granularity_branch_takes_every_branch(dit_analysis: Analysis) -> None:
    targets = targets_of(dit_analysis, granularity=BRANCH)
    assert list(targets) == [branch.name for branch in dit_analysis.sites.branches]
    assert {target.granularity for target in targets.values()} == {BRANCH}
    assert {target.rank for target in targets.values()} == {4}
    back = targets_of(
        dit_analysis,
        granularity=BRANCH,
        rules=[SiteRule("*.attn", CALIBRATE, granularity=LINEAR)],
    )
    assert list(back) == [
        f"blocks.{n}.{x}"
        for n in (0, 1)
        for x in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp")
    ]


def test_branch_rule_gives_its_rank_to_the_layers_inside(dit_analysis: Analysis) -> None:
    ranks = ranks_of(dit_analysis, SiteRule("blocks.0.mlp", CALIBRATE, rank=7))
    assert [ranks[f"blocks.{n}.mlp.fc1"] for n in (0, 1)] == [7, 4]


def test_targets_are_in_graph_order(dit_analysis: Analysis) -> None:
    place = {node.name: k for k, node in enumerate(dit_analysis.captured.graph.nodes)}
    rules = [SiteRule("blocks.1.attn", CALIBRATE, 3, BRANCH), SiteRule("blocks.0.attn.q", REUSE)]
    for joint in (False, True):
        targets = targets_of(dit_analysis, rules=rules, joint=joint).values()
        order = [place[target.nodes[0]] for target in targets]
        assert order == sorted(order)


# --- ranks by name ------------------------------------------------------------------------------


def test_ranks_are_those_of_the_targets_they_name_and_of_no_others(dit_analysis: Analysis) -> None:
    asked = {"blocks.0.attn.k": 11, "blocks.1.mlp.fc2": 0}
    before, after = targets_of(dit_analysis), targets_of(dit_analysis, ranks=asked)
    expected = {name: replace(t, rank=asked.get(name, t.rank)) for name, t in before.items()}
    assert after == expected
    assert list(after) == list(before)
    assert targets_of(dit_analysis, ranks={}) == before


def test_ranks_come_before_the_plans_and_before_rules(dit_analysis: Analysis) -> None:
    rules = (
        SiteRule("blocks.0.attn.q", CALIBRATE, rank=9),
        SiteRule("blocks.0.attn.k", REUSE),
        SiteRule("blocks.1.attn", CALIBRATE, 6, BRANCH),
    )
    asked = {"blocks.0.attn.q": 1, "blocks.0.attn.k": 2, "blocks.1.attn": 3, "blocks.1.mlp.fc1": 5}
    ranks = ranks_of(dit_analysis, *rules, ranks=asked)
    assert {name: ranks[name] for name in asked} == asked
    assert (ranks["blocks.0.attn.v"], ranks["blocks.0.mlp.fc1"]) == (4, 4)


@pytest.mark.parametrize("rank", [0, 5, 32])
def test_rank_of_a_group_is_taken_as_it_is(dit_analysis: Analysis, rank: int) -> None:
    name = "blocks.1.attn.q+k+v"
    targets = targets_of(dit_analysis, joint=True, ranks={name: rank})
    assert targets[name].rank == rank  # and not 1.5 times that, as for its members' rank
    assert targets[name].calibrate_macs == 4 * 49 * rank * (32 + 96)
    assert targets["blocks.0.attn.q+k+v"].rank == 6
    assert list(targets) == [f"blocks.{n}.{layer}" for n in (0, 1) for layer in JOINT_LAYERS]


UNKNOWN = {
    "no such layer": ("blocks.7.attn.q", {}),
    "a pattern": ("blocks.*.attn.q", {}),
    "a member of a group": ("blocks.0.attn.q", {"joint": True}),
    "a group of layers that are apart": ("blocks.0.attn.q+k+v", {}),
    "a layer of a whole branch": ("blocks.0.mlp.fc1", {"granularity": BRANCH}),
    "a branch whose layers are targets": ("blocks.0.mlp", {}),
    "a layer left alone": ("blocks.0.mlp.fc1", {"rules": [SiteRule("*.fc1", FULL)]}),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_rank_of_no_target_is_refused_with_the_name(dit_analysis: Analysis, case: str) -> None:
    name, options = UNKNOWN[case]
    targets, _ = assign(dit_analysis.captured, dit_analysis.sites, rank=4, **options)
    some = ", ".join(target.name for target in targets[:4])
    message = refusal(dit_analysis, rank=4, ranks={targets[0].name: 1, name: 2}, **options)
    start = f"plan: rank of {name}: expected a calibration target, got none of that name among "
    assert message.startswith(start)
    assert all(shown in message for shown in some.split(", "))
    assert message.endswith("Take the names from `optimize(model, plan).compiled.targets`.")


@pytest.mark.parametrize(
    ("name", "rank", "form", "options"),
    [
        ("blocks.1.mlp.fc2", 33, "128 -> 32", {}),
        ("blocks.0.mlp.fc1", -1, "32 -> 128", {}),
        ("blocks.0.attn.q+k+v", 33, "32 -> 96", {"joint": True}),
        ("blocks.1.attn", 40, "32 -> 32", {"granularity": BRANCH}),
    ],
)
def test_rank_too_large_is_refused_with_the_name_of_the_target(
    dit_analysis: Analysis, name: str, rank: int, form: str, options: dict[str, Any]
) -> None:
    assert refusal(dit_analysis, rank=4, ranks={name: rank}, **options) == (
        f"plan: rank of {name}: expected 0 .. 32 for {form}, got {rank}. "
        "Choose a smaller rank, or exclude it."
    )


# --- what is refused ----------------------------------------------------------------------------


def test_rule_that_fits_nothing_is_refused(dit_analysis: Analysis) -> None:
    message = refusal(
        dit_analysis, rank=4, rules=[SiteRule("*.attn", FULL), SiteRule("*.query", FULL)]
    )
    assert message.startswith(
        "plan: rule *.query: expected a pattern that fits a site or a residual branch, got none "
        "among blocks.0.attn.q, blocks.0.attn.k, "
    )


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("joint", [False, True])
def test_rank_of_the_plan_is_at_most_the_smaller_side(
    dit_analysis: Analysis, joint: bool, granularity: Granularity
) -> None:
    options = {"joint": joint, "granularity": granularity}
    assert targets_of(dit_analysis, 500, **options) == targets_of(dit_analysis, 32, **options)


@pytest.mark.parametrize("joint", [False, True])
def test_rank_too_large_in_a_rule_is_refused_with_the_name_of_the_layer(
    dit_analysis: Analysis, joint: bool
) -> None:
    rules = [SiteRule("blocks.1.mlp.fc2", CALIBRATE, rank=40)]
    assert refusal(dit_analysis, rank=4, rules=rules, joint=joint) == (
        "plan: rank of blocks.1.mlp.fc2: expected 0 .. 32 for 128 -> 32, got 40. "
        "Choose a smaller rank, or exclude it."
    )


def test_rank_too_large_for_a_branch_is_refused_with_its_name(dit_analysis: Analysis) -> None:
    rules = [SiteRule("blocks.0.attn", CALIBRATE, 33, BRANCH)]
    message = refusal(dit_analysis, rank=4, rules=rules)
    assert message.startswith("plan: rank of blocks.0.attn: expected 0 .. 32 for 32 -> 32, got 33.")


class Narrow(nn.Module):
    """Keys and values of grouped queries: 8 to 4."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return x + self.out(torch.cat([self.k(x), self.v(x)], -1).relu())


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(4, {"k": 4, "v": 4, "out": 4}), (8, {"k": 4, "v": 4, "out": 8}), (3, {"k+v": 4, "out": 3})],
)
def test_siblings_that_are_exact_apart_are_not_made_inexact_together(
    rank: int, expected: dict[str, int]
) -> None:
    targets = targets_of(noise_analysis(Narrow()), rank, joint=True)
    assert {name: target.rank for name, target in targets.items()} == expected


def test_negative_rank_is_refused(dit_analysis: Analysis) -> None:
    assert refusal(dit_analysis, rank=-1) == "plan: rank: expected 0 or more, got -1. Raise rank."


# --- branches that are not token-wise -----------------------------------------------------------


class Turned(nn.Module):
    """A branch whose entry has channels first and whose exit has tokens first; a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.plain = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x).transpose(1, 2))
        x = x.transpose(1, 2) + self.inner(x.transpose(1, 2))
        return torch.tanh(x + self.plain(x))


@pytest.fixture(scope="module")
def turned() -> Analysis:
    return noise_analysis(Turned())


def test_branch_that_is_not_token_wise_falls_back_to_its_layers(turned: Analysis) -> None:
    first, second = turned.sites.branches
    targets, rejections = assign(turned.captured, turned.sites, rank=2, granularity=BRANCH)
    assert [(t.name, t.granularity) for t in targets] == [("inner", LINEAR), (second.name, BRANCH)]
    assert rejections == (
        Rejection(
            first.name, first.exits[0], "not token-wise as a whole: from (2, 8, 5) to (2, 5, 8)"
        ),
    )


def test_branch_that_is_not_token_wise_can_be_reused(turned: Analysis) -> None:
    first = turned.sites.branches[0]
    targets, rejections = assign(
        turned.captured, turned.sites, rank=2, rules=[SiteRule(first.name, REUSE)]
    )
    assert rejections == ()
    assert [(t.name, t.granularity, t.rank) for t in targets] == [
        (first.name, BRANCH, 0),
        ("plain", LINEAR, 2),
    ]


# --- branches with several exits or entries -----------------------------------------------------


class Parallel(nn.Module):
    """Two layers side by side with a common norm, both added: one branch with two exits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.left, self.right = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n = F.layer_norm(x, (8,))
        return x + self.left(n) + self.right(n)


class TwoEntries(Parallel):
    """A branch that reads two latent values."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(self.embed(x), (8,))
        return y + self.right(y * self.left(x))


@pytest.mark.parametrize("model", [Parallel(), TwoEntries()], ids=["two exits", "two entries"])
def test_branch_with_several_exits_or_entries_falls_back_to_its_layers(model: nn.Module) -> None:
    analysis = noise_analysis(model)
    (branch,) = analysis.sites.branches
    targets, rejections = assign(analysis.captured, analysis.sites, rank=2, granularity=BRANCH)
    assert [(t.name, t.granularity) for t in targets] == [("left", LINEAR), ("right", LINEAR)]
    reason = "not one map as a whole: several latent values go in or come out"
    assert rejections == (Rejection(branch.name, branch.exits[0], reason),)


@pytest.mark.parametrize("model", [Parallel(), TwoEntries()], ids=["two exits", "two entries"])
def test_branch_with_several_exits_or_entries_can_be_reused(model: nn.Module) -> None:
    analysis = noise_analysis(model)
    (branch,) = analysis.sites.branches
    (target,), rejections = assign(
        analysis.captured, analysis.sites, rank=2, rules=[SiteRule(branch.name, REUSE)]
    )
    assert rejections == ()
    assert (target.granularity, target.rank, target.sites) == (BRANCH, 0, ("left", "right"))
    assert target.nodes == branch.exits
    assert target.out_features == (8,) * len(branch.exits)


# --- layers between branches --------------------------------------------------------------------


class Between(nn.Module):
    """A layer on the stream itself, between two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.second = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(torch.tanh(x + self.first(x)))
        return x + self.second(x)


@pytest.mark.parametrize("joint", [False, True])
def test_layer_between_branches_is_a_target_at_its_place(joint: bool) -> None:
    analysis = noise_analysis(Between())
    targets = targets_of(analysis, 3, joint=joint, granularity=BRANCH)
    assert [(t.name, t.granularity) for t in targets.values()] == [
        ("first", BRANCH),
        ("between", LINEAR),
        ("second", BRANCH),
    ]


def test_rules_name_layers_between_branches() -> None:
    analysis = noise_analysis(Between())
    assert ranks_of(analysis, SiteRule("between", REUSE)) == {"first": 4, "between": 0, "second": 4}
    assert list(ranks_of(analysis, SiteRule("between", FULL))) == ["first", "second"]
    assert ranks_of(analysis, SiteRule("between", CALIBRATE, rank=7))["between"] == 7


def test_int8_calibrates_every_layer_by_itself(dit_analysis: Analysis) -> None:
    """Siblings share no factors there, whatever `joint` says, and there is no rank."""
    targets = targets_of(dit_analysis, branch=BranchKind.INT8, joint=True)
    assert list(targets) == [f"blocks.{n}.{layer}" for n in (0, 1) for layer in LAYERS]
    assert {(t.rank, t.branch, t.granularity) for t in targets.values()} == {
        (0, BranchKind.INT8, LINEAR)
    }
    query = targets["blocks.0.attn.q"]
    assert query.corrects
    assert query.calibrate_macs == query.tokens * query.in_features * query.out_features[0]


def test_rules_choose_the_kind_of_branch(dit_analysis: Analysis) -> None:
    rules = (
        SiteRule("blocks.0.attn", CALIBRATE, branch=BranchKind.INT8),
        SiteRule("blocks.0.mlp", REUSE, branch=BranchKind.INT8),
        SiteRule("blocks.1.attn", CALIBRATE, granularity=BRANCH),
    )
    targets = targets_of(dit_analysis, rules=rules)
    kinds = {name: (t.branch.value, t.granularity.value, t.rank) for name, t in targets.items()}
    assert kinds == {
        **{f"blocks.0.{layer}": ("int8", "linear", 0) for layer in LAYERS[:4]},
        "blocks.0.mlp": ("low_rank", "branch", 0),
        "blocks.1.attn": ("low_rank", "branch", 4),
        **{f"blocks.1.{layer}": ("low_rank", "linear", 4) for layer in LAYERS[4:]},
    }


def test_int8_has_no_rank_and_no_whole_branch(dit_analysis: Analysis) -> None:
    text = refusal(dit_analysis, rank=4, branch=BranchKind.INT8, ranks={"blocks.0.attn.q": 2})
    assert "none for a calibration branch of int8" in text
    with pytest.raises(PlanError, match="needs the weight of a linear layer"):
        SiteRule("*", CALIBRATE, granularity=BRANCH, branch=BranchKind.INT8)
