"""calicache inspect: the facts of the three kinds, their JSON, their text, and the warnings."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.golden import assert_golden
from support.search.fronts import front_of
from support.small_subjects import (
    other_artifact,
    small_folder,
    small_model,
    small_plan,
    small_runs,
)
from torch import nn
from typer.testing import CliRunner, Result

from calicache.export import Layout, Manifest, load_artifact
from calicache.export.artifact.manifest import SamplerRecord
from calicache.graph_passes import Dependence, Plan, Recording, SiteMode, SiteRule, StepMode
from calicache.graph_passes import optimize as compiled
from calicache.graph_passes.describe.graphs import view_graphs
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.settings.front import ErrorSummary
from calicache.tools.cli import app
from calicache.tools.inspect.artifact import ArtifactFacts, artifact_facts
from calicache.tools.inspect.command import Facts, describe_facts, facts_json, inspect_subject
from calicache.tools.inspect.facts import Caution
from calicache.tools.inspect.layers import LayerWork, fold_names, layer_facts
from calicache.tools.inspect.plan import PlanFacts, plan_facts
from calicache.tools.inspect.recording import RecordingFacts, RunFacts, recording_facts

R, C, U, F = StepMode
NAMES = {
    "plan": "plan",
    "artifact": "dit.onnx.d",
    "recording": "runs.safetensors",
}


@pytest.fixture(scope="module")
def home() -> Path:
    return small_folder()


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    """To break."""
    return Path(shutil.copytree(home, tmp_path / "copy"))


@pytest.fixture(scope="module")
def plan(home: Path) -> Plan:
    return Plan.load(home / "plan")


@pytest.fixture(scope="module")
def manifest(home: Path) -> Manifest:
    return load_artifact(home / "dit.onnx.d")


def printed(facts: Facts, width: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, width=width, highlight=False).print(describe_facts(facts))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def codes(facts: Facts) -> list[str]:
    return [caution.code for caution in facts.warnings]


def texts(facts: Facts) -> dict[str, str]:
    return {caution.code: caution.text for caution in facts.warnings}


def steady(text: str) -> str:
    """Without versions, digests, and sizes of files that depend on other packages' versions."""
    text = re.sub(r"\b[0-9a-f]{16}\b", "<digest>", text)
    sizes = r"(\.onnx, |\.json, |\.gz, |\.bin, |\.safetensors, |file +|size +)[\d.]+ k?B"
    text = re.sub(sizes, r"\1<size>", text)
    return re.sub(r"calicache \d+\.\d+\.\d+", "calicache <version>", text)


@pytest.mark.parametrize("kind", NAMES)
def test_text_is_as_it_was(home: Path, kind: str) -> None:
    text = steady(printed(inspect_subject(home / NAMES[kind])))
    assert_golden(f"inspect_{kind}.txt", text)


# What the plan says.


def test_plan_facts_are_those_of_the_plan(home: Path, plan: Plan) -> None:
    facts = inspect_subject(home / "plan")
    assert isinstance(facts, PlanFacts)
    assert (facts.binding, facts.recipe) == (plan.binding, plan.recipe)
    written = json.loads((home / "plan" / "plan.json").read_text())
    assert facts.files[1].sha256 == written["files"]["statistics.safetensors"]
    assert (facts.schedule.strip, facts.schedule.interval) == ("RCRURF", 2)
    assert [spec.dependence for spec in facts.inputs] == [Dependence.LATENT, Dependence.STEP]
    assert [target.name for target in facts.targets] == sorted(plan.statistics)
    sizes = {target.name: target.bytes for target in facts.targets}
    assert sizes == dict.fromkeys(["blocks.1.fc2", "blocks.2.fc1", "blocks.2.fc2"], 4 * 8 * 8)
    assert not facts.warnings


def facts_of_plan(home: Path, plan: Plan, **changes: object) -> PlanFacts:
    recipe = replace(plan.recipe, **changes)  # type: ignore[arg-type]
    return plan_facts(home / "plan", replace(plan, recipe=recipe))


