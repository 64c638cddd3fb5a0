"""calicache bench: models, rows that agree with each other, a whole run, the report."""

from __future__ import annotations

import copy
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from support.small.bench import BLOCKS, build, tiny
from torch import Tensor
from typer.testing import CliRunner

from calicache.graph_passes import StepMode
from calicache.graph_passes.common.environment import environment
from calicache.graph_passes.common.errors import BenchError
from calicache.graph_passes.common.progress import Meter
from calicache.tools.bench import compile_time, prepare, start_time
from calicache.tools.bench import run as bench
from calicache.tools.bench.compile_time import STAGES
from calicache.tools.bench.models import MODELS, BenchModel, find_model
from calicache.tools.bench.report import efficiency, write_report
from calicache.tools.bench.rows import BenchSettings, BenchTask, bench_rows, chosen_rows
from calicache.tools.bench.run import MEMORY_PER_ROW, Timing, operator_times, run_bench
from calicache.tools.cli import app

TINY = f"{Path(__file__).parents[2] / 'support' / 'small' / 'bench.py'}:tiny"
STEPS, INTERVAL = 6, 3


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> BenchSettings:
    rows = ("calicache CALIBRATE, step", "calicache CALIBRATE, sampler")
    return BenchSettings(TINY, INTERVAL, STEPS, None, 0, 2, tmp_path_factory.mktemp("bench"), rows)


