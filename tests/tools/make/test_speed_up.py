"""calicache speed-up: from the folder of a pipeline to plans that fit its models."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.pipelines.tiny import pixart_pipeline
from typer.testing import CliRunner, Result

from calicache.graph_passes import Plan, optimize
from calicache.graph_passes.api.speed import speed_up
from calicache.tools.cli import app


def calicache(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "pix art"
    pixart_pipeline().save_pretrained(path)
    return path


@pytest.mark.slow
def test_a_plan_is_saved_that_fits_the_saved_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(speed_up.speed_up.__kwdefaults__, "cache", None)
    sizes = ("height=64", "width=64", "num_inference_steps=6", "clean_caption=false")
    options = [word for size in sizes for word in ("--set", size)]
    # Where nothing is faster by the clock there is no plan; the wish decides nothing else.
    monkeypatch.setattr("calicache.graph_passes.api.speed.planning._left", lambda *_: "")
    result = calicache(
        "speed-up", folder / "model_index.json", "-o", tmp_path / "plans",
        "--prompt", "a cat", "--prompt", "a dog", *options, "--budget", "0.6",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "times as fast" in result.output
    plan = Plan.load(tmp_path / "plans" / "transformer")
    assert len(plan.schedule) == 6
    model = type(pixart_pipeline().transformer).from_pretrained(folder / "transformer").eval()
    assert optimize(model, plan).plan is plan


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "steps"), "--set steps: expected NAME=VALUE"),
        (("--set", "no_such_thing=1"), "--set no_such_thing: expected an argument of PixArt"),
    ],
)
def test_what_the_pipeline_does_not_take_is_refused(
    arguments: tuple[str, str], said: str, folder: Path, tmp_path: Path
) -> None:
    result = calicache("speed-up", folder, "-o", tmp_path / "plans", *arguments)
    assert result.exit_code == 1
    assert said in " ".join(result.output.split())
    assert not (tmp_path / "plans").exists()


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    result = calicache("speed-up", tmp_path, "-o", tmp_path / "plans")
    assert result.exit_code == 1
    assert "expected the folder of a pipeline that diffusers saved" in " ".join(
        result.output.split()
    )
