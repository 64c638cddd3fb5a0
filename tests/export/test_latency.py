"""Measured steps: a row for every group and treatment, their sums, tables as files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calicache.export import Layout, read_manifest
from calicache.export.latency import measure_latency
from calicache.graph_passes import Plan, Recording, StepMode, record
from calicache.graph_passes.api.speed.cases import Case, latency_cases, latency_schedule
from calicache.graph_passes.common.disk.hashing import hash_weights
from calicache.graph_passes.common.errors import BenchError, ExportError, PlanError
from calicache.graph_passes.settings.latency import (
    EVERY,
    BranchChoice,
    LatencyRow,
    LatencyTable,
    group_of,
)
from calicache.graph_passes.sites.analysis import analyse

BATCH, TOKENS, WIDTH, STEPS = 2, 6, 8, 6
ROWS, BLOCKS, RANK = BATCH * TOKENS, 2, 4
FULL, LINEAR, INT8, BRANCH, REUSE = BranchChoice
R, C, U, F = StepMode
FF, MIX = "blocks.*.ff", "blocks.*.mix"


class Mix(nn.Module):
    """Reads the stream and the first tokens: two latent values, no map as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(x)) * self.b(x) + first)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = Mix()
        self.ff = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        x = x + self.mix(x, first)
        return x + self.ff(x)


class TextMixer(nn.Module):
    """Two blocks with a layer between them on the stream; the text is projected once a run."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.caption = nn.Linear(1, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.between = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        first = x + self.time(timestep[:, None])[:, None] + self.caption(text)[:, None]
        x = self.blocks[0](first, first)
        return self.blocks[1](self.between(x), first)


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement and what was seen of it."""

    table: LatencyTable
    folder: Path
    seen: list[tuple[int, int]]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return TextMixer().eval()


@pytest.fixture(scope="module")
def recording(model: nn.Module) -> Recording:
    torch.manual_seed(1)
    x, text = torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, WIDTH)
    with record(model) as recorded, torch.no_grad():
        for step in range(STEPS):
            x = x - 0.1 * model(x, torch.full((BATCH,), 1 - step / STEPS), text)
    return recorded


@pytest.fixture(scope="module")
def measured(
    model: nn.Module, recording: Recording, tmp_path_factory: pytest.TempPathFactory
) -> Measured:
    folder, seen = tmp_path_factory.mktemp("latency"), list[tuple[int, int]]()
    table = measure_latency(
        model,
        recording,
        ranks=(RANK,),
        repeats=2,
        path=folder,
        on_progress=lambda progress: seen.append((progress.done, progress.total)),
    )
    return Measured(table, folder, seen)


@pytest.fixture(scope="module")
def cases(model: nn.Module, recording: Recording) -> Callable[..., list[Case]]:
    plan = Plan.from_trajectory(model, recording, rank=0, correct=False)
    analysis = analyse(model, plan.binding)

    def make(ranks: tuple[int, ...] | None = None, *, keeps: bool = True) -> list[Case]:
        return list(latency_cases(analysis.captured, analysis.sites, ranks, keeps=keeps))

    return make


def row(group: str, choice: BranchChoice, macs: int, refresh: float, step: float) -> LatencyRow:
    return LatencyRow(group, choice, macs, refresh, step)


@pytest.fixture
def table() -> LatencyTable:
    """Seconds are binary fractions: all that is made of them is exact, so rtol = atol = 0."""
    rows = (
        row(FF, LINEAR, 300, 1.5, 0.75),
        row(FF, LINEAR, 100, 1.25, 0.5),
        row(FF, BRANCH, 64, 1.125, 0.25),
        row(FF, REUSE, 0, 1.0625, 0.125),
    )
    return LatencyTable("abc", "a runtime", 2, 1.0, 0.0625, rows, {"processor": "one"})