def test_plan_with_ranks_of_its_own_shows_them(home: Path, plan: Plan) -> None:
    facts = facts_of_plan(home, plan, ranks={"blocks.2.fc1": 2, "blocks.9.fc1": 0})
    ranks = {target.name: target.rank for target in facts.targets}
    assert (ranks["blocks.2.fc1"], ranks["blocks.2.fc2"], ranks["blocks.9.fc1"]) == (2, None, 0)
    assert not facts.warnings  # rank 0 needs no statistics
    assert re.search(r"blocks\.9\.fc1 +none +0 B +0$", printed(facts), re.MULTILINE)


def test_plan_without_statistics_of_a_target_is_warned_of(home: Path, plan: Plan) -> None:
    facts = facts_of_plan(home, plan, ranks={"blocks.9.fc1": 2})
    assert texts(facts) == {
        "statistics-missing": "No statistics for blocks.9.fc1: the schedule has CALIBRATE steps, "
        "and weighting covariance needs them."
    }
    none = plan_facts(home / "plan", replace(plan, statistics={}))
    assert texts(none)["statistics-missing"].startswith("No statistics for any target: ")


def test_plan_that_needs_no_statistics_is_not_warned_of(home: Path, plan: Plan) -> None:
    schedule = (R, U, R, U, R, F)
    recipe = replace(plan.recipe, schedule=schedule)
    facts = plan_facts(home / "plan", replace(plan, recipe=recipe, statistics={}))
    assert not facts.warnings


def test_plan_whose_order_is_never_reached_is_warned_of(home: Path, plan: Plan) -> None:
    facts = facts_of_plan(home, plan, schedule=(R, C, C, C, C, C))
    assert texts(facts) == {
        "short-history": "Anchors of order 1 need 2 REFRESH steps, the schedule has 1: the order "
        "is never reached."
    }


def test_plan_that_saves_nothing_is_warned_of(home: Path, plan: Plan) -> None:
    facts = facts_of_plan(home, plan, schedule=(R,) * 6)
    assert texts(facts) == {"no-saving": "Every step is REFRESH: nothing is saved."}


def test_output_weights_that_could_not_be_fitted_are_warned_of_with_the_reason(
    home: Path, plan: Plan
) -> None:
    changed = plan.with_rank(2)
    facts = plan_facts(home / "plan", changed)
    assert texts(facts) == {
        "output-weights": "There are no fitted output weights: not fitted: the plan was changed."
    }


def test_output_weights_that_nobody_asked_for_are_no_warning() -> None:
    model = small_model()
    plan = Plan.from_trajectory(model, small_runs(model), rank=2, order=0, correct=False)
    assert plan.recipe.correction == "not asked for"
    assert not plan_facts(small_folder() / "plan", plan).warnings


def searched(plan: Plan) -> Plan:
    return replace(plan, front=front_of((0.3, 0.5), (0.1, 0.01), choice=1))


def test_plan_of_a_search_shows_its_front(home: Path, plan: Plan) -> None:
    facts = plan_facts(home / "plan", searched(plan))
    text = printed(facts)
    for part in ("Front of the search that made it", "budget 0.5", "held-out error", "< taken"):
        assert part in text
    assert json.loads(facts_json(facts))["front"]["choice"] == 1


def test_held_out_error_above_the_bound_is_warned_of(home: Path, plan: Plan) -> None:
    front = searched(plan).front
    assert front is not None
    bound = front.points[1].error.bound
    far = replace(front, held_out=ErrorSummary.of([2 * bound, 2 * bound]))
    facts = plan_facts(home / "plan", replace(plan, front=far))
    assert texts(facts) == {
        "held-out-error": f"The held-out error {2 * bound:.3g} is above the bound {bound:.3g} of "
        "the point: new samples may be further off."
    }


def test_a_diverged_point_is_warned_of_and_null_in_json(home: Path, plan: Plan) -> None:
    front = searched(plan).front
    assert front is not None
    broken = replace(front.points[1], error=ErrorSummary.of([float("inf")]))
    points = (front.points[0], broken)
    facts = plan_facts(*(home / "plan", replace(plan, front=replace(front, points=points))))
    assert codes(facts) == ["diverged"]
    assert json.loads(facts_json(facts))["front"]["points"][1]["error"]["mean"] is None


# What the artifact says.


def facts_of_artifact(home: Path, manifest: Manifest, **changes: object) -> ArtifactFacts:
    changed = replace(manifest, **changes)  # type: ignore[arg-type]
    return artifact_facts(home / "dit.onnx.d", changed)


