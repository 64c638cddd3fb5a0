"""What cheap steps cost in measured seconds."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from support.search.known import ORDER, Known

from calicache.graph_passes import LatencyTable, StepMode
from calicache.graph_passes.search.allocate import Allocation, BranchOption, allocate
from calicache.graph_passes.search.costs import int8_allocation, latency_shares
from calicache.graph_passes.settings.choices import BranchKind
from calicache.graph_passes.settings.latency import EVERY, BranchChoice, LatencyRow, group_of
from calicache.graph_passes.sites.targets import assign

R, C, U, FORECAST = StepMode
FULL, LINEAR, INT8, BRANCH, REUSE = BranchChoice
# Sums of fewer than 100 doubles.
EXACT = {"rel_tol": 1e-9, "abs_tol": 1e-12}


def table_of(*rows: LatencyRow, full: float = 0.98, full_refresh: float = 1.02) -> LatencyTable:
    """Seconds for a plain step of 0.1: shares of it are given."""
    every = LatencyRow(EVERY, FULL, 0, full_refresh, full)
    scaled = [replace(r, refresh=0.1 * r.refresh, step=0.1 * r.step) for r in (every, *rows)]
    return LatencyTable("hash", "a runtime", ORDER, 0.1, 0.001, tuple(scaled))


ROWS = (
    LatencyRow("blocks.*.attn", LINEAR, 10_000, 1.05, 0.80),
    LatencyRow("blocks.*.attn", LINEAR, 50_000, 1.07, 0.90),
    LatencyRow("blocks.*.attn", REUSE, 0, 1.03, 0.60),
    LatencyRow("blocks.*.mlp", BRANCH, 30_000, 1.04, 0.70),
    LatencyRow("blocks.*.mlp", REUSE, 0, 1.025, 0.55),
    LatencyRow("blocks.*.other", REUSE, 0, 2.0, 0.1),
)


def test_only_measured_choices_appear(dit_known: Known) -> None:
    options = dit_known.options(table_of(*ROWS))
    assert {name: [o.choice for o in choices] for name, choices in options.items()} == {
        "blocks.0.attn": [FULL, LINEAR, REUSE],
        "blocks.0.mlp": [FULL, BRANCH, REUSE],
        "blocks.1.attn": [FULL, LINEAR, REUSE],
        "blocks.1.mlp": [FULL, BRANCH, REUSE],
    }
    assert {o.choice for choices in dit_known.options(table_of()).values() for o in choices} == {
        FULL
    }


def test_sites_outside_of_branches_are_left_alone_where_seconds_count(text_known: Known) -> None:
    options = text_known.options(table_of())
    assert options["between"] == [BranchOption(FULL, 0.0, patterns=("between",))]


@pytest.mark.parametrize("places", [(0, 0), (1, 1), (1, 3), (4, 2)])
def test_seconds_add_up_to_the_measured_line(dit_known: Known, places: tuple[int, int]) -> None:
    table = table_of(*ROWS)
    options = dit_known.options(table)
    for group, choice in [("attn", LINEAR), ("mlp", BRANCH), ("attn", REUSE), ("mlp", REUSE)]:
        cost, macs = 0.0, 0
        for number, place in enumerate(places):
            choices = options[f"blocks.{number}.{group}"]
            (option,) = [o for o in choices if o.choice is choice]
            own = place if choice is not REUSE else 0
            own_macs = sum(replace(c.target, rank=8 * own).calibrate_macs for c in option.curves)
            cost, macs = cost + option.cost + option.per_mac * own_macs, macs + own_macs
        # Both blocks treated alike: the table's own line, in plain steps.
        change = table.step_change(f"blocks.*.{group}", choice, macs)
        assert change is not None
        assert math.isclose(cost, change / 0.1, rel_tol=1e-9, abs_tol=1e-9)


def test_straight_line_goes_through_the_measured_rows(dit_known: Known) -> None:
    linear = dit_known.options(table_of(*ROWS))["blocks.1.attn"][1]
    # 0.80 at 10,000 MACs and 0.90 at 50,000: 0.775 at none, 0.205 below a full step; two blocks.
    assert math.isclose(linear.cost, -0.205 / 2, rel_tol=1e-9)
    assert math.isclose(linear.per_mac, 0.1 / 40_000, rel_tol=1e-9)
    whole = dit_known.options(table_of(*ROWS))["blocks.1.mlp"][1]
    assert (math.isclose(whole.cost, -0.28 / 2, rel_tol=1e-9), whole.per_mac) == (True, 0.0)


def test_larger_ranks_that_were_measured_faster_are_taken_for_equal(dit_known: Known) -> None:
    noisy = [replace(row, step=1.7 - row.step) if row.choice is LINEAR else row for row in ROWS]
    linear = dit_known.options(table_of(*noisy))["blocks.0.attn"][1]
    # 0.90 at 10,000 MACs and 0.80 at 50,000: 0.925 at none.
    assert math.isclose(linear.cost, (0.925 - 0.98) / 2, rel_tol=1e-9)
    assert linear.per_mac == 0.0


@pytest.mark.parametrize("wanted", [0.3, 0.5, 0.7, 0.9, 1.0])
def test_allocation_in_seconds_keeps_to_its_budget(dit_known: Known, wanted: float) -> None:
    table = table_of(*ROWS)
    got = allocate(dit_known.options(table), wanted, table.full_step / table.plain)
    assert got.cost <= wanted or math.isclose(got.cost, 0.98 - 0.38 - 0.43, **EXACT)
    # Again from the table: every group's change, for the MACs that were given to it.
    total, given = table.full_step, Counter[tuple[str, BranchChoice]]()
    for target in dit_known.planned(got):
        owner = next(b for b in got.choices if target.name.startswith(b))
        given[group_of(owner), got.choices[owner]] += target.calibrate_macs
    counts = Counter((group_of(name), choice) for name, choice in got.choices.items())
    for (group, choice), count in counts.items():
        none = table.step_change(group, choice, 0)
        some = table.step_change(group, choice, given[group, choice])
        assert none is not None
        assert some is not None
        total += none * count / 2 + some - none
    assert math.isclose(got.cost, total / table.plain, rel_tol=1e-9)


def test_shares_in_seconds_add_up_over_the_groups(dit_known: Known) -> None:
    table = table_of(*ROWS)
    choices = {
        "blocks.0.attn": LINEAR,
        "blocks.1.attn": FULL,
        "blocks.0.mlp": REUSE,
        "blocks.1.mlp": BRANCH,
        "a site outside": LINEAR,
    }
    allocation = Allocation((), {}, choices, 0.65, 0.0)
    shares = latency_shares(dit_known.sites, table, (C, U), allocation)
    # Shares of a plain step, from the rows: REUSE of both groups, against a full step of 0.98.
    assert math.isclose(shares.steps[U], 0.60 + 0.55 - 0.98, **EXACT)
    assert math.isclose(shares.steps[FORECAST], 0.01, **EXACT)
    assert shares.steps[C] == 0.65
    assert math.isclose(shares.kept, 0.02, **EXACT)  # a full REFRESH of 1.02
    assert math.isclose(shares.caches[U], 0.01 + 0.005, **EXACT)
    assert shares.caches[FORECAST] == 0.0
    # Against a full REFRESH of 1.02: LINEAR at no MACs 1.045, REUSE 1.025, BRANCH 1.04; each
    # is half of its group.
    written = (0.025 + 0.005 + 0.02) / 2
    assert math.isclose(shares.caches[C], written, **EXACT)
    # What FULL steps read is kept once, whatever modes there are.
    both = (1.0 + 0.02 + 0.015 + written + shares.steps[C] + shares.steps[U]) / 3
    assert math.isclose(shares.run_share((R, C, U), 2), both, **EXACT)
    assert shares.run_share((R, FORECAST), 2) == 0.505


def test_only_modes_that_are_there_have_shares_in_seconds(dit_known: Known) -> None:
    table = table_of(*ROWS)
    assert set(latency_shares(dit_known.sites, table, (), None).steps) == {FORECAST}
    assert set(latency_shares(dit_known.sites, table, (U,), None).steps) == {U, FORECAST}
    both = latency_shares(dit_known.sites, table, (C,), Allocation((), {}, {}, 0.5, 0.0))
    assert set(both.steps) == {C, FORECAST}


def test_reuse_with_a_group_that_was_not_measured_is_out_of_reach(dit_known: Known) -> None:
    shares = latency_shares(dit_known.sites, table_of(*ROWS[:3]), (U,), None)
    assert shares.steps[U] == math.inf
    assert shares.run_share((R, U), 2) == math.inf
    assert shares.run_share((R, FORECAST), 2) == 0.505


def test_shares_in_seconds_are_never_negative(dit_known: Known) -> None:
    quick = [LatencyRow(f"blocks.*.{part}", REUSE, 0, 0.9, 0.2) for part in ("attn", "mlp")]
    shares = latency_shares(
        dit_known.sites, table_of(*quick), (C, U), Allocation((), {}, {}, -0.1, 0.0)
    )
    assert min(shares.steps.values()) == 0.0
    assert (shares.caches[U], shares.steps[C], shares.steps[U]) == (0.0, 0.0, 0.0)


def test_int8_is_taken_where_it_gains(dit_known: Known) -> None:
    """Attention gains a fifth of a step in both blocks together, the perceptrons lose."""
    gains = LatencyRow("blocks.*.attn", INT8, 70_000, 1.05, 0.78)
    loses = LatencyRow("blocks.*.mlp", INT8, 90_000, 1.05, 0.99)
    table = table_of(gains, loses)
    allocation = int8_allocation(dit_known.analysis, table)
    assert allocation is not None
    assert allocation.choices == {
        "blocks.0.attn": INT8,
        "blocks.0.mlp": FULL,
        "blocks.1.attn": INT8,
        "blocks.1.mlp": FULL,
    }
    assert math.isclose(allocation.cost, 0.78, **EXACT)
    shares = latency_shares(dit_known.sites, table, {C}, allocation)
    assert math.isclose(shares.steps[C], 0.78, **EXACT)
    assert math.isclose(shares.caches[C], 0.03, **EXACT)  # 1.05 where a REFRESH takes 1.02
    targets, rejections = assign(
        dit_known.captured, dit_known.sites, rank=8, rules=allocation.rules, joint=True
    )
    assert rejections == ()
    assert {(t.sites[0].rpartition(".")[0], t.branch) for t in targets} == {
        ("blocks.0.attn", BranchKind.INT8),
        ("blocks.1.attn", BranchKind.INT8),
    }


@pytest.mark.parametrize(
    "rows", [(), (LatencyRow("blocks.*.attn", INT8, 70_000, 1.05, 0.98),)], ids=["none", "slow"]
)
def test_int8_is_left_where_nothing_gains(dit_known: Known, rows: tuple[LatencyRow, ...]) -> None:
    assert int8_allocation(dit_known.analysis, table_of(*rows)) is None


def test_int8_leaves_sites_outside_of_branches_alone(text_known: Known) -> None:
    groups = {group_of(branch.name) for branch in text_known.sites.branches}
    table = table_of(*(LatencyRow(group, INT8, 70_000, 1.05, 0.78) for group in groups))
    allocation = int8_allocation(text_known.analysis, table)
    assert allocation is not None
    assert allocation.choices["between"] is FULL