@pytest.mark.slow
def test_every_group_and_treatment_has_a_row(measured: Measured) -> None:
    assert [(row.group, row.choice) for row in measured.table.rows] == [
        (EVERY, FULL),
        (MIX, LINEAR),  # and no BRANCH: two latent values go in
        (MIX, INT8),
        (MIX, REUSE),
        (FF, LINEAR),
        (FF, BRANCH),
        (FF, INT8),
        (FF, REUSE),
    ]


@pytest.mark.slow
def test_seconds_are_positive_and_finite(measured: Measured) -> None:
    seconds = [measured.table.plain, measured.table.forecast]
    seconds += [value for row in measured.table.rows for value in (row.refresh, row.step)]
    assert all(value > 0 and math.isfinite(value) for value in seconds)


@pytest.mark.slow
def test_macs_are_those_of_the_calibration_branches(measured: Measured) -> None:
    macs = {(row.group, row.choice): row.macs for row in measured.table.rows}
    layers = RANK * ((WIDTH + 2 * WIDTH) + (2 * WIDTH + WIDTH))
    joint = RANK * 2 * (WIDTH + WIDTH) // (WIDTH + 2 * WIDTH)  # a and b, at the same MACs
    mixed = joint * (WIDTH + 2 * WIDTH) + RANK * (WIDTH + WIDTH)
    assert macs == {
        (EVERY, FULL): 0,
        (MIX, LINEAR): ROWS * BLOCKS * mixed,
        (MIX, INT8): ROWS * BLOCKS * 3 * WIDTH * WIDTH,
        (MIX, REUSE): 0,
        (FF, LINEAR): ROWS * BLOCKS * layers,
        (FF, BRANCH): ROWS * BLOCKS * RANK * (WIDTH + WIDTH),
        (FF, INT8): ROWS * BLOCKS * 2 * WIDTH * 2 * WIDTH,
        (FF, REUSE): 0,
    }


@pytest.mark.slow
def test_table_says_what_was_measured_where(measured: Measured, model: nn.Module) -> None:
    table = measured.table
    assert (table.weights_hash, table.order) == (hash_weights(model), 2)
    assert table.runtime.startswith("ONNX Runtime ")
    assert table.runtime.endswith(", CPUExecutionProvider")
    assert all(isinstance(value, str) and value for value in table.environment.values())
    assert {"processor", "cores", "torch", "onnxruntime"} < set(table.environment)
    assert float(table.environment["plain_spread"]) >= 0


@pytest.mark.slow
def test_every_row_and_the_forecast_are_reported(measured: Measured) -> None:
    total = len(measured.table.rows) + 1
    # Told when a row begins and when it ends.
    assert sorted(set(measured.seen)) == [(done, total) for done in range(total + 1)]
    assert measured.seen == sorted(measured.seen)


@pytest.mark.slow
def test_artifacts_are_the_plain_model_and_the_last_row(measured: Measured) -> None:
    plain, last = (read_manifest(measured.folder / name) for name in ("plain", "row"))
    assert sorted(path.name for path in measured.folder.iterdir()) == ["plain", "row"]
    assert set(plain.schedule) == {R}
    assert (plain.layout, plain.caches) == (Layout.STEP, ())
    assert last.schedule == (R, C, R, C, R, C)
    assert [target.name for target in last.targets] == ["blocks.0.ff", "blocks.1.ff"]
    assert [target.rank for target in last.targets] == [0, 0]


@pytest.mark.slow
def test_measured_table_survives_a_file(measured: Measured, tmp_path: Path) -> None:
    measured.table.save(tmp_path / "latency.json")
    assert LatencyTable.load(tmp_path / "latency.json") == measured.table


@pytest.mark.slow
def test_every_case_treats_its_group_alone(cases: Callable[..., list[Case]]) -> None:
    for case in cases():
        treated = {site for target in case.targets for site in target.sites}
        inside = case.group.replace("*", "{}")
        layers = {FF: ("0", "2"), MIX: ("a", "b", "out"), EVERY: ()}[case.group]
        expected = {f"{inside.format(n)}.{name}" for n in range(BLOCKS) for name in layers}
        assert treated == expected


