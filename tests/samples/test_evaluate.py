"""The evaluation's parts: its methods, its scores, its report."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from data import DEBIAN_FOLDER, load_split
from diffusion import alpha_bar_table, ddim_timesteps
from fidelity_report import RECENT as RECENT_FAMILIES
from fidelity_report import write_report
from methods import BUDGETS, ERRORS, SHARES, STEPS, methods, sample_dpm
from PIL import Image
from scores import SetScores, distance

from calicache.graph_passes import StepMode

ROWS = methods(torch.randn(STEPS, 4, 8, generator=torch.Generator().manual_seed(0)))
RECENT = {
    "TaylorSeer-Lite",
    "Spectrum",
    "Spectrum, small ridge",
    "DMD",
    "FoCa",
    "L2P",
    "L2P, computed outputs",
}


def test_every_budget_has_the_peers_the_paper_and_ours() -> None:
    assert len({row.key for row in ROWS}) == len(ROWS)
    assert [row.family for row in ROWS].count("ours, FORECAST") == len(BUDGETS)
    assert len(BUDGETS) >= 4
    papers = [row.family for row in ROWS if row.family.startswith("paper")]
    assert papers == ["paper, none", "paper, activation", "paper, increment"] * 2


def test_schedules_have_the_refreshes_that_their_rows_name() -> None:
    for row in ROWS:
        for schedule in row.schedules or ():
            assert len(schedule) == STEPS
            count = schedule.count(StepMode.REFRESH)
            named = re.search(r"(up to )?(\d+) REFRESH", row.name)
            assert named
            assert count <= int(named[2]) if named[1] else count == int(named[2])


def test_recent_peers_call_the_model_as_often_as_ours() -> None:
    noise, labels = torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.long)
    for refreshes in BUDGETS:
        name = f"{refreshes} REFRESH of {STEPS}"
        peers = [row for row in ROWS if row.peer is not None and row.name == name]
        assert {row.family for row in peers} == RECENT
        for row in peers:
            calls: list[int] = []

            def model(calls: list[int] = calls, **inputs: torch.Tensor) -> torch.Tensor:
                calls.append(int(inputs["timestep"][0]))
                return inputs["hidden_states"]

            row.sample(model, noise, labels)
            assert calls == [ddim_timesteps(STEPS)[step] for step in row.calls]
            assert len(calls) == refreshes
            assert row.plain
            assert row.family.startswith(RECENT_FAMILIES)


def test_searched_plans_stand_beside_even_schedules_at_the_same_budget() -> None:
    rows = {row.family: row for row in ROWS}
    searched = [row for row in ROWS if row.searched]
    assert [row.budget for row in searched if row.budget] == list(SHARES)
    assert [row.max_error for row in searched if row.max_error] == list(ERRORS)
    even = [row for row in ROWS if row.family == "uniform, FORECAST"]
    for row, share in zip(even, SHARES, strict=True):
        most = max(s.count(StepMode.REFRESH) for s in row.schedules or ())
        assert most == int(share * STEPS)  # a step that forecasts costs nothing
    assert not rows["searched"].plain
    assert rows["full"].plain


def test_dpm_solver_finds_the_image_of_a_perfect_denoiser() -> None:
    clean = torch.rand(2, 1, 28, 28) * 2 - 1
    table = alpha_bar_table().float()

    def perfect(
        hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        alpha = table[timestep].view(-1, 1, 1, 1)
        return (hidden_states - alpha.sqrt() * clean.repeat(2, 1, 1, 1)) / (1 - alpha).sqrt()

    image = sample_dpm(perfect, torch.randn(2, 1, 28, 28), torch.tensor([0, 1]), 10)
    # float32 with divisions by sqrt(alpha_bar(999)) = 0.006.
    torch.testing.assert_close(image, clean, rtol=0, atol=2e-3)


def test_distance_is_the_mean_over_images() -> None:
    reference = torch.rand(8, 1, 28, 28) - 0.5
    scale = torch.linspace(0.01, 0.08, 8).view(-1, 1, 1, 1)
    measured = distance(reference * (1 + scale), reference)
    # float32 sums over 784 pixels.
    assert measured.relative_error == pytest.approx(0.045, rel=1e-4)
    squares = ((reference * scale) ** 2).flatten(1).mean(1).numpy()
    assert measured.psnr == pytest.approx(float(np.mean(10 * np.log10(4 / squares))), rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(
    not DEBIAN_FOLDER.exists(), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_real_images_score_better_than_noise() -> None:
    scores = SetScores()
    real, _ = load_split(train=True).batch(torch.arange(512))
    real_fid, real_is = scores.score([real[:256], real[256:]])
    noise_fid, noise_is = scores.score([torch.randn(512, 1, 28, 28).clamp(-1, 1)])
    # Training images against test images, 512 of them: sampling error alone. Noise is far off; a
    # network that sees black images, whatever is sampled, would call both alike.
    assert 0.01 < real_fid < 1 < 10 < noise_fid
    assert 1 <= noise_is < real_is <= 10


def _row(family: str, refreshes: int, time: float, error: float, fid: float) -> dict:
    apart = {"relative_error": error, "standard_error": error / 10, "psnr": 30.0}
    return {
        "family": family,
        "name": "row",
        "refreshes": refreshes,
        "macs_share": time,
        "time_share": time,
        "to_full": apart,
        "to_reference": apart,
        "images": 64,
        "fid": fid,
        "inception": 8.0,
    }


def test_report_names_targets_that_are_missed(tmp_path: Path) -> None:
    rows = [_row("full", 35, 1.0, 0.0, 1.0)]
    for refreshes, time in ((12, 0.35), (18, 0.52)):
        rows += [
            _row("paper, none", refreshes, time, 0.04, 1.2),
            _row("REUSE order 2 (TaylorSeer)", refreshes, time, 0.02, 1.01),
            _row("ours, FORECAST", refreshes, time, 0.01, 1.03),
            _row("ours, CALIBRATE", refreshes, 0.9, 0.02, 1.0),
        ]
    machine = {"processor": "one", "threads": 2}
    result = {"machine": machine, "versions": {"onnxruntime": "1"}, "rows": rows}
    (tmp_path / "fidelity-notes.md").write_text("## Notes\n\nWhy.\n")
    write_report(result, tmp_path)
    text = (tmp_path / "fidelity.md").read_text()
    assert "0.0200 / 0.0400 = 0.50 | **no**" in text
    assert "0.0100, REUSE order 2 (TaylorSeer) 0.0200 (ratio 0.50) | yes" in text
    assert "1.030 / 1.000 = 1.030 | **no**" in text  # 1.02 allowed at half the compute
    assert "1.030 / 1.000 = 1.030 | yes" in text  # 1.05 allowed at a third
    assert text.rstrip().endswith("Why.")
    assert Image.open(tmp_path / "fidelity.png").size[0] > 500