def test_artifact_facts_are_those_of_the_manifest(home: Path, manifest: Manifest) -> None:
    facts = inspect_subject(home / "dit.onnx.d")
    assert isinstance(facts, ArtifactFacts)
    assert facts.manifest == manifest
    assert facts.run_share == manifest.run_share
    by_mode = {entry.mode: entry for entry in facts.modes}
    assert [entry.steps for entry in facts.modes] == [3, 1, 1, 1]
    assert [entry.macs for entry in facts.modes] == [record.macs for record in manifest.modes]
    assert by_mode[R].share == manifest.mode(R).macs / manifest.plain_macs
    # REFRESH keeps one of every cache; CALIBRATE reads the most, FORECAST the output alone.
    assert 2 * by_mode[R].written_bytes == facts.cache_bytes
    assert facts.cache_bytes >= by_mode[C].read_bytes > by_mode[U].read_bytes > 0
    assert by_mode[F].read_bytes == 2 * 4 * (2 * 5 * 4)  # two refreshes of (2, 5, 4) float32


def test_layers_follow_the_rules(home: Path) -> None:
    facts = inspect_subject(home / "dit.onnx.d")
    assert isinstance(facts, ArtifactFacts)
    work = {layer.name: layer.work["CALIBRATE"] for layer in facts.layers}
    assert work == {
        "embed": LayerWork.FULL,
        "blocks.0.fc1": LayerWork.REUSE,
        "blocks.0.fc2": LayerWork.REUSE,
        "blocks.1.fc1": LayerWork.FULL,
        "blocks.1.fc2": LayerWork.CALIBRATE,
        "blocks.2.fc1": LayerWork.CALIBRATE,
        "blocks.2.fc2": LayerWork.CALIBRATE,
        "out": LayerWork.FULL,
    }
    for layer in facts.layers:
        inside = layer.name.startswith("blocks")
        assert layer.work["REFRESH"] is LayerWork.FULL
        assert layer.work["REUSE"] is (LayerWork.SKIPPED if inside else LayerWork.FULL)
        assert layer.work["FORECAST"] is LayerWork.SKIPPED
    targets = {layer.name: layer.target for layer in facts.layers}
    assert (targets["blocks.0.fc2"], targets["blocks.1.fc1"]) == ("blocks.0", None)


def test_calls_of_one_layer_are_told_apart() -> None:
    model = small_model()
    assert isinstance(model.blocks, nn.ModuleList)
    model.blocks[1] = model.blocks[0]
    rules = (SiteRule("blocks.1.fc1@1", SiteMode.FULL), SiteRule("blocks.1.fc2", SiteMode.REUSE))
    fast = compiled(model, small_plan(model, small_runs(model), rules=rules))
    layers = layer_facts(
        view_graphs(fast.compiled.captured, fast.compiled.variant_set), fast.compiled.targets
    )
    work = {layer.name: layer.work["CALIBRATE"].value for layer in layers}
    assert work["blocks.1.fc1"] == "calibrate"
    assert work["blocks.1.fc1@1"] == "full"
    assert work["blocks.1.fc2"] == "reuse"
    assert work["blocks.1.fc2@1"] == "calibrate"


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout.PAIR, Layout.SAMPLER])
def test_other_layouts(layout: Layout) -> None:
    facts = inspect_subject(other_artifact("RCUFRC", layout))
    assert isinstance(facts, ArtifactFacts)
    assert facts.manifest.layout == layout
    text = printed(facts)
    assert text.startswith(f"calicache artifact, layout {layout}\n")
    assert ("noise float32 (2, 5, 4)" in text) == (layout is Layout.SAMPLER)
    assert all(layer.work["REFRESH"] is LayerWork.FULL for layer in facts.layers)


def test_guidance_calls_and_built_in_values_are_shown(home: Path, manifest: Manifest) -> None:
    noise = TensorSpec("noise", (1, 5, 4), "float32")
    record = SamplerRecord("x", noise, (), parts=2, conditional=0, guidance=1.5, scale=1.0)
    facts = facts_of_artifact(
        home, manifest, sampler=record, calls_per_step=2, fixed={"mask": ("1234",)}
    )
    lines = printed(facts).splitlines()
    assert "                guidance scale 1.5" in lines
    assert "calls           2 of the model a step" in lines
    assert "built in        the recorded values of mask" in lines
    assert facts.cache_bytes == 2 * manifest.cache_bytes


