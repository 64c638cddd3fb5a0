"""The grid's parts: its cells, samplers, rows, FID, report; and rows run as they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cells import BUDGETS, CELLS, Cell
from frechet import FrechetDistance
from grid_report import best_row, write_report
from rows import (
    AtOutput,
    Fewer,
    Planned,
    Row,
    Searched,
    Shares,
    computed_steps,
    even_schedules,
    grid_rows,
    shares_of,
)
from runs import BATCH, Bench, Material, prepare, prepare_material
from schedulers import NOISE, SCHEDULERS, denoise
from subjects import load_subject
from torch import Tensor

from calicache import LatencyTable, StepMode
from calicache.graph_passes.settings.latency import EVERY, BranchChoice, LatencyRow

CELL = Cell("fashion", "DPM-Solver++ 2M", 6, 1.5)
TABLE = LatencyTable(
    weights_hash="0" * 64,
    runtime="made up",
    order=2,
    plain=1.0,
    forecast=0.01,
    rows=(
        LatencyRow(EVERY, BranchChoice.FULL, 0, 1.0, 1.0),
        LatencyRow("blocks.*.attn", BranchChoice.REUSE, 0, 1.04, 0.6),
        LatencyRow("blocks.*.mlp", BranchChoice.REUSE, 0, 1.06, 0.5),
        LatencyRow("blocks.*.mlp", BranchChoice.LINEAR, 10, 1.1, 0.7),
        LatencyRow("blocks.*.mlp", BranchChoice.LINEAR, 90, 1.2, 0.9),
    ),
)


def test_every_cell_has_a_name_and_a_sampler_of_its_own() -> None:
    assert len({cell.key for cell in CELLS}) == len(CELLS) == 18
    assert {cell.sampler for cell in CELLS} == set(SCHEDULERS)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_samplers_find_what_a_perfect_model_knows(sampler: str, scale: float) -> None:
    clean = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    betas = torch.linspace(NOISE["beta_start"], NOISE["beta_end"], 1000, dtype=torch.float64)
    alphas = (1 - betas).cumprod(0).float()
    sizes: list[int] = []

    def perfect(hidden_states: Tensor, timestep: Tensor, name: Tensor) -> Tensor:
        sizes.append(len(hidden_states))
        known = clean.repeat(len(hidden_states) // 2, 1, 1, 1)
        if "flow" in sampler or sampler == "Euler":
            share = (timestep / 1000).float().view(-1, 1, 1, 1)
            answer = (hidden_states - known) / share
        else:
            alpha = alphas[timestep].view(-1, 1, 1, 1)
            answer = (hidden_states - alpha.sqrt() * known) / (1 - alpha).sqrt()
        return answer * torch.where(name < 0, 0.5, 1.0).view(-1, 1, 1, 1)

    labels = torch.tensor([3, 4])
    # Half an answer unconditionally: a guidance of 3 makes two of it, so 1 alone is perfect.
    nulls = torch.full((2,), -1) if scale == 1 else labels
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    image = denoise(perfect, noise, ("name", labels, nulls), sampler, 10, scale)
    assert sizes == [2 if scale == 1 else 4] * 10
    # float32 with divisions by sqrt(alpha_bar(999)) = 0.006; DPM-Solver++ takes the first latent
    # of a flow for one with a noise share of 0.999.
    torch.testing.assert_close(image, clean, rtol=0, atol=4e-3)


def test_guidance_weighs_both_halves() -> None:
    scales = []
    for scale in (2.0, 5.0):
        labels, nulls = torch.ones(1), torch.zeros(1)

        def velocity(hidden_states: Tensor, timestep: Tensor, name: Tensor) -> Tensor:
            return name.view(-1, 1, 1, 1).expand(len(name), 1, 2, 2)

        noise = torch.zeros(1, 1, 2, 2)
        image = denoise(velocity, noise, ("name", labels, nulls), "Euler", 4, scale)
        scales.append(float(image.mean()))
    # From 0 along the velocity 0 + scale (1 - 0), for a time of 1: exact in float32.
    assert scales == pytest.approx([-2.0, -5.0], abs=1e-5)


def test_rows_stay_within_their_budget_of_time() -> None:
    outputs = torch.randn(35, 2, 8, generator=torch.Generator().manual_seed(0))
    rows = grid_rows(CELLS[1], TABLE, outputs, 4)
    assert len({row.key for row in rows}) == len(rows)
    families = Counter(row.family for row in rows)
    assert families["searched"] == families["ours, even FORECAST"] == len(BUDGETS)
    assert {"Spectrum", "L2P", "DMD", "FoCa", "TaylorSeer-Lite", "paper, increment"} <= set(
        families
    )
    for row in rows:
        if isinstance(row.way, Fewer):
            assert row.way.steps <= 35 * row.budget
        if isinstance(row.way, AtOutput):
            most = 35 * (row.budget - 0.01) / 0.99
            counts = [len(computed_steps(schedule)) for schedule in row.schedules]
            assert all(most / 2 < count <= most for count in counts)
    assert not any(row.is_ours for row in rows if isinstance(row.way, AtOutput | Fewer))
    assert [row.label for row in rows if row.family == "ours, int8"] == [
        "interval 3",
        "interval 6",
        "interval 12",
    ]


def test_shares_add_up_over_the_groups_at_the_smallest_rank() -> None:
    # rtol of float64 sums.
    reuse, linear = shares_of(TABLE, BranchChoice.REUSE), shares_of(TABLE, BranchChoice.LINEAR)
    assert (reuse.refresh, reuse.step) == pytest.approx((1.1, 0.1), rel=1e-12)
    assert (linear.refresh, linear.step) == pytest.approx((1.1, 0.7), rel=1e-12)
    with pytest.raises(ValueError, match="int8"):
        shares_of(TABLE, BranchChoice.INT8)
    # 3 REFRESH steps at 1.1 and 7 at 0.1 take 0.4 of ten steps.
    assert Shares(1.1, 0.1).refreshes(10, 0.4) == 3
    assert Shares(1.1, 0.1).refreshes(10, 0.399) == 2


def test_even_schedules_go_to_the_last_step_or_keep_an_interval() -> None:
    spread, interval = even_schedules(10, 3, StepMode.FORECAST)
    assert computed_steps(spread) == [0, 4, 9]
    assert computed_steps(interval) == [0, 4, 8]
    assert len(even_schedules(8, 8, StepMode.FORECAST)) == 1


def test_distance_is_that_of_normal_distributions() -> None:
    draw = torch.Generator().manual_seed(0)
    first = torch.randn(4000, 3, generator=draw, dtype=torch.float64)
    first = (first - first.mean(0)) @ torch.linalg.inv(
        torch.linalg.cholesky(torch.cov((first - first.mean(0)).T))
    ).T
    scales, shift = torch.tensor([[1.0, 2.0, 0.5], [0.3, 0.0, -0.4]], dtype=torch.float64)
    distance = FrechetDistance(first)
    # Of unit normals to scaled and moved ones: the squared shift and sum (1 - s)^2.
    expected = 0.09 + 0.16 + 0.0 + 1.0 + 0.25
    assert distance(first * scales + shift) == pytest.approx(expected, rel=1e-9)
    assert distance(first) == pytest.approx(0, abs=1e-9)


def test_intervals_hold_the_value_and_pair_the_samples() -> None:
    draw = torch.Generator().manual_seed(0)
    distance = FrechetDistance(torch.randn(2000, 4, generator=draw))
    features = torch.randn(500, 4, generator=draw) + 0.2
    interval = distance.interval(features)
    assert interval.low < interval.value == distance(features) < interval.high
    # The same samples a little off: their difference is known far better than either.
    difference = distance.difference(features * 1.01, features)
    assert difference.high - difference.low < (interval.high - interval.low) / 5
    same = distance.difference(features, features)
    assert (same.value, same.low, same.high) == (0, 0, 0)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(CELL, load_subject("fashion"), tmp_path_factory.mktemp("cell"))


@pytest.fixture(scope="module")
def material(bench: Bench) -> Material:
    return prepare_material(bench, 28)


def _torch_latents(bench: Bench, row: Row, schedule: Sequence[StepMode], seed: int) -> Tensor:
    return bench.sample(row, tuple(schedule), bench.subject.model, bench.request(seed))


@pytest.mark.slow
def test_rows_run_as_they_say(bench: Bench, material: Material) -> None:
    outputs = torch.stack([material.recording.outputs[k] for k in range(CELL.steps)])
    assert outputs.shape[:2] == (CELL.steps, 2 * BATCH)
    rows = grid_rows(CELL, material.table, outputs, 28)
    half = [row for row in rows if row.budget == 0.5]
    for kind in (Fewer, AtOutput):
        row = next(row for row in half if isinstance(row.way, kind))
        schedule = prepare(bench, row, material)
        got = bench.sample_in(bench.session(row), row, schedule, 7)
        expected = _torch_latents(bench, row, schedule, 7)
        # float32, two runtimes over six steps.
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    full = bench.full(bench.subject.model, bench.request(7))
    ours = [row for row in half if row.is_ours and isinstance(row.way, Planned | Searched)]
    assert [row.family for row in ours] == [
        "ours, even FORECAST",
        "searched",
        "searched with a reference",
    ]
    for row in ours:
        schedule = prepare(bench, row, material)
        assert prepare(bench, row, material) == schedule  # read back
        assert bench.artifact(row.key).exists()
        got = bench.sample_in(bench.session(row), row, schedule, 7)
        error = float((got - full).norm() / full.norm())
        assert 1e-5 < error < 0.5  # a plan does something, and not just anything


def _figures(rows: Sequence[tuple[str, float, float]]) -> dict:
    table = [
        {"family": "full", "label": "full", "time": 1.0, "error": 0.0, "ours": False},
        *(
            {"family": f, "label": "interval 6", "time": t, "error": e, "ours": f[0] in "os"}
            for f, t, e in rows
        ),
    ]
    for row in table:
        row["to_reference"] = row["error"] + 0.03
    interval = {"value": 1.0, "low": 0.9, "high": 1.1}
    worse = {"value": 0.2, "low": 0.1, "high": 0.3}
    distances = [{"budget": None, "full": interval}]
    for budget in BUDGETS:
        sets = {"searched": interval, "best peer": interval, "difference": worse}
        distances.append({"budget": budget, "peer": "L2P", **sets})
    place = {"subject": "fashion", "sampler": "DDIM", "steps": 35, "scale": 1.5}
    counts = {"batch": 16, "images": 128, "set_images": 2048}
    return {**place, **counts, "rows": table, "distances": distances}


def test_the_best_row_takes_no_longer() -> None:
    rows = [{"time": 0.2, "error": 3}, {"time": 0.355, "error": 2}, {"time": 0.5, "error": 1}]
    assert [best_row(rows, time) for time in (0.1, 0.35, 0.6)] == [None, rows[1], rows[2]]


def test_report_says_which_bars_are_missed(tmp_path: Path) -> None:
    rows = [(family, budget, error) for budget in BUDGETS for family, error in (("L2P", 0.1),)]
    rows += [("searched", budget, 0.08 - 0.01 * k) for k, budget in enumerate(BUDGETS)]
    rows += [("ours, even FORECAST", budget, 0.09) for budget in BUDGETS]
    rows += [("ours, int8", 0.6, 0.01)]
    rows += [("searched with a reference", budget, -0.01) for budget in BUDGETS]
    result = {
        "machine": {"processor": "one", "threads": 1},
        "versions": {"onnxruntime": "1"},
        "cells": [_figures(rows)],
    }
    write_report(result, tmp_path)
    page = (tmp_path / "grid.md").read_text()
    assert "0.70 (fashion, DDIM, 35 steps, guidance 1.5, budget 0.35) | **no** |" in page
    assert "everywhere | 0 of 4 | **no** |" in page
    assert "0.78 in the median, 0.89 at most | **no** |" in page
    assert "0.11 at 0.60 of the time | yes |" in page
    assert "| **searched** | 0.0800 (0.20) | 0.0700 (0.35) |" in page
    assert "From 280 steps the full run is 0.0300 off." in page
    assert "| best peer | 0.1300 (0.20) |" in page
    assert "| **searched with a reference** | 0.0200 (0.20) |" in page
    assert (tmp_path / "grid-fashion.png").stat().st_size > 10_000
