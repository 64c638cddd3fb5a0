"""calicache inspect: the text and the JSON of the three kinds, and the command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.golden import assert_golden
from support.small.subjects import printed
from typer.testing import CliRunner, Result

from calicache.export import Manifest
from calicache.graph_passes import Plan, SiteMode, SiteRule, StepMode
from calicache.tools.cli import app
from calicache.tools.inspect.artifact import artifact_facts
from calicache.tools.inspect.command import inspect_subject
from calicache.tools.inspect.plan import plan_facts
from calicache.tools.terminal.text import json_text

R, C, U, F = StepMode
NAMES = {
    "plan": "plan",
    "artifact": "dit.onnx.d",
    "recording": "runs.safetensors",
}


def steady(text: str) -> str:
    """Without versions, digests, and sizes of files that depend on other packages' versions."""
    text = re.sub(r"\b[0-9a-f]{16}\b", "<digest>", text)
    sizes = r"(\.onnx, |\.json, |\.gz, |\.bin, |\.safetensors, |file +|size +)[\d.]+ k?B"
    text = re.sub(sizes, r"\1<size>", text)
    text = re.sub(r"\S+ in sample", "<number> in sample", text)
    return re.sub(r"calicache \d+\.\d+\.\d+", "calicache <version>", text)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_text_is_as_it_was(home: Path, kind: str) -> None:
    text = steady(printed(inspect_subject(home / NAMES[kind])))
    assert_golden(f"inspect_{kind}.txt", text)


KEYS = {
    "plan": "kind path files binding recipe sampler inputs schedule targets front in_sample "
    "warnings",
    "artifact": "kind path manifest schedule modes run_share cache_bytes layers warnings",
    "recording": "kind path bytes value_bytes calls calls_per_step runs steps inputs constants "
    "timestep timestep_values warnings",
}


@pytest.mark.parametrize("kind", KEYS)
def test_json_keys_stay_as_they_are(home: Path, kind: str) -> None:
    data = json.loads(json_text(inspect_subject(home / NAMES[kind])))
    assert list(data) == KEYS[kind].split()
    assert data["kind"] == kind
    assert data["path"] == str(home / NAMES[kind])


def test_json_names_modes_classes_and_work(home: Path) -> None:
    plan = json.loads(json_text(inspect_subject(home / "plan")))
    assert plan["schedule"]["modes"][:2] == ["REFRESH", "CALIBRATE"]
    assert [spec["dependence"] for spec in plan["inputs"]] == ["latent", "step"]
    artifact = json.loads(json_text(inspect_subject(home / "dit.onnx.d")))
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
        json_text(inspect_subject(home / name))
    )


@pytest.mark.slow
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
    done = run(home)
    assert (done.exit_code, done.stdout) == (1, "")
    words = " ".join(done.stderr.split())
    assert "got a folder with dit.onnx.d, plan, runs.safetensors" in words


def test_names_that_look_like_markup_are_printed_as_they_are(
    home: Path, manifest: Manifest, plan: Plan
) -> None:
    targets = (replace(manifest.targets[0], name="blocks[red].fc1"), *manifest.targets[1:])
    named = replace(manifest, targets=targets)
    assert " blocks[red].fc1 " in printed(artifact_facts(home / "dit.onnx.d", named))
    rules = (SiteRule("blocks.[01].fc1", SiteMode.FULL),)
    ruled = replace(plan, recipe=replace(plan.recipe, rules=rules))
    assert " blocks.[01].fc1 " in printed(plan_facts(home / "plan", ruled))


@pytest.mark.parametrize("kind", NAMES)
def test_narrow_terminals_lose_nothing(home: Path, kind: str) -> None:
    text = printed(inspect_subject(home / NAMES[kind]), width=44)
    assert max(len(line) for line in text.splitlines()) <= 44