def test_large_caches_are_warned_of(home: Path, manifest: Manifest) -> None:
    facts = inspect_subject(home / "dit.onnx.d")
    assert codes(facts) == ["large-caches"]
    assert not facts_of_artifact(home, manifest, cache_bytes=1).warnings


def test_low_energy_is_warned_of_where_it_counts(home: Path, manifest: Manifest) -> None:
    low = tuple(replace(t, energy=0.25 if t.rank else None) for t in manifest.targets)
    facts = facts_of_artifact(home, manifest, targets=low)
    assert texts(facts)["low-energy"] == (
        "Energy kept is below 0.5 in blocks.1.fc2 (0.25), blocks.2.fc1 (0.25), blocks.2.fc2 (0.25)"
        ": raise their ranks."
    )
    without = facts_of_artifact(home, manifest, targets=low, schedule=(R, U, R, U, R, F))
    assert "low-energy" not in codes(without)


def test_costs_that_save_nothing_are_warned_of(home: Path, manifest: Manifest) -> None:
    dear = tuple(replace(t, calibrate_macs=t.full_macs) for t in manifest.targets)
    texts = [c.text for c in facts_of_artifact(home, manifest, targets=dear).warnings]
    names = "blocks.0, blocks.1.fc2, blocks.2.fc1, blocks.2.fc2"
    assert f"A calibration branch costs as much as the layers: {names}." in texts
    cheap = facts_of_artifact(home, manifest, plain_macs=1000)
    assert cheap.run_share > 1
    assert (
        Caution("no-saving", f"A run takes {cheap.run_share:.3f} of the plain model's MACs.")
        in cheap.warnings
    )


def test_files_that_the_manifest_does_not_know_are_warned_of(copy: Path) -> None:
    (copy / "dit.onnx.d" / "notes.txt").touch()
    facts = inspect_subject(copy / "dit.onnx.d")
    assert texts(facts)["other-files"] == (
        "The manifest does not know notes.txt, which lie in the folder."
    )


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["blocks.0.fc1", "blocks.1.fc1", "blocks.3.fc1"], "blocks.{0-1,3}.fc1"),
        (["blocks.7.fc1"], "blocks.7.fc1"),
        (["embed"], "embed"),
        (["layers.9", "layers.10"], "layers.{9-10}"),
        (["0.a.1", "1.a.1"], "{0-1}.a.1"),
    ],
)
def test_names_that_differ_in_one_number_are_one(names: list[str], folded: str) -> None:
    assert fold_names(names) == folded


# What the recording says.


def facts_of_runs(home: Path, recording: Recording) -> RecordingFacts:
    return recording_facts(*(home / "runs.safetensors", recording))


def test_recording_facts(home: Path) -> None:
    recording = small_runs(small_model(), runs=3)
    facts = facts_of_runs(home, recording)
    assert facts.runs == (RunFacts(6, True),) * 3
    assert (facts.calls, facts.steps, facts.calls_per_step) == (18, 6, 1)
    assert [spec.dependence for spec in facts.inputs] == [Dependence.LATENT, Dependence.STEP]
    assert facts.timestep_values == tuple(float(torch.tensor(1 - k / 6)) for k in range(6))
    values = 18 * 4 * (2 * 5 * 4 + 2) + 3 * 4 * 2 * 5 * 4  # calls and results, float32
    assert facts.value_bytes == values
    assert not facts.warnings


def test_few_runs_and_missing_results_are_warned_of(home: Path) -> None:
    facts = facts_of_runs(home, small_runs(small_model(), runs=2, finish=False))
    assert texts(facts) == {
        "few-runs": "2 runs: a plan search needs 3 or more.",
        "no-results": "2 of 2 runs have no result, as finish() keeps it: the sampler's last "
        "update is not known.",
    }


def test_runs_of_other_lengths_and_broken_values_are_warned_of(home: Path) -> None:
    recording = small_runs(small_model(), runs=3)
    cut = recording.take_runs([0, 1, 2])
    cut.calls[:2] = []
    cut.calls[5] = {**cut.calls[5], "x": torch.full((2, 5, 4), torch.nan)}
    shifted = {number - 2: value for number, value in cut.results.items()}
    cut.results.clear()
    cut.results.update(shifted)
    facts = facts_of_runs(home, cut)
    assert texts(facts) == {
        "uneven-runs": "Runs of 4 to 6 steps.",
        "not-finite": "NaN or Inf among the values of x.",
    }