def test_step_that_treats_nothing_is_measured_where_a_run_keeps_values(
    cases: Callable[..., list[Case]],
) -> None:
    first, *others = cases(keeps=True)
    assert (first.group, first.choice, first.targets) == (EVERY, FULL, ())
    assert others == cases(keeps=False)


def test_siblings_are_measured_together_as_plans_run_them(
    cases: Callable[..., list[Case]],
) -> None:
    case = next(case for case in cases() if (case.group, case.choice) == (MIX, LINEAR))
    names = [target.name for target in case.targets]
    assert names == [f"blocks.{n}.mix.{name}" for n in range(BLOCKS) for name in ("a+b", "out")]


def test_ranks_are_two_by_the_width(cases: Callable[..., list[Case]]) -> None:
    assert [(case.group, case.choice, case.rank) for case in cases() if case.rank] == [
        (MIX, LINEAR, 4),
        (MIX, LINEAR, 8),
        (FF, LINEAR, 4),
        (FF, LINEAR, 8),
        (FF, BRANCH, 4),
        (FF, BRANCH, 8),
    ]


def test_ranks_above_the_layers_are_measured_once(cases: Callable[..., list[Case]]) -> None:
    ranks = [case.rank for case in cases((3, 8, 64, 100)) if case.choice is BRANCH]
    assert ranks == [3, 8]


@pytest.mark.parametrize(
    ("steps", "order", "expected"),
    [
        (35, 2, (R, C, C, R, C, C, R, C, C)),
        (8, 2, (R, C, R, C, R, C)),
        (5, 2, (R, R, R, C)),
        (4, 2, (R, R, R, C)),
        (7, 1, (R, C, C, R, C, C)),
        (2, 0, (R, C)),
    ],
)
def test_schedule_fills_what_is_kept_and_ends_cheap(
    steps: int, order: int, expected: tuple[StepMode, ...]
) -> None:
    assert latency_schedule(steps, order) == expected


@pytest.mark.slow
def test_run_too_short_for_the_order_is_refused(model: nn.Module, recording: Recording) -> None:
    short = Recording(recording.calls[:3], recording.signature)
    with pytest.raises(BenchError, match="4 steps or more, got 3"):
        measure_latency(model, short)


@pytest.mark.slow
def test_unknown_order_is_refused(model: nn.Module, recording: Recording) -> None:
    with pytest.raises(PlanError, match=r"order: expected 0 \.\. 2, got 3"):
        measure_latency(model, recording, order=3)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"ranks": (4, 0)}])
def test_nothing_to_measure_is_refused(
    model: nn.Module, recording: Recording, wrong: dict[str, object]
) -> None:
    with pytest.raises(BenchError, match="expected 1 or more, got 0"):
        measure_latency(model, recording, **wrong)


@pytest.mark.slow
def test_unknown_provider_is_refused(model: nn.Module, recording: Recording) -> None:
    with pytest.raises(ExportError, match=r"CPUExecutionProvider.*got 'FastProvider'"):
        measure_latency(model, recording, provider="FastProvider")


@pytest.mark.parametrize(
    ("macs", "change"), [(100, -0.5), (200, -0.375), (300, -0.25), (0, -0.625), (700, 0.25)]
)
def test_step_change_is_a_straight_line_over_macs(
    table: LatencyTable, macs: int, change: float
) -> None:
    assert table.step_change(FF, LINEAR, macs) == change


@pytest.mark.parametrize(("macs", "change"), [(100, 0.25), (200, 0.375), (300, 0.5)])
def test_refresh_change_reads_the_other_column(
    table: LatencyTable, macs: int, change: float
) -> None:
    assert table.refresh_change(FF, LINEAR, macs) == change


