"""calicache diff: what differs between two plans or two artifacts, and that nothing else does."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from support.golden import assert_golden
from support.models import modes
from support.search.fronts import front_of
from support.small.subjects import other_artifact, small_folder
from typer.testing import CliRunner, Result

from calicache.export import Attention, Layout, Manifest, Precision, read_manifest
from calicache.export.artifact.open_sizes import OpenSize, SizeFormula
from calicache.graph_passes import Granularity, Plan, SiteMode, SiteRule, StepMode, Weighting
from calicache.graph_passes.common.errors import SubjectError
from calicache.graph_passes.common.rejection import Rejection
from calicache.graph_passes.recording.binding import Binding
from calicache.graph_passes.recording.grid import Grid
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.settings.choices import BranchKind
from calicache.graph_passes.settings.recipe import Recipe
from calicache.tools.cli import app
from calicache.tools.diff.command import diff_subjects
from calicache.tools.diff.difference import (
    Change,
    Difference,
    LayerChange,
    NumberChange,
    StepChange,
    TargetChange,
    TargetState,
)
from calicache.tools.diff.subjects import diff_artifacts, diff_plans
from calicache.tools.diff.view import describe_difference
from calicache.tools.inspect.artifact import artifact_facts
from calicache.tools.inspect.layers import LayerWork
from calicache.tools.inspect.plan import plan_facts
from calicache.tools.terminal.text import json_text

R, C, U, F = StepMode
FITTED = "fitted to the recorded runs"


@pytest.fixture(scope="module")
def home() -> Path:
    return small_folder()


@pytest.fixture(scope="module")
def plan(home: Path) -> Plan:
    return Plan.load(home / "plan")


@pytest.fixture(scope="module")
def manifest(home: Path) -> Manifest:
    return read_manifest(home / "dit.onnx.d")


def printed(difference: Difference, width: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, width=width, highlight=False).print(describe_difference(difference))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


# Plans.


def between(home: Path, plan: Plan, other: Plan) -> Difference:
    return diff_plans(plan_facts(home / "plan", plan), plan_facts(home / "plan", other))


def changed(plan: Plan, **changes: object) -> Plan:
    """The plan with other fields of its binding or its recipe."""
    bound = {name: value for name, value in changes.items() if hasattr(plan.binding, name)}
    chosen = {name: value for name, value in changes.items() if name not in bound}
    return replace(
        plan, binding=replace(plan.binding, **bound), recipe=replace(plan.recipe, **chosen)
    )


def test_a_plan_saved_twice_is_equal(home: Path, plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "again")
    difference = diff_subjects(home / "plan", tmp_path / "again")
    assert difference.equal
    assert difference.kind == "plan"
    assert printed(difference).startswith("calicache plans are equal\nA  ")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rank": 3}, Change("rank", ("4",), ("3",))),
        ({"weighting": Weighting.NONE}, Change("weighting", ("covariance",), ("none",))),
        ({"include": ("a", "*")}, Change("include", (), ("a",))),
        (
            {"rules": (SiteRule("out", SiteMode.CALIBRATE, 3),)},
            Change(
                "rules",
                ("blocks.0 reuse", "blocks.1.fc1 full", "blocks.2.fc2 calibrate rank 3"),
                ("out calibrate rank 3",),
            ),
        ),
        ({"timestep": None}, Change("timestep", ("timestep falls, 1 calls a step",), ())),
        ({"run_values": {"x": ("12",)}}, Change("run values", (), ("x: 12",))),
        ({"reads": "[1]"}, Change("reads", ("[]",), ("[1]",))),
    ],
)
def test_a_changed_setting_is_the_only_difference(
    home: Path, plan: Plan, changes: dict[str, object], expected: Change
) -> None:
    difference = between(home, plan, changed(plan, **changes))
    assert difference.settings == (expected,)
    assert not difference.equal
    rest = replace(difference, settings=())
    assert rest.equal


def test_every_setting_counts(home: Path, plan: Plan) -> None:
    """No field of the settings is left out: each one, changed, makes another plan."""
    form = plan.binding.signature
    others: dict[str, object] = {
        "schedule": modes("RCCCCC"),
        "rank": 5,
        "order": 0,
        "weighting": Weighting.INCREMENT,
        "granularity": Granularity.BRANCH,
        "branch": BranchKind.INT8,
        "rules": (),
        "include": (),
        "exclude": ("x",),
        "signature": replace(form, tensors=tuple(reversed(form.tensors))),
        "dependence": dict.fromkeys(plan.binding.dependence, Dependence.LATENT),
        "timestep": None,
        "weights_hash": "0",
        "output_weights": None,
        "latent": None,
        "correction": "why",
        "reads": "[2]",
        "run_values": {"x": ()},
        "grid": Grid((1.0,), (0.0,)),
        "ranks": {"blocks.2.fc1": 1},
    }
    assert set(others) == {*Binding.__dataclass_fields__, *Recipe.__dataclass_fields__}
    both: dict[str, object] = {"output_weights": None, "latent": None}
    for name, value in others.items():
        partner = both if name in ("output_weights", "latent", "order") else {}
        assert not between(home, plan, changed(plan, **{**partner, name: value})).equal, name


def test_a_list_in_another_order_differs(home: Path, plan: Plan) -> None:
    rules = tuple(reversed(plan.recipe.rules))
    (change,) = between(home, plan, changed(plan, rules=rules)).settings
    assert change.a == tuple(reversed(change.b))
    assert len(change.a) == 3


def test_steps_that_differ_are_named(home: Path, plan: Plan) -> None:
    other = changed(plan, schedule=modes("RCCURFC"), output_weights=None, latent=None)
    difference = between(home, plan, other)
    assert difference.schedule.steps == (StepChange(2, R, C), StepChange(6, None, C))
    steps = json.loads(json_text(difference))["schedule"]["steps"]
    assert steps[1] == {"step": 6, "a": None, "b": "CALIBRATE"}
    lines = printed(difference).splitlines()
    place = lines.index("Schedule: 2 of 7 steps differ")
    assert lines[place + 1 : place + 4] == [
        "A    0  RCRURF",
        "B    0  RCCURFC",
        "          ^   ^",
    ]


def test_long_schedules_are_marked_line_by_line(home: Path, plan: Plan) -> None:
    first = changed(plan, schedule=(R,) * 60, output_weights=None, latent=None)
    second = changed(first, schedule=(R,) * 55 + (F,) * 5)
    lines = printed(between(home, first, second)).splitlines()
    place = lines.index("Schedule: 5 of 60 steps differ")
    assert lines[place + 3] == ""
    assert lines[place + 6] == " " * 13 + "^" * 5
    assert lines[place + 5] == "B   50  RRRRRFFFFF"


def test_targets_are_added_removed_and_given_other_ranks(home: Path, plan: Plan) -> None:
    name, *rest = plan.statistics
    fewer = replace(plan, statistics={key: plan.statistics[key] for key in rest})
    difference = between(home, plan, changed(fewer, ranks={rest[0]: 2, "blocks.9.fc1": 1}))
    assert difference.targets == (
        TargetChange(name, TargetState(None, None), None),
        TargetChange(rest[0], TargetState(None, None), TargetState(2, None)),
        TargetChange("blocks.9.fc1", None, TargetState(1, None)),
    )
    assert re.search(r"^ blocks\.9\.fc1 +- +rank 1$", printed(difference), re.MULTILINE)


def test_other_weights_and_statistics_belong_to_something_else(
    home: Path, plan: Plan, tmp_path: Path
) -> None:
    other = changed(replace(plan, statistics={}), weights_hash="ab" * 32)
    other.save(tmp_path / "other")
    difference = diff_subjects(home / "plan", tmp_path / "other")
    names = [change.name for change in difference.belonging]
    assert names == ["weights", "statistics.safetensors"]
    assert difference.belonging[0].b == ("ab" * 32,)
    assert re.search(r"^ weights +[0-9a-f]{16} +abababababababab$", printed(difference), re.M)


def test_output_weights_say_how_far_they_are_apart(home: Path, plan: Plan) -> None:
    table = plan.recipe.output_weights
    assert table is not None
    moved = ((table[0][0] + 0.25, *table[0][1:]), *table[1:])
    (change,) = between(home, plan, changed(plan, output_weights=moved)).settings
    assert change == Change("output weights", ("fitted",), ("fitted, up to 0.25 from A",))
    none = between(home, plan, changed(plan, output_weights=None, latent=None))
    assert Change("output weights", ("fitted",), ()) in none.settings


def test_output_weights_of_another_order_are_told_apart(home: Path, plan: Plan) -> None:
    table = plan.recipe.output_weights
    assert table is not None
    wider = tuple((*row, 0.0) for row in table)
    other = changed(plan, order=2, output_weights=wider)
    assert between(home, plan, other).settings == (
        Change("order", ("1",), ("2",)),
        Change("output weights", ("fitted",), ("fitted, for other steps or order",)),
    )


def test_fronts_and_their_costs(home: Path, plan: Plan) -> None:
    first = replace(plan, front=front_of((0.3, 0.5), (0.1, 0.01), choice=1))
    second = replace(plan, front=front_of((0.3, 0.6), (0.1, 0.02), choice=1))
    difference = between(home, first, second)
    assert difference.settings == (
        Change(
            "front",
            ("budget 0.5", "2 points, number 1 taken"),
            ("budget 0.5", "2 points, number 1 taken", "with other numbers"),
        ),
    )
    cost, error = difference.costs
    assert cost == NumberChange("cost in MACs", "share", 0.5, 0.6)
    assert (error.name, error.unit) == ("error of the point", "error")
    assert between(home, plan, first).settings == (
        Change("front", (), ("budget 0.5", "2 points, number 1 taken")),
    )


def test_text_of_two_plans_is_as_it_was(home: Path, plan: Plan) -> None:
    other = changed(
        plan.with_schedule(modes("RCCRCC")),
        ranks={"blocks.2.fc1": 2},
        rules=plan.recipe.rules[:1],
    )
    text = printed(between(home, plan, other))
    assert_golden("diff_plans.txt", text.replace(str(home), "FOLDER"))


# Artifacts.


def beside(home: Path, manifest: Manifest, **changes: object) -> Difference:
    folder = home / "dit.onnx.d"
    other = replace(manifest, **changes)  # type: ignore[arg-type]
    return diff_artifacts(artifact_facts(folder, manifest), artifact_facts(folder, other))


def test_an_artifact_copied_is_equal(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "dit.onnx.d", tmp_path / "copy.onnx.d")
    difference = diff_subjects(home / "dit.onnx.d", tmp_path / "copy.onnx.d")
    assert difference.equal
    assert difference.kind == "artifact"


def test_two_artifacts_of_one_model(home: Path, manifest: Manifest) -> None:
    other = read_manifest(other_artifact())
    difference = diff_subjects(home / "dit.onnx.d", other_artifact())
    names = [change.name for change in difference.belonging]
    assert names == ["graphs.json.gz", "model.onnx"]  # of the same weights
    rank, weights = difference.settings
    assert (rank, weights.name) == (Change("rank", ("4",), ("2",)), "output weights")
    assert [step.step for step in difference.schedule.steps] == [2, 3, 4, 5]
    by_name = {change.name: change for change in difference.targets}
    reused, added = by_name["blocks.0"], by_name["blocks.0.fc1"]
    assert (reused.a, reused.b) == (TargetState(0, None), None)
    assert added.a is None
    assert added.b is not None
    assert added.b.rank == 2
    assert LayerChange("blocks.1.fc1", C, LayerWork.FULL, LayerWork.CALIBRATE) in difference.layers
    costs = {change.name: change for change in difference.costs}
    assert costs["whole run"] == NumberChange(
        "whole run", "share", manifest.run_share, other.run_share
    )
    reuse = manifest.mode(U).macs / manifest.plain_macs
    assert costs["a step of REUSE"] == NumberChange("a step of REUSE", "share", reuse, None)
    assert (costs["caches"].a, costs["caches"].b) == (manifest.cache_bytes, other.cache_bytes)
    text = printed(difference)
    assert re.search(r"^ blocks\.\{1-2\}|^ blocks\.1\.fc1 +CALIBRATE +full +calibrate$", text, re.M)


def test_two_layouts_are_told_apart_by_their_files() -> None:
    difference = diff_subjects(other_artifact("RCUFRC", Layout.PAIR), other_artifact())
    assert Change("layout", ("pair",), ("step",)) in difference.structure
    files = {change.name: (change.a, change.b) for change in difference.belonging}
    assert files["refresh.onnx"][1] == ()
    assert len(files["refresh.onnx"][0][0]) == 64


def test_energies_and_rejections_are_compared(home: Path, manifest: Manifest) -> None:
    first, second, *rest = manifest.targets
    moved = (first, replace(second, energy=0.5), *rest)
    kept, *_ = manifest.rejections
    rejections = (kept, Rejection("blocks.7", "linear_7", "it has no channels"))
    difference = beside(home, manifest, targets=moved, rejections=rejections)
    assert difference.targets == (
        TargetChange(
            second.name, TargetState(second.rank, second.energy), TargetState(second.rank, 0.5)
        ),
    )
    (change,) = difference.structure
    assert change.name == "rejections"
    assert change.b == ("blocks.7: it has no channels",)
    assert change.a[0].startswith("out: before the first residual branch")


def test_every_field_of_the_manifest_counts(home: Path, manifest: Manifest) -> None:
    others: dict[str, object] = {
        "format": 0,
        "calicache": "0",
        "layout": Layout.PAIR,
        "files": manifest.files[1:],
        "schedule": modes("RCRUFF"),
        "rank": 1,
        "branch": BranchKind.INT8,
        "order": 0,
        "weighting": Weighting.NONE,
        "output_weights": None,
        "correction": "why",
        "weights_hash": "0",
        "inputs": (),
        "calls_per_step": 2,
        "fixed": {"x": ()},
        "outputs": (),
        "caches": tuple(replace(c, name=f"{c.name}_x") for c in manifest.caches),
        "history": 5,
        "cache_bytes": 1,
        "plain_macs": 1,
        "modes": tuple(replace(record, macs=1) for record in manifest.modes),
        "targets": manifest.targets[1:],
        "branches": (),
        "rejections": (),
        "sampler": "other",
        "attention": Attention.STANDARD,
        "precision": Precision.INT8,
        "open_sizes": {"x": (OpenSize(0, SizeFormula(True, 1, {})),)},
        "front": front_of((0.3, 0.5), (0.1, 0.01), choice=1),
    }
    assert set(others) == set(Manifest.__dataclass_fields__)
    for name, value in others.items():
        changes = {name: value}
        if name == "caches":  # nothing may read or write what is not there
            bare = (replace(record, reads=(), writes=()) for record in manifest.modes)
            changes["modes"] = tuple(bare)
        assert not beside(home, manifest, **changes).equal, name


# What is refused, JSON, and the command.


@pytest.mark.parametrize(
    ("a", "b", "got"),
    [
        ("plan", "dit.onnx.d", "a plan and an artifact"),
        ("dit.onnx.d", "plan", "an artifact and a plan"),
        ("runs.safetensors", "runs.safetensors", "a recording and a recording"),
    ],
)
def test_other_pairs_are_refused(home: Path, a: str, b: str, got: str) -> None:
    with pytest.raises(SubjectError) as caught:
        diff_subjects(home / a, home / b)
    assert str(caught.value) == (
        f"subject: {home / a} and {home / b}: expected two plans or two artifacts, got {got}. "
        "Give two of one kind; `calicache inspect` shows one of any kind."
    )


def test_json_has_stable_keys_and_says_whether_they_are_equal(home: Path, plan: Plan) -> None:
    difference = between(home, plan, plan.with_schedule(modes("RCCRCC")))
    data = json.loads(json_text(difference))
    keys = "kind a b belonging schedule settings targets layers costs structure equal"
    assert " ".join(data) == keys
    assert data["equal"] is False
    assert data["schedule"]["steps"][0] == {"step": 2, "a": "REFRESH", "b": "CALIBRATE"}
    assert json.loads(json_text(between(home, plan, plan)))["equal"] is True


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["diff", *map(str, arguments)])


@pytest.mark.parametrize(
    ("other", "code"),
    [(lambda home: home / "plan", 0), (lambda _: other_artifact(), 1), (None, 3)],
)
def test_exit_codes(
    home: Path, plan: Plan, tmp_path: Path, other: Callable[[Path], Path] | None, code: int
) -> None:
    plan.with_rank(2).save(tmp_path / "other")
    path = other(home) if other else tmp_path / "other"
    assert run(home / "plan", path).exit_code == code
    assert run(home / "plan", path, "--json").exit_code == code


@pytest.mark.slow
def test_piped_output_is_plain_and_fits_80_columns(home: Path) -> None:
    done = run(home / "dit.onnx.d", other_artifact())
    assert done.exit_code == 3, done.stderr
    assert "\x1b" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    assert done.stdout.startswith("calicache artifacts differ")