def test_a_recording_of_one_step_has_unknown_dependence(home: Path) -> None:
    recording = small_runs(small_model())
    short = Recording(recording.calls[:1], recording.signature)
    facts = facts_of_runs(home, short)
    assert [spec.dependence for spec in facts.inputs] == [None, None]
    assert texts(facts)["dependence-unknown"] == (
        "What the inputs depend on is not known: dependence: recording: expected a run of at "
        "least 2 steps, got 1 step. Record a whole sampler run."
    )
    assert codes(facts)[-1] == "no-timestep"
    data = json.loads(facts_json(facts))
    assert [spec["dependence"] for spec in data["inputs"]] == [None, None]
    assert re.search(r"^ x +float32 +\(2, 5, 4\) +unknown$", printed(facts), re.MULTILINE)


# JSON, and the command.

KEYS = {
    "plan": "kind path files binding recipe sampler inputs schedule targets front warnings",
    "artifact": "kind path manifest schedule modes run_share cache_bytes layers warnings",
    "recording": "kind path bytes value_bytes calls calls_per_step runs steps inputs constants "
    "timestep timestep_values warnings",
}


@pytest.mark.parametrize("kind", KEYS)
def test_json_keys_stay_as_they_are(home: Path, kind: str) -> None:
    data = json.loads(facts_json(inspect_subject(home / NAMES[kind])))
    assert list(data) == KEYS[kind].split()
    assert data["kind"] == kind
    assert data["path"] == str(home / NAMES[kind])


def test_json_names_modes_classes_and_work(home: Path) -> None:
    plan = json.loads(facts_json(inspect_subject(home / "plan")))
    assert plan["schedule"]["modes"][:2] == ["REFRESH", "CALIBRATE"]
    assert [spec["dependence"] for spec in plan["inputs"]] == ["latent", "step"]
    artifact = json.loads(facts_json(inspect_subject(home / "dit.onnx.d")))
    assert [entry["mode"] for entry in artifact["modes"]] == [mode.name for mode in StepMode]
    assert artifact["layers"][1]["work"]["CALIBRATE"] == "reuse"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def piped(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "calicache"), "inspect", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", NAMES.values())
def test_the_command_prints_the_facts(home: Path, name: str) -> None:
    done = run(home / name)
    assert done.exit_code == 0, done.output
    assert (
        steady(done.output).splitlines()[0]
        == steady(printed(inspect_subject(home / name))).splitlines()[0]
    )
    assert json.loads(run(home / name, "--json").output) == json.loads(
        facts_json(inspect_subject(home / name))
    )


def test_piped_output_is_plain_and_fits_80_columns(home: Path) -> None:
    done = piped(home / "dit.onnx.d")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    assert "blocks.{1-2}.fc2" in done.stdout


def test_strict_exits_with_2_where_there_are_warnings(home: Path) -> None:
    assert run(home / "dit.onnx.d", "--strict").exit_code == 2
    assert run(home / "dit.onnx.d", "--strict", "--json").exit_code == 2
    assert run(home / "plan", "--strict").exit_code == 0


def test_what_is_refused_exits_with_1_and_a_message(home: Path) -> None:
    done = piped(home)
    assert done.returncode == 1
    assert done.stdout == ""
    words = " ".join(done.stderr.split())
    assert "got a folder with dit.onnx.d, plan, runs.safetensors" in words
    assert "Traceback" not in done.stderr


def test_names_that_look_like_markup_are_printed_as_they_are(
    home: Path, manifest: Manifest, plan: Plan
) -> None:
    targets = (replace(manifest.targets[0], name="blocks[red].fc1"), *manifest.targets[1:])
    assert " blocks[red].fc1 " in printed(facts_of_artifact(home, manifest, targets=targets))
    rules = (SiteRule("blocks.[01].fc1", SiteMode.FULL),)
    assert " blocks.[01].fc1 " in printed(facts_of_plan(home, plan, rules=rules))


@pytest.mark.parametrize("kind", NAMES)
def test_narrow_terminals_lose_nothing(home: Path, kind: str) -> None:
    text = printed(inspect_subject(home / NAMES[kind]), width=44)
    assert max(len(line) for line in text.splitlines()) <= 44