@pytest.mark.parametrize(("choice", "change"), [(BRANCH, -0.75), (REUSE, -0.875), (FULL, 0.0)])
def test_one_row_stands_for_all_ranks(
    table: LatencyTable, choice: BranchChoice, change: float
) -> None:
    assert [table.step_change(FF, choice, macs) for macs in (0, 64, 1000)] == [change] * 3


def test_what_was_not_measured_is_none(table: LatencyTable) -> None:
    assert table.step_change(MIX, LINEAR, 100) is None
    assert table.refresh_change(MIX, REUSE, 0) is None


def test_changes_are_against_the_step_that_treats_nothing(table: LatencyTable) -> None:
    assert (table.full_step, table.full_refresh) == (1.0, 1.0)
    full = replace(table, rows=(*table.rows, row(EVERY, FULL, 0, 1.0625, 0.875)))
    assert (full.full_step, full.full_refresh) == (0.875, 1.0625)
    assert full.step_change(FF, BRANCH, 64) == 0.25 - 0.875
    assert full.refresh_change(FF, BRANCH, 64) == 1.125 - 1.0625


def test_a_step_with_every_group_so_treated_is_told_at_the_least_and_the_most_rank(
    table: LatencyTable,
) -> None:
    assert table.step_shares(LINEAR) == (0.5, 0.75)
    assert table.step_shares(INT8) is None
    both = replace(table, plain=2.0, rows=(*table.rows, row(MIX, REUSE, 0, 1.0, 0.5)))
    assert both.step_shares(REUSE) == ((2.0 - 1.875 - 1.5) / 2,) * 2  # each against a plain step


@pytest.mark.parametrize(
    ("branch", "group"),
    [
        ("blocks.3.attn", FF.replace("ff", "attn")),
        ("blocks.12", "blocks.*"),
        ("blocks.0@1", "blocks.*@*"),
        ("stages.1.blocks.10.ff", "stages.*.blocks.*.ff"),
        ("0.ff", "*.ff"),
        ("model", "model"),
        ("transformer_blocks.7.attn1", "transformer_blocks.*.attn1"),
    ],
)
def test_group_is_the_name_without_its_indices(branch: str, group: str) -> None:
    assert group_of(branch) == group


def test_table_survives_a_file(table: LatencyTable, tmp_path: Path) -> None:
    table.save(tmp_path / "new" / "latency.json")
    assert LatencyTable.load(tmp_path / "new" / "latency.json") == table


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_seconds_that_cannot_be_are_refused(table: LatencyTable, value: float) -> None:
    with pytest.raises(PlanError, match="above 0 and finite"):
        replace(table, plain=value)
    with pytest.raises(PlanError, match="above 0 and finite"):
        replace(table, rows=(row(FF, REUSE, 0, 1.0, value),))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace('"format": 2', '"format": 1'),
        lambda text: text.replace('"kind"', '"kinds"'),
        lambda text: text.replace('"order"', '"older"'),
        lambda text: text.replace('"macs": 0', '"macs": -1'),
        lambda _: "[" * 100_000,
        lambda text: text.replace('"reuse"', '"skip"'),
        lambda text: text.replace('"plain": 1.0', '"plain": "fast"'),
        lambda text: text.replace('"plain": 1.0', '"plain": -1.0'),
        lambda text: text.replace('"plain": 1.0', '"plain": NaN'),
        lambda text: json.dumps([text]),
        lambda _: "null",
        lambda _: "",
    ],
)
def test_damaged_file_is_refused(
    table: LatencyTable, tmp_path: Path, damage: Callable[[str], str]
) -> None:
    path = tmp_path / "latency.json"
    table.save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(PlanError, match=r"a latency table written by LatencyTable\.save"):
        LatencyTable.load(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="FileNotFoundError"):
        LatencyTable.load(tmp_path / "latency.json")
