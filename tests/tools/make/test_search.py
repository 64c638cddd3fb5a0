"""calicache search and take: the plan, another point of its front, wrong arguments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import relative, sample_dit
from support.search.fronts import front_of
from support.torchrun import torchrun
from typer.testing import CliRunner, Result

from calicache.graph_passes import Plan, Recording, optimize, record
from calicache.tools.cli import app
from calicache.tools.terminal.model_file import load_model

COSTS, ERRORS = (0.34, 0.5, 0.67, 0.84, 1.0), (0.31, 0.042, 0.0071, 0.0002, 0.0)
CHOICE = 2


MODEL = """
import torch
from support.models import shake
from model import FashionDiT, FashionDiTConfig


def build():
    torch.manual_seed(0)
    return shake(FashionDiT(FashionDiTConfig(width=32, depth=2, frequency_channels=32)))
"""


def calicache(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def words(text: str) -> str:
    """Without the line breaks of the terminal."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def searched(dit_plan: Plan) -> Plan:
    """As a search leaves it: the settings are those of the point that is taken."""
    plan = replace(dit_plan, front=front_of(COSTS, ERRORS, CHOICE, len(dit_plan.schedule)))
    return plan.take(CHOICE)


@pytest.fixture(scope="module")
def saved(searched: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "a plan with spaces"
    searched.save(path)
    return path


@pytest.fixture(scope="module")
def without_front(dit_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plain"
    dit_plan.save(path)
    return path


def test_inspect_prints_table_schedules_and_chart(saved: Path, searched: Plan) -> None:
    done = calicache("inspect", saved)
    assert done.exit_code == 0, done.output
    assert searched.front is not None
    table = done.stdout.partition("Front of the")[2].partition("Schedules")[0]
    rows = {row.split()[0]: row for row in table.splitlines() if row.strip()}
    for place, point in enumerate(searched.front.points):
        numbers = rows[str(place)].replace("±", " ").replace("< taken", "").split()
        assert float(numbers[1]) == pytest.approx(point.cost, rel=1e-3, abs=1e-3)
        got = [float(number) for number in numbers[2:5]]
        wanted = [point.error.mean, point.error.deviation, point.error.bound]
        assert got == pytest.approx(wanted, rel=0.05)
        counts = [str(point.schedule.count(mode) or "-") for mode in range(4)]
        assert numbers[5:] == [str(point.order), *counts]
        assert f"point {place}, cost {point.cost:.3f}" in done.stdout
        assert ("< taken" in rows[str(place)]) == (place == CHOICE)
    for part in ("budget 0.5", "in MACs", "99 % bound", "RCCCCR", "R refresh, C calibrate"):
        assert part in done.stdout
    assert "O taken, * the others; points without error are left out" in done.stdout


@pytest.mark.parametrize("name", ["inspect", "take"])
def test_piped_output_is_plain_and_fits_80_columns(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    more = () if name == "inspect" else ("1", "-o", "other")
    done = calicache(name, saved, *more)
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if str(saved) not in line]
    assert max(map(len, lines)) <= 80


def test_json_has_the_front(saved: Path) -> None:
    done = calicache("inspect", saved, "--json")
    assert done.exit_code == 0, done.output
    written = json.loads((saved / "plan.json").read_text())
    assert json.loads(done.stdout)["front"] == written["front"]


@pytest.mark.slow
def test_take_saves_the_plan_of_another_point(
    saved: Path, searched: Plan, dit, tmp_path: Path
) -> None:
    other = tmp_path / "another plan"
    done = calicache("take", saved, "3", "-o", other)
    assert done.exit_code == 0, done.output
    assert searched.front is not None
    point = searched.front.points[3]
    plan = Plan.load(other)
    assert plan.recipe == searched.take(3).recipe
    assert plan.schedule == point.schedule
    assert "cost 0.840 of the full run" in words(done.stdout)
    assert "held-out" not in done.stdout  # it is that of the point the search took
    assert f"calicache inspect '{other}'" in done.stdout
    assert "< taken" in next(
        row for row in calicache("inspect", other).stdout.splitlines() if row.startswith("     3")
    )
    full = sample_dit(dit)
    assert relative(sample_dit(optimize(dit, plan)), full) < 0.1


def test_a_plan_can_be_replaced_by_another_of_its_points(searched: Plan, tmp_path: Path) -> None:
    searched.save(tmp_path / "plan")
    assert calicache("take", tmp_path / "plan", "0", "-o", tmp_path / "plan").exit_code == 0
    assert Plan.load(tmp_path / "plan").recipe == searched.take(0).recipe


def test_point_that_is_not_there_is_refused(saved: Path, tmp_path: Path) -> None:
    done = calicache("take", saved, "5", "-o", tmp_path / "other")
    assert done.exit_code == 1
    assert "expected 0 .. 4" in words(done.stderr)
    assert not (tmp_path / "other").exists()


def test_plan_without_a_front_is_refused(without_front: Path, tmp_path: Path) -> None:
    done = calicache("take", without_front, "1", "-o", tmp_path / "other")
    assert done.exit_code == 1
    assert "expected a plan that a search made, with its front" in words(done.stderr)
    assert "calicache search" in words(done.stderr)


def test_damaged_plan_is_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text((saved / "plan.json").read_text())
    done = calicache("take", tmp_path, "1", "-o", tmp_path / "other")
    assert done.exit_code == 1
    assert "expected a folder written by Plan.save" in words(done.stderr)


@pytest.mark.parametrize("both", [False, True])
def test_either_a_budget_or_an_error_is_asked_for(
    given: tuple[str, Path], tmp_path: Path, both: bool
) -> None:
    more = ("--budget", "0.5", "--max-error", "1") if both else ()
    done = calicache("search", *given, "-o", tmp_path / "plan", *more)
    assert done.exit_code == 1
    assert "expected either a budget or a max_error" in words(done.stderr)


def test_output_replaces_nothing_but_a_plan(
    saved: Path, given: tuple[str, Path], tmp_path: Path
) -> None:
    folder, file = tmp_path / "pictures", tmp_path / "file"
    folder.mkdir()
    (folder / "a.png").write_text("a picture")
    file.write_text("a file")
    for output, got in ((folder, "got a folder with other files"), (file, "/file'")):
        for arguments in (("take", saved, "0"), ("search", *given, "--budget", "0.5")):
            done = calicache(*arguments, "-o", output)
            assert done.exit_code == 1
            assert got in words(done.stderr)
    assert (folder / "a.png").read_text() == "a picture"
    assert file.read_text() == "a file"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert calicache("take", saved, "0", "-o", empty).exit_code == 0


@pytest.mark.parametrize("missing", ["model", "recording", "--latency"])
def test_what_is_not_there_is_told_before_anything_is_read(
    given: tuple[str, Path], tmp_path: Path, missing: str
) -> None:
    nowhere = tmp_path / "nowhere"
    model, recording = given
    if missing == "model":
        model = f"{nowhere}.py:build"
    elif missing == "recording":
        recording = nowhere
    more = ("--latency", nowhere) if missing == "--latency" else ()
    done = calicache("search", model, recording, "-o", tmp_path / "p", "--budget", ".5", *more)
    assert done.exit_code == 1
    assert "/nowhere" in words(done.stderr).replace(" ", "")


def test_budget_below_the_cheapest_plan_is_refused_before_the_model_is_read(
    given: tuple[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text("def build():\n    raise KeyboardInterrupt\n")
    model = f"{tmp_path / 'slow.py'}:build"
    done = calicache("search", model, given[1], "-o", tmp_path / "plan", "--budget", "0.01")
    assert done.exit_code == 1
    least = 1 / Recording.load(given[1]).steps  # one REFRESH step; forecasts take no MACs
    assert f"plan: budget: expected {least:.4f} or more" in words(done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["slow.py"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model file and three recorded runs, as a user has them."""
    folder = tmp_path_factory.mktemp("the user's own")
    (folder / "my dit.py").write_text(MODEL)
    spec = f"{folder / 'my dit.py'}:build"
    model = load_model(spec)
    with record(model) as recording:
        for seed in range(3):
            recording.finish(sample_dit(model, seed=seed))
    recording.save(folder / "three runs.safetensors")
    return spec, folder / "three runs.safetensors"


@pytest.fixture(scope="module")
def under_budget(
    given: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Result]:
    """A plan that the command has made, and what it printed."""
    output = tmp_path_factory.mktemp("searched") / "a plan"
    done = calicache("search", *given, "-o", output, "--budget", "0.6")
    assert done.exit_code == 0, done.output
    return output, done


@pytest.mark.slow
def test_search_saves_a_plan_under_the_budget(
    given: tuple[str, Path], under_budget: tuple[Path, Result]
) -> None:
    output, done = under_budget
    plan = Plan.load(output)
    assert plan.front is not None
    point = plan.front.points[plan.front.choice]
    assert point.cost <= 0.6
    assert plan.schedule == point.schedule
    text = words(done.stdout)
    for part in (
        "asked for budget 0.6",
        f"cost {point.cost:.3f} of the full run, in MACs",
        f"error {point.error.mean:.3g} ±",
        "held-out error",
        f"point {plan.front.choice} of 0 .. {len(plan.front.points) - 1} on the front",
        f"Plan written: {output}",
        f"calicache inspect '{output}'",
    ):
        assert part in text
    assert "\x1b" not in done.output
    # Nothing of the search is left.
    assert [path.name for path in output.parent.iterdir()] == ["a plan"]
    model = load_model(given[0])
    assert relative(sample_dit(optimize(model, plan), seed=9), sample_dit(model, seed=9)) < 0.1
    assert calicache("inspect", output).exit_code == 0


@pytest.mark.slow
def test_processes_of_torchrun_save_and_show_the_plan_once(
    given: tuple[str, Path], under_budget: tuple[Path, Result], tmp_path: Path
) -> None:
    output = tmp_path / "a plan"
    command = ("-m", "calicache", "search", *given, "-o", output, "--budget", "0.6")
    done = torchrun(*command)
    alone, shared = Plan.load(under_budget[0]), Plan.load(output)
    assert (shared.recipe, shared.front) == (alone.recipe, alone.front)
    assert done.stdout.count("Plan written:") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a plan"]


@pytest.mark.slow
def test_what_processes_of_torchrun_are_refused_alike_is_shown_once(
    given: tuple[str, Path], tmp_path: Path
) -> None:
    command = ("-m", "calicache", "search", *given, "-o", tmp_path / "a plan", "--budget", "2")
    done = torchrun(*command, check=False)
    assert done.returncode == 1
    assert words(done.stderr).count("budget: expected") == 1
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_reference_is_what_the_plan_aims_at(given: tuple[str, Path], tmp_path: Path) -> None:
    model, finer = load_model(given[0]), tmp_path / "more steps.safetensors"
    with record(model) as recording:
        for seed in range(3):
            recording.finish(sample_dit(model, seed=seed, steps=31))
    recording.save(finer)
    output = tmp_path / "a plan"
    command = ("search", *given, "-o", output, "--budget", "0.6", "--reference", finer)
    done = calicache(*command)
    assert done.exit_code == 0, done.output
    text = "fitted to a reference of 31 steps, from which the recorded runs are"
    assert Plan.load(output).recipe.correction.startswith(text)
    other = calicache(*command[:4], tmp_path / "other", *command[5:7], "--reference", given[1])
    assert other.exit_code == 1
    assert "reference: expected more than 6 steps in run 0, got 6" in words(other.stderr)


@pytest.fixture(scope="module")
def fewer(given: tuple[str, Path]) -> Path:
    """Three runs of another number of steps."""
    model, path = load_model(given[0]), given[1].with_name("five steps.safetensors")
    with record(model) as recording:
        for seed in range(3):
            recording.finish(sample_dit(model, seed=seed, steps=5))
    recording.save(path)
    return path


@pytest.mark.slow
def test_several_recordings_make_a_plan_of_several_recipes(
    given: tuple[str, Path], fewer: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a plan"
    done = calicache("search", *given, fewer, "-o", output, "--budget", "0.6")
    assert done.exit_code == 0, done.output
    plan = Plan.load(output)
    assert plan.names == ("6", "5")
    for name, one in zip(plan.names, plan.plans, strict=True):
        assert one.front is not None
        point = one.front.points[one.front.choice]
        assert point.cost <= 0.6
        assert f"{name} steps" in done.stdout
        assert f"cost {point.cost:.3f} of the full run" in words(done.stdout)
    assert "a recipe for each of 6, 5 steps" in words(done.stdout)
    assert f"calicache inspect '{output / '6'}'" in words(done.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["a plan"]
    model = load_model(given[0])
    fast = optimize(model, plan)
    for steps in (6, 5):
        got, full = (sample_dit(one, seed=9, steps=steps) for one in (fast, model))
        # Each under its own recipe, on an image that was not recorded.
        assert relative(got, full) < 0.2


def test_recordings_of_one_number_of_steps_are_refused(
    given: tuple[str, Path], tmp_path: Path
) -> None:
    done = calicache("search", *given, given[1], "-o", tmp_path / "plan", "--budget", "0.6")
    assert done.exit_code == 1
    assert "got runs of 6 steps again" in words(done.stderr)


@pytest.mark.slow
def test_search_under_an_error_shows_a_bar_on_a_terminal(
    given: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = Recording.load(given[1])
    more = three.take_runs([0] * 5 + [1] * 5 + [2] * 5)  # samples enough to choose with
    more.save(tmp_path / "runs.safetensors")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes that for a terminal
    arguments = (given[0], tmp_path / "runs.safetensors", "-o", tmp_path / "plan")
    done = calicache("search", *arguments, "--max-error", "0.05")
    assert done.exit_code == 0, done.output
    front = Plan.load(tmp_path / "plan").front
    assert front is not None
    assert front.request == "max_error 0.05"
    assert front.points[front.choice].error.bound <= 0.05
    assert "max_error 0.05" in done.stdout
    assert "load the model" in done.stderr
    assert "━" in done.stderr
    assert "0:00:" in done.stderr  # time left


@pytest.mark.slow
def test_interrupted_search_goes_on(given: tuple[str, Path], tmp_path: Path) -> None:
    output, kept = tmp_path / "a plan", tmp_path / "a plan.search"
    arguments = ("search", *given, "-o", output, "--budget", "0.5")
    command = [str(Path(sys.executable).parent / "calicache"), *map(str, arguments)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        # Where the tests themselves run in the background, SIGINT is ignored and inherited so.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while process.poll() is None and len(list(kept.glob("[!.]*"))) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert printed == ""
    assert "Traceback" not in told
    assert f"What is done lies in {kept}; the same command goes on from there." in told
    assert len(list(kept.glob("[!.]*"))) >= 2
    assert not output.exists()

    other = calicache("search", *given, "-o", output, "--budget", "0.7")
    assert other.exit_code == 1  # what is kept is that of a budget of 0.5
    assert "a plan.search" in words(other.stderr)

    done = calicache(*arguments)
    assert done.exit_code == 0, done.output
    assert not kept.exists()
    whole = tmp_path / "in one go"
    assert calicache("search", *given, "-o", whole, *arguments[5:]).exit_code == 0
    resumed, expected = Plan.load(output).recipe, Plan.load(whole).recipe
    for part in ("schedule", "order", "rules", "ranks"):
        assert getattr(resumed, part) == getattr(expected, part)
    # Fitted anew from float32 products, which depend on how memory is aligned.
    torch.testing.assert_close(
        torch.tensor(resumed.output_weights), torch.tensor(expected.output_weights)
    )


def test_search_stopped_before_it_began_says_so(given: tuple[str, Path], tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("def build():\n    raise KeyboardInterrupt\n")
    done = calicache(
        "search",
        f"{tmp_path / 'slow.py'}:build",
        given[1],
        "-o",
        tmp_path / "plan",
        "--budget",
        "0.5",
    )
    assert done.exit_code == 130
    assert words(done.stderr) == "Stopped. Nothing was done yet."