@pytest.fixture(scope="module")
def result(settings: BenchSettings) -> dict:
    """Of a whole bench, which leaves plans and artifacts of every kind in its folder."""
    with pytest.MonkeyPatch.context() as patch:
        # Read once, not by every process.
        patch.setattr(prepare, "PRELOADED", [*prepare.PRELOADED, DiTTransformer2DModel.__module__])
        return run_bench(settings)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is done here: a process of its own takes seconds to begin."""
    for module in (bench, compile_time):
        monkeypatch.setattr(module, "own_process", lambda: ThreadPoolExecutor(1))


def latents(name: str, settings: BenchSettings) -> Tensor:
    model = tiny()
    row = next(row for row in bench_rows() if row.name == name)
    runner = row.make(BenchTask(model, settings, settings.folder / row.artifact))
    noise = model.draw(5)
    runner.reset()
    if runner.run is not None:
        return torch.as_tensor(runner.run(noise))
    assert runner.denoiser is not None
    return model.sample(runner.denoiser, noise, STEPS)


def test_models_by_name_have_the_published_sizes() -> None:
    sizes = {name: MODELS[name]().width for name in MODELS}
    assert sizes == {"dit-s": 384, "dit-b": 768, "dit-xl": 1152}


def test_model_of_a_file_is_found() -> None:
    assert find_model(TINY).name == "tiny"


@pytest.mark.parametrize(
    "name", ["dit-huge", "nowhere.py:tiny", TINY.replace(":tiny", ":no_model"), TINY + "er"]
)
def test_unknown_model_lists_the_known_ones(name: str) -> None:
    with pytest.raises(BenchError, match=r"dit-s \| dit-b \| dit-xl"):
        find_model(name)


@pytest.mark.slow
def test_unknown_row_lists_the_known_ones() -> None:
    wrong = BenchSettings(TINY, 3, 6, None, 0, 1, Path(), ("fast",))
    with pytest.raises(BenchError, match=r"torch\.compile, plain"):
        chosen_rows(wrong)


def test_plain_row_is_always_there_and_first() -> None:
    wanted = ("calicache CALIBRATE, sampler",)
    chosen = chosen_rows(BenchSettings(TINY, 3, 6, None, 0, 1, Path(), wanted))
    assert [row.name for row in chosen] == ["ONNX Runtime, plain", *wanted]


def test_sampler_guides_and_leaves_learned_variances_out() -> None:
    model = BenchModel("m", 8, torch.nn.Identity, (1, 2, 3), guidance=3.0)

    def denoise(hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        assert timestep.shape == (2,)
        outputs = torch.stack([torch.full((4, 3), 2.0), torch.full((4, 3), 1.0)])
        outputs[:, 2:] = torch.nan
        return (outputs,)

    noise = torch.ones(1, 2, 3)
    (after,) = model.latents(denoise, noise, 1)
    # 1 + 3 (2 - 1) = 4 is the guided output; two float32 products.
    torch.testing.assert_close(after, torch.full((1, 2, 3), 0.98 - 0.05 * 4), rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.usefixtures("result")
def test_plain_rows_agree(settings: BenchSettings) -> None:
    eager = latents("PyTorch eager, plain", settings)
    # float32 through two runtimes over 6 steps.
    torch.testing.assert_close(
        latents("ONNX Runtime, plain", settings), eager, rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["step", "pair", "sampler"])
@pytest.mark.usefixtures("result")
def test_calibrated_rows_agree(settings: BenchSettings, kind: str) -> None:
    eager = latents("calicache CALIBRATE, PyTorch eager", settings)
    output = latents(f"calicache CALIBRATE, {kind}", settings)
    torch.testing.assert_close(output, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("result")
def test_reuse_rows_agree(settings: BenchSettings) -> None:
    eager = latents("calicache REUSE, PyTorch eager", settings)
    output = latents("calicache REUSE, step", settings)
    torch.testing.assert_close(output, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("result")
def test_hook_computes_the_steps_that_its_schedule_says(settings: BenchSettings) -> None:
    row = next(row for row in bench_rows() if "order 0" in row.name)
    calls: Counter[str] = Counter()

    def counted() -> torch.nn.Module:
        module = build()
        for name, part in module.named_modules():
            if name.endswith("to_q"):
                part.register_forward_hook(lambda *_: calls.update(["q"]))
        return module

    model = tiny()
    watched = BenchModel("tiny", 32, counted, model.noise, model.inputs)
    runner = row.make(BenchTask(watched, settings, settings.folder))
    for _ in range(2):  # the second run starts afresh
        calls.clear()
        runner.measure(watched, STEPS)
        assert row.schedule is not None
        assert calls["q"] == BLOCKS * row.schedule(settings).count(StepMode.REFRESH)


def test_hook_is_refused_where_its_names_fit_nothing(tmp_path: Path) -> None:
    settings = BenchSettings(TINY, INTERVAL, STEPS, None, 0, 2, tmp_path)
    row = next(row for row in bench_rows() if "order 0" in row.name)
    model = BenchModel("m", 8, lambda: torch.nn.Sequential(torch.nn.Linear(8, 8)), (1, 8))
    with pytest.raises(BenchError, match="transformer_blocks"):
        row.make(BenchTask(model, settings, settings.folder))


@pytest.mark.slow
@pytest.mark.usefixtures("result")
def test_operators_are_told_apart_by_mode(settings: BenchSettings) -> None:
    task = BenchTask(tiny(), settings, settings.folder / "step")
    times = operator_times(task)
    by_mode = {(entry.mode, entry.operator): entry for entry in times}
    for mode in ("REFRESH", "CALIBRATE"):
        assert by_mode[mode, "MultiHeadAttention"].calls == BLOCKS
        assert by_mode[mode, "MultiHeadAttention"].milliseconds > 0
    assert not {entry.operator for entry in times} & {"If", "Loop"}


@pytest.mark.slow
def test_whole_bench_measures_every_row(result: dict) -> None:
    assert [row["name"] for row in result["rows"]] == [
        "ONNX Runtime, plain",
        "calicache CALIBRATE, step",
        "calicache CALIBRATE, sampler",
    ]
    for row in result["rows"]:
        assert row["refused"] is None
        assert row["run_seconds"] > 0
        assert row["peak_bytes"] > 0
        assert row["plain_seconds"] == result["rows"][0]["run_seconds"]
    plain, step, sampler = result["rows"]
    assert plain["macs_share"] == 1.0
    assert 0 < step["macs_share"] == sampler["macs_share"] < 1
    assert set(step["step_seconds"]) == {"REFRESH", "CALIBRATE"}
    assert sampler["step_seconds"] == {}
    assert result["rank"] == round(32 / 9)
    # Of every token (2 x 16) and block, 4 bytes each: 9 C for the outputs, and the ranks of four
    # calibration branches.
    assert 9 < result["cache_bytes"] / (2 * 16 * BLOCKS * 4 * 32) < 10.5


@pytest.mark.slow
def test_row_that_cannot_run_is_reported_not_raised(tmp_path: Path, one_process: None) -> None:
    settings = BenchSettings(TINY, INTERVAL, STEPS, None, 0, 1, tmp_path)
    rows = [row for row in bench_rows() if row.name == "calicache CALIBRATE, pair"]
    (timing,) = bench._measure_group(settings, rows, Meter(1.0))
    assert timing.refused is not None
    assert timing.refused.startswith("ArtifactError")


def test_rows_that_memory_does_not_hold_run_in_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = BenchSettings(TINY, INTERVAL, STEPS, None, 0, 2, tmp_path)
    groups: list[list[str]] = []

    def group(_: BenchSettings, rows, meter: Meter) -> list[Timing]:
        groups.append([row.name for row in rows])
        return [Timing(row.name) for row in rows]

    monkeypatch.setattr(bench, "_measure_group", group)
    monkeypatch.setattr(bench, "available_memory", lambda: 1000)
    rows = bench_rows()
    timings = bench._measure(settings, rows, 1000 / (3.5 * MEMORY_PER_ROW), Meter(1.0))
    assert [timing.name for timing in timings] == [row.name for row in rows]
    assert {len(names) for names in groups} == {3}  # room for three: the plain one and two more
    assert {names[0] for names in groups} == {rows[0].name}


@pytest.mark.slow
def test_report_shows_every_row(result: dict, tmp_path: Path) -> None:
    shown = copy.deepcopy(result)
    shown["rows"].append({**shown["rows"][0], "name": "a peer", "refused": "AttributeError: no"})
    (tmp_path / "performance-notes.md").write_text("## Notes\n\nA note.\n")
    write_report({**environment(), "models": [shown]}, tmp_path)
    text = (tmp_path / "performance.md").read_text()
    assert "| a peer | does not run: AttributeError: no |" in text
    assert text.count("| calicache CALIBRATE, step |") == 2  # among the speedups, and by itself
    (row,) = (row for row in shown["rows"] if row["name"] == "calicache CALIBRATE, step")
    speedup = row["plain_seconds"] / row["run_seconds"]
    assert f"| row | {shown['model']} |" in text
    assert f"| calicache CALIBRATE, step | {speedup:.2f} |" in text
    assert "| a peer |" not in text[: text.index("The rest of this page")]
    assert "fidelity.png" not in text  # which is not there
    assert "MultiHeadAttention" in text
    assert text.rstrip().endswith("A note.")
    assert json.loads((tmp_path / "performance.json").read_text())["models"][0]["width"] == 32


@pytest.mark.slow
def test_compile_alone_is_measured_and_joins_the_report(
    tmp_path: Path, result: dict, one_process: None
) -> None:
    write_report({**environment(), "models": [result]}, tmp_path)
    options = ["--compile", "--repeats", "1", "--steps", str(STEPS), "--docs", str(tmp_path)]
    outcome = CliRunner().invoke(app, ["bench", TINY, *options, "--work", str(tmp_path / "work")])
    assert outcome.exit_code == 0, outcome.output
    report = json.loads((tmp_path / "performance.json").read_text())
    assert report["models"][0]["model"] == "tiny"
    (compiled,) = report["compile"]["results"]
    assert set(compiled["cpu_seconds"]) == set(STAGES)
    assert all(seconds > 0 for seconds in compiled["cpu_seconds"].values())
    assert "## What compiling takes" in (tmp_path / "performance.md").read_text()


@pytest.mark.slow
def test_efficiency_is_the_speedup_over_that_of_the_macs(result: dict) -> None:
    row = {**result["rows"][0], "plain_seconds": 6.0, "run_seconds": 3.0, "macs_share": 0.5}
    assert efficiency(row) == pytest.approx(1.0, rel=1e-14)  # three operations in float64


def test_command_refuses_with_the_reason() -> None:
    outcome = CliRunner().invoke(app, ["bench", "dit-huge"])
    assert outcome.exit_code == 1
    assert "dit-s | dit-b | dit-xl" in outcome.stderr


def test_starts_are_measured_and_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(start_time, "REPEATS", 1)
    start = start_time.measure_start()
    assert list(start) == ["import calicache", "calicache --help"]
    # Help loads typer, which an import of calicache does not.
    assert 0 < start["import calicache"] < start["calicache --help"]
    write_report({**environment(), "models": [], "start": start}, tmp_path)
    row = f"| `calicache --help` | {start['calicache --help']:.2f} |"
    assert row in (tmp_path / "performance.md").read_text()
