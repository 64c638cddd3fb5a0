from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model import FashionDiT
from safetensors.torch import load_file, save_file
from support.models import STEPS
from torch import Tensor, nn

from calicache.graph_passes import (
    CalibrationTarget,
    CapturedGraph,
    Dependence,
    Granularity,
    Plan,
    Recording,
    SiteMode,
    SiteRule,
    Sites,
    StepMode,
    Weighting,
    classify_nodes,
    find_sites,
    record,
    uniform_schedule,
)
from calicache.graph_passes.api.plan_file import PLAN_FILE, STATISTICS_FILE
from calicache.graph_passes.common.disk.documents import sum_of
from calicache.graph_passes.common.disk.hashing import hash_weights, sha256_of
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.common.progress import Progress
from calicache.graph_passes.factors.observe import observe
from calicache.graph_passes.factors.statistics import (
    ChannelStatistics,
    SecondMoments,
    check_statistics,
)
from calicache.graph_passes.graph.capture import capture
from calicache.graph_passes.recording.call_tree import CallTree, Container
from calicache.graph_passes.recording.signature import ConstantSpec
from calicache.graph_passes.recording.timestep import Timestep
from calicache.graph_passes.settings.schedule import Table, output_table
from calicache.graph_passes.sites.targets import assign

R, C, U, F = StepMode
schedules = st.lists(st.sampled_from(StepMode), max_size=40).map(lambda rest: (R, *rest))


def refuses(message: str) -> pytest.RaisesExc[PlanError]:
    return pytest.raises(PlanError, match=f"^{re.escape(message)}$")


def assert_equal(one: Plan, other: Plan) -> None:
    assert (one.binding, one.recipe) == (other.binding, other.recipe)
    assert one.no_sampler == other.no_sampler
    assert set(one.statistics) == set(other.statistics)
    for name, statistics in one.statistics.items():
        assert type(statistics) is type(other.statistics[name])
        for part in fields(statistics):
            mine, its = (getattr(s, part.name) for s in (statistics, other.statistics[name]))
            assert (mine is None) == (its is None)
            assert mine is None or torch.equal(mine, its)


@pytest.fixture(scope="module")
def graph_and_sites(dit: FashionDiT, dit_recording: Recording) -> tuple[CapturedGraph, Sites]:
    captured = capture(dit, dit_recording.signature)
    classes = classify_nodes(captured, dit_recording.dependence)
    return captured, find_sites(captured, classes)


@pytest.fixture(scope="module")
def targets(graph_and_sites: tuple[CapturedGraph, Sites]) -> tuple[CalibrationTarget, ...]:
    return assign(*graph_and_sites, rank=4)[0]


def check(plan: Plan, targets: Sequence[CalibrationTarget]) -> None:
    """The statistics of a plan against targets."""
    check_statistics(plan.statistics, plan.recipe.weighting, targets)


@pytest.mark.slow
def test_plan_holds_what_the_recording_showed(
    dit: FashionDiT,
    dit_recording: Recording,
    dit_plan: Plan,
    graph_and_sites: tuple[CapturedGraph, Sites],
    targets: tuple[CalibrationTarget, ...],
) -> None:
    kept, bound = dit_plan.recipe, dit_plan.binding
    assert dit_plan.schedule == kept.schedule == (R, C, C, R, C, C)
    assert (kept.rank, kept.weighting) == (4, Weighting.INCREMENT)
    assert (kept.include, kept.exclude) == (("*",), ())
    assert bound.signature == dit_recording.signature
    assert bound.dependence == {
        "hidden_states": Dependence.LATENT,
        "timestep": Dependence.STEP,
        "class_labels": Dependence.RUN,
    }
    assert bound.timestep == Timestep("timestep", descends=True)
    assert bound.weights_hash == hash_weights(dit)
    assert (bound.reads, bound.run_values, bound.calls) == ("[]", {}, 1)
    assert (kept.order, kept.granularity, kept.rules) == (0, Granularity.LINEAR, ())
    assert (kept.output_weights, kept.latent) == (None, None)
    assert kept.correction == "not asked for"
    assert list(dit_plan.statistics) == [site.name for site in graph_and_sites[1].linears]
    expected = observe(
        graph_and_sites[0], targets, dit_recording, Weighting.INCREMENT, kept.schedule
    )
    assert_equal(dit_plan, Plan(bound, kept, expected))


def test_options_reach_the_plan(dit: FashionDiT, dit_recording: Recording) -> None:
    seen: list[Progress] = []
    names = {"include": ["blocks.1.*"], "exclude": ["*.fc?"]}
    rules = (SiteRule("*.v", SiteMode.FULL), SiteRule("*.proj", SiteMode.CALIBRATE, 2))
    options = {"schedule": 2, "rank": 8, "weighting": "activation", "rules": rules, **names}
    plan = Plan.from_trajectory(
        dit,
        dit_recording,
        **options,
        order=1,
        correct=False,
        on_progress=seen.append,
    )
    assert plan.schedule == (R, C, R, C, R, C)
    assert (plan.recipe.order, plan.recipe.rules) == (1, rules)
    assert (plan.recipe.rank, plan.recipe.weighting) == (8, Weighting.ACTIVATION)
    assert (plan.recipe.include, plan.recipe.exclude) == (("blocks.1.*",), ("*.fc?",))
    assert list(plan.statistics) == [f"blocks.1.attn.{name}" for name in ("q", "k", "proj")]
    assert [progress.done for progress in seen] == [0, *range(STEPS + 1)]  # two stages begin
    assert {progress.total for progress in seen} == {STEPS}


def test_schedule_may_be_written_in_names_and_letters(
    dit: FashionDiT, dit_recording: Recording
) -> None:
    plan = Plan.from_trajectory(
        dit,
        dit_recording,
        schedule=[R, "reuse", "C", "REFRESH"],
        rank=4,
        weighting="none",
        correct=False,
    )
    assert plan.schedule == (R, U, C, R)
    assert plan.statistics == {}


def test_uniform_schedule() -> None:
    assert uniform_schedule(5, 3) == (R, C, C, R, C)
    assert uniform_schedule(4, 2, U) == (R, U, R, U)
    assert uniform_schedule(3, 1) == (R, R, R)
    assert uniform_schedule(1, 9) == (R,)


@pytest.mark.parametrize(("steps", "interval", "name"), [(0, 3, "steps"), (3, 0, "interval")])
def test_uniform_schedule_needs_a_step_and_an_interval(
    steps: int, interval: int, name: str
) -> None:
    with refuses(f"plan: {name}: expected 1 or more, got 0. Raise {name}."):
        uniform_schedule(steps, interval)


@settings(deadline=None)
@given(steps=st.integers(1, 60), interval=st.integers(1, 60))
def test_interval_of_a_uniform_schedule(dit_plan: Plan, steps: int, interval: int) -> None:
    plan = dit_plan.with_schedule(uniform_schedule(steps, interval))
    assert plan.interval == min(steps, interval)


@settings(deadline=None)
@given(schedule=schedules)
def test_interval_is_the_longest_stretch_after_a_refresh(
    dit_plan: Plan, schedule: tuple[StepMode, ...]
) -> None:
    stretches = "".join("R" if mode is R else "." for mode in schedule).split("R")[1:]
    expected = max(len(stretch) for stretch in stretches) + 1
    assert dit_plan.with_schedule(schedule).interval == expected


@pytest.mark.parametrize("name", ["plan", "a plan with spaces", "new/folders/für plan.d"])
def test_saved_plan_is_read_back_equal(dit_plan: Plan, tmp_path: Path, name: str) -> None:
    dit_plan.with_rank(9).save(tmp_path / name)
    dit_plan.save(tmp_path / name)  # in its place
    assert_equal(Plan.load(tmp_path / name), dit_plan)
    assert_equal(Plan.load(str(tmp_path / name)), dit_plan)
    # Nothing else is left beside it.
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [Path(name).name]


@settings(max_examples=40, deadline=None)
@given(schedule=schedules, rank=st.integers(0, 1000), weighting=st.sampled_from(Weighting))
def test_any_settings_survive_json(
    dit_plan: Plan, schedule: tuple[StepMode, ...], rank: int, weighting: Weighting
) -> None:
    binding = replace(dit_plan.binding, timestep=None)
    recipe = replace(dit_plan.recipe, weighting=weighting)
    plan = Plan(binding, recipe, {}).with_schedule(schedule).with_rank(rank)
    with tempfile.TemporaryDirectory() as folder:
        plan.save(Path(folder) / "plan")
        loaded = Plan.load(Path(folder) / "plan")
    assert_equal(loaded, plan)
    assert all(isinstance(mode, StepMode) for mode in loaded.schedule)


@pytest.mark.parametrize("value", [None, True, 1, 1.0, "1", math.inf, -math.inf])
def test_constant_arguments_survive_json(dit_plan: Plan, tmp_path: Path, value: object) -> None:
    constants = (ConstantSpec("scale", value),)
    form = dit_plan.binding.signature
    tree = CallTree(Container.DICT, (*form.order, "scale"), (*form.tree.children, None))
    order = (*form.order, "scale")
    signature = replace(form, constants=constants, order=order, tree=tree)
    binding = dit_plan.binding.with_signature(signature)
    Plan(binding, dit_plan.recipe, {}).save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan").binding.signature.constants[0].value
    assert loaded == value
    assert type(loaded) is type(value)


UNFIT = ChannelStatistics(torch.zeros(3, device="meta"), torch.zeros(3))


@pytest.mark.parametrize("late", [False, True])
def test_failing_save_leaves_the_old_plan(dit_plan: Plan, tmp_path: Path, late: bool) -> None:
    dit_plan.save(tmp_path / "plan")
    # A tensor without values fails at once; a bad setting, after the statistics are written.
    binding = replace(dit_plan.binding, weights_hash=object())
    unfit = replace(dit_plan, binding=binding, statistics={})
    unfit = unfit if late else replace(dit_plan, statistics={"site": UNFIT})
    with pytest.raises(Exception, match=r"unknown type|meta"):
        unfit.save(tmp_path / "plan")
    assert_equal(Plan.load(tmp_path / "plan"), dit_plan)
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def edit(folder: Path, **changes: object) -> None:
    written = json.loads((folder / PLAN_FILE).read_text())
    for key, value in changes.items():
        places = [written, written["binding"], written["recipe"]]
        next(place for place in places if key in place)[key] = value
    written["sha256"] = sum_of(written)
    (folder / PLAN_FILE).write_text(json.dumps(written))


def truncate(folder: Path, name: str = STATISTICS_FILE) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-10])


def add_to_statistics(folder: Path, value: float, *, drop: str | None = None) -> None:
    tensors = load_file(folder / STATISTICS_FILE)
    kept = {name: tensor + value for name, tensor in tensors.items() if name != drop}
    save_file(kept, folder / STATISTICS_FILE)


def rehash(folder: Path) -> None:
    edit(folder, files={STATISTICS_FILE: sha256_of(folder / STATISTICS_FILE)})


def change_text(folder: Path, old: str, new: str) -> None:
    text = (folder / PLAN_FILE).read_text()
    assert old in text
    (folder / PLAN_FILE).write_text(text.replace(old, new, 1))


def enlarge(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(2**32)  # no room on the disk is taken


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link_to_zeros(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


GOOD_ROWS = ((1.0, 0.0, 0.0),) * STEPS  # at order 0: own, kept, latent
Q = "blocks.0.attn.q.output"
DAMAGES = {
    "no settings": (lambda at: (at / PLAN_FILE).unlink(), "No such file"),
    "no statistics": (lambda at: (at / STATISTICS_FILE).unlink(), "No such file"),
    "half the json": (lambda at: truncate(at, PLAN_FILE), "EOF while parsing"),
    "not text": (lambda at: (at / PLAN_FILE).write_bytes(b"\x80"), "Error: "),
    "not a plan": (lambda at: (at / PLAN_FILE).write_text("{}"), "marked as calicache plan"),
    "one number changed": (lambda at: change_text(at, '"rank": 4', '"rank": 5'), "SHA-256"),
    "nested without end": (lambda at: (at / PLAN_FILE).write_text("[" * 10**6), "recursion limit"),
    "very large": (lambda at: enlarge(at / PLAN_FILE), "more than the 16777216 of any such file"),
    "very many values": (
        lambda at: (at / PLAN_FILE).write_text("[" + "1," * 10**6 + "1]"),
        "more than the 250000 values",
    ),
    "a pipe": (lambda at: make_pipe(at / PLAN_FILE), "plan.json is no regular file"),
    "a pipe of statistics": (lambda at: make_pipe(at / STATISTICS_FILE), "is no regular file"),
    "without end": (lambda at: link_to_zeros(at / PLAN_FILE), "plan.json is no regular file"),
    "an input that is not there": (lambda at: edit(at, dependence={"x": 1}), "binding: expected"),
    "other reads": (lambda at: edit(at, reads="[[]"), "reads: expected a list of numbers"),
    "reads of texts": (lambda at: edit(at, reads='["a"]'), "reads: expected a list of numbers"),
    "weights that overflow": (
        lambda at: edit(at, output_weights=[[1e308, 0.0, 0.0]] * STEPS, latent="hidden_states"),
        "1e+308 in a row",
    ),
    "calls without end": (
        lambda at: edit(at, timestep={"name": "timestep", "descends": True, "calls": 10**9}),
        "binding.timestep.calls: Input should be less than or equal to 64",
    ),
    "a number as text": (lambda at: edit(at, rank="4"), "recipe.rank: Input should be a valid"),
    "steps without end": (lambda at: edit(at, schedule=[0] * 100_000), "2000 step modes"),
    "truncated": (truncate, "is not the file the plan was saved with"),
    "truncated, hash mended": (lambda at: [truncate(at), rehash(at)], "SafetensorError"),
    "swapped": (lambda at: add_to_statistics(at, 1.0), "is not the file the plan was saved with"),
    "half a site": (lambda at: [add_to_statistics(at, 0.0, drop=Q), rehash(at)], "output"),
    "other format": (lambda at: edit(at, format=99), "format 99, this version reads 10"),
    "later format": (lambda at: edit(at, format=11, recipe={}), "format 11, this version reads 10"),
    "the first format": (lambda at: edit(at, format=1), "format 1, this version reads 10"),
    "the last format": (lambda at: edit(at, format=9), "format 9, this version reads 10"),
    "unknown order": (lambda at: edit(at, order=3), "order"),
    "unknown granularity": (lambda at: edit(at, granularity="head"), "granularity"),
    "bad output weights": (lambda at: edit(at, output_weights=[[1.0]], latent="x"), "6 rows of 3"),
    "weights of no latent": (lambda at: edit(at, output_weights=GOOD_ROWS), "latent: expected"),
    "bad rule": (lambda at: edit(at, rules=[{"pattern": "*", "mode": "skip"}]), "rules"),
    "unknown mode": (lambda at: edit(at, schedule=[0, 7]), "schedule"),
    "bad schedule": (lambda at: edit(at, schedule=[1, 0]), "REFRESH"),
    "negative rank": (lambda at: edit(at, rank=-1), "rank"),
    "unknown weighting": (lambda at: edit(at, weighting="best"), "weighting"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_plan_is_refused_with_its_path_and_reason(
    dit_plan: Plan, tmp_path: Path, damage: str
) -> None:
    spoil, reason = DAMAGES[damage]
    dit_plan.save(tmp_path / "plan")
    spoil(tmp_path / "plan")
    start = f"plan: {tmp_path / 'plan'}: expected a folder written by Plan.save, got "
    with pytest.raises(PlanError, match=f"^{re.escape(start)}") as caught:
        Plan.load(tmp_path / "plan")
    assert reason in str(caught.value)
    assert str(caught.value).endswith("Make the plan again from the recording.")


def test_saving_replaces_a_plan_and_nothing_else(dit_plan: Plan, tmp_path: Path) -> None:
    dit_plan.save(tmp_path / "plan")
    dit_plan.with_rank(2).save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").recipe.rank == 2
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"...")
    (tmp_path / "letter").write_text("dear")
    shutil.copytree(tmp_path / "plan", tmp_path / "mixed")
    (tmp_path / "mixed" / "notes.txt").write_text("dear")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, got in (("photos", "a folder with a.jpg"), ("letter", "a file")):
        with refuses(
            f"plan: {tmp_path / name}: expected nothing, or a plan: nothing else is replaced, "
            f"got {got}. Choose another path, or delete what is there yourself."
        ):
            dit_plan.save(tmp_path / name)
    with pytest.raises(PlanError, match=r"got a folder with notes\.txt"):
        dit_plan.save(tmp_path / "mixed")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "empty").mkdir()
    dit_plan.save(tmp_path / "empty")
    assert_equal(Plan.load(tmp_path / "empty"), dit_plan)


@pytest.mark.parametrize(
    ("schedule", "got"), [((), "no steps"), ((C, R), "CALIBRATE"), ((U,), "REUSE")]
)
def test_schedule_must_start_with_refresh(
    dit: FashionDiT, dit_recording: Recording, dit_plan: Plan, schedule: tuple, got: str
) -> None:
    message = (
        f"plan: schedule: expected a first step that is REFRESH, got {got}. "
        "Start with StepMode.REFRESH: the caches are empty before it."
    )
    with refuses(message):
        dit_plan.with_schedule(schedule)
    with refuses(message):
        Plan.from_trajectory(dit, dit_recording, rank=4, schedule=schedule)


def test_rank_must_not_be_negative(dit_plan: Plan) -> None:
    with pytest.raises(PlanError, match="rank: expected 0 or more, got -1"):
        dit_plan.with_rank(-1)


def test_rank_above_a_layer_in_a_rule_names_the_layer(
    dit: FashionDiT, dit_recording: Recording, graph_and_sites: tuple[CapturedGraph, Sites]
) -> None:
    message = (
        "plan: rank of blocks.0.attn.q: expected 0 .. 32 for 32 -> 32, got 33. "
        "Choose a smaller rank, or exclude it."
    )
    rules = [SiteRule("*.q", SiteMode.CALIBRATE, rank=33)]
    for joint in (False, True):
        with refuses(message):
            assign(*graph_and_sites, rank=32, rules=rules, joint=joint)
    with refuses(message):
        Plan.from_trajectory(dit, dit_recording, rank=32, rules=rules)


def test_unknown_weighting_lists_the_valid_ones(dit: FashionDiT, dit_recording: Recording) -> None:
    valid = " | ".join(Weighting)
    with refuses(f"plan: weighting: expected {valid}, got 'svd'. Choose one of these."):
        Plan.from_trajectory(dit, dit_recording, rank=4, weighting="svd")


def test_changing_a_plan_leaves_the_original(dit_plan: Plan) -> None:
    changed = dit_plan.with_rank(9).with_schedule((R, U))
    assert (changed.recipe.rank, changed.schedule) == (9, (R, U))
    assert (dit_plan.recipe.rank, dit_plan.schedule) == (4, (R, C, C, R, C, C))
    assert changed.statistics is dit_plan.statistics


class Named(nn.Module):
    def __init__(self, name: str, weight: Tensor) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        self.register_buffer("table", torch.zeros(2))


def test_hash_changes_with_anything_that_the_weights_are() -> None:
    weight = torch.arange(6.0).view(2, 3)
    changed = [Named("a", weight.clone()) for _ in range(2)]
    changed[0].a[1, 2] += 1e-6
    changed[1].table[0] = 1.0
    changed += [Named("b", weight), Named("a", weight.view(3, 2)), Named("a", weight.half())]
    changed += [Named("a", weight.view(torch.int32))]  # the same bytes
    same = [Named("a", weight.clone()), Named("a", weight.T.contiguous().T)]
    expected = hash_weights(Named("a", weight))
    assert [hash_weights(model) for model in same] == [expected] * 2
    hashes = [hash_weights(model) for model in changed]
    assert len({expected, *hashes}) == 1 + len(changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.float64])
@pytest.mark.parametrize("shape", [(), (0, 3)])
def test_any_tensor_can_be_hashed(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert len(hash_weights(Named("a", torch.ones(shape, dtype=dtype)))) == 64


@pytest.mark.parametrize(
    ("statistics", "got"),
    [
        (ChannelStatistics(torch.tensor([math.nan] + [1.0] * 31), torch.ones(128)), "NaN or Inf"),
        (ChannelStatistics(torch.ones(32), torch.full((128,), math.inf)), "NaN or Inf"),
        (
            ChannelStatistics(torch.ones(128), torch.ones(32)),
            "shapes {'input': (128,), 'output': (32,)}",
        ),
        (ChannelStatistics(torch.ones(1), torch.ones(1)), "shapes {'input': (1,), 'output': (1,)}"),
        (None, "none"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(
    dit_plan: Plan,
    targets: tuple[CalibrationTarget, ...],
    statistics: ChannelStatistics | None,
    got: str,
) -> None:
    name = "blocks.1.mlp.fc1"
    check(dit_plan, targets)  # fits
    changed = {**dit_plan.statistics, name: statistics}
    bad = replace(dit_plan, statistics={k: v for k, v in changed.items() if v is not None})
    message = (
        f"plan: statistics of {name}: expected finite values of shapes "
        f"{{'input': (32,), 'output': (128,)}}, got {got}. "
        "Make the plan again from the recording, with the steps it will run."
    )
    with refuses(message):
        check(bad, targets)


def test_weighting_none_needs_no_statistics(
    dit_plan: Plan, targets: tuple[CalibrationTarget, ...]
) -> None:
    plain = replace(dit_plan.recipe, weighting=Weighting.NONE)
    check(replace(dit_plan, recipe=plain, statistics={}), targets)
    with pytest.raises(PlanError, match=r"statistics of blocks\.0\.attn\.q"):
        check(replace(dit_plan, statistics={}), targets)


# --- forecasts, rules, output weights ---------------------------------------------------------


def test_defaults_are_forecasts_covariance_and_fitted_outputs(
    forecast_plan: Plan, dit_recording: Recording
) -> None:
    kept = forecast_plan.recipe
    assert (kept.order, kept.weighting) == (2, Weighting.COVARIANCE)
    assert kept.correction == "fitted to the recorded runs"
    assert kept.outputs is kept.output_weights
    assert kept.latent == "hidden_states"
    assert [len(row) for row in kept.output_weights] == [5] * STEPS
    # A forecast has no output of its own, and what was not kept yet has no weight.
    assert kept.output_weights[5][0] == 0.0
    assert kept.output_weights[0][1:4] == (0.0, 0.0, 0.0)
    assert kept.output_weights[1][2:4] == (0.0, 0.0)
    assert kept.output_weights[1][4] != 0.0
    assert len(dit_recording.runs) == 1


def test_options_that_are_left_out_are_the_best_known(
    dit: FashionDiT, dit_recording: Recording
) -> None:
    kept = Plan.from_trajectory(dit, dit_recording, rank=4).recipe
    assert (kept.order, kept.weighting, kept.rules) == (2, Weighting.COVARIANCE, ())
    assert kept.granularity is Granularity.LINEAR
    assert kept.output_weights is not None


RULES = (
    SiteRule("blocks.0.attn", SiteMode.REUSE),
    SiteRule("blocks.0.mlp", SiteMode.CALIBRATE, 3, Granularity.BRANCH),
    SiteRule("blocks.1.mlp.fc?", SiteMode.FULL),
)


@pytest.fixture(scope="module")
def ruled_plan(dit: FashionDiT, dit_recording: Recording) -> Plan:
    """Rules of every kind, over a schedule of all modes."""
    return Plan.from_trajectory(
        dit, dit_recording, schedule=(R, C, R, U, C, F), rank=4, order=1, rules=RULES
    )


def test_rules_output_weights_and_second_moments_survive_saving(
    ruled_plan: Plan, tmp_path: Path
) -> None:
    assert set(ruled_plan.statistics) == {
        "blocks.0.mlp",
        "blocks.1.attn.q+k+v",
        "blocks.1.attn.proj",
    }
    moments = ruled_plan.statistics["blocks.0.mlp"]
    assert isinstance(moments, SecondMoments)
    assert set(moments.tensors()) == {"input", "cross", "energy"}
    assert ruled_plan.recipe.output_weights is not None
    ruled_plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert_equal(loaded, ruled_plan)
    assert loaded.recipe.rules == RULES
    assert loaded.recipe.output_weights == ruled_plan.recipe.output_weights
    assert loaded.recipe.latent == "hidden_states"
    assert type(loaded.recipe.rules[1].granularity) is Granularity
    assert loaded.recipe.rules[0].rank is None


def test_truncated_second_moments_are_refused(ruled_plan: Plan, tmp_path: Path) -> None:
    ruled_plan.save(tmp_path / "plan")
    truncate(tmp_path / "plan")
    with pytest.raises(PlanError, match="is not the file the plan was saved with"):
        Plan.load(tmp_path / "plan")


def test_statistics_of_an_unknown_part_are_refused(ruled_plan: Plan, tmp_path: Path) -> None:
    ruled_plan.save(tmp_path / "plan")
    tensors = load_file(tmp_path / "plan" / STATISTICS_FILE)
    save_file(
        {**tensors, "blocks.0.mlp.third": torch.zeros(2, 2)}, tmp_path / "plan" / STATISTICS_FILE
    )
    rehash(tmp_path / "plan")
    with pytest.raises(PlanError, match="third"):
        Plan.load(tmp_path / "plan")


@pytest.mark.parametrize("change", ["schedule", "rank"])
def test_what_was_fitted_is_dropped_with_what_it_was_fitted_to(
    forecast_plan: Plan, change: str
) -> None:
    schedule = (R, C, C, U)
    changed = (
        forecast_plan.with_rank(2) if change == "rank" else forecast_plan.with_schedule(schedule)
    )
    assert (changed.recipe.output_weights, changed.recipe.latent) == (None, None)
    assert changed.recipe.correction == "not fitted: the plan was changed"
    assert forecast_plan.recipe.output_weights is not None
    if change == "schedule":
        assert changed.recipe.outputs is None
    else:  # it still forecasts: by the plain table
        assert changed.recipe.outputs == output_table(changed.schedule, 2)


@pytest.mark.parametrize("order", [-1, 3])
def test_order_must_be_known(
    dit: FashionDiT, dit_recording: Recording, dit_plan: Plan, order: int
) -> None:
    change = "Raise" if order < 0 else "Lower"
    message = f"plan: order: expected 0 .. 2, got {order}. {change} order."
    with refuses(message):
        replace(dit_plan.recipe, order=order)
    with refuses(message):
        Plan.from_trajectory(dit, dit_recording, rank=4, order=order)


def test_unknown_granularity_lists_the_valid_ones(
    dit: FashionDiT, dit_recording: Recording
) -> None:
    with refuses("plan: granularity: expected linear | branch, got 'head'. Choose one of these."):
        Plan.from_trajectory(dit, dit_recording, rank=4, granularity="head")


@pytest.mark.parametrize(
    "rows",
    [
        GOOD_ROWS[:-1],
        (*GOOD_ROWS, (1.0, 0.0, 0.0)),
        (*GOOD_ROWS[:-1], (1.0, 0.0)),
        (*GOOD_ROWS[:-1], (1.0, 0.0, 0.0, 0.0)),
        (*GOOD_ROWS[:-1], (1.0, 0.0, math.nan)),
        (*GOOD_ROWS[:-1], (math.inf, 0.0, 0.0)),
        (),
    ],
    ids=["too few", "too many", "short row", "long row", "nan", "inf", "none"],
)
def test_output_weights_of_another_form_are_refused(dit_plan: Plan, rows: Table) -> None:
    good = replace(dit_plan.recipe, output_weights=GOOD_ROWS, latent="hidden_states")
    assert good.outputs == GOOD_ROWS
    with pytest.raises(PlanError, match=r"output_weights: expected 6 rows of 3 numbers up to 1e"):
        replace(good, output_weights=rows)


@pytest.mark.parametrize(
    ("weights", "latent"), [(GOOD_ROWS, None), (None, "hidden_states")], ids=["missing", "too many"]
)
def test_latent_is_named_where_there_are_output_weights_and_only_there(
    dit_plan: Plan, weights: Table | None, latent: str | None
) -> None:
    with refuses(
        "plan: latent: expected a name beside output weights, and none without, "
        f"got {latent}. Make the plan again from the recording."
    ):
        replace(dit_plan.recipe, output_weights=weights, latent=latent)


def test_outputs_are_mixed_only_where_something_is_forecast(dit_plan: Plan) -> None:
    assert dit_plan.recipe.outputs is None
    forecast = dit_plan.with_schedule((R, C, F)).recipe
    assert forecast.output_weights is None
    assert forecast.outputs == ((1.0, 0.0), (1.0, 0.0), (0.0, 1.0))


@pytest.mark.slow
def test_sampler_that_adds_noise_gets_no_output_weights(dit: FashionDiT) -> None:
    with record(dit) as recording, torch.no_grad():
        for now in (900, 500, 100):
            latents, labels = torch.randn(2, 1, 28, 28), torch.tensor([1, 10])
            dit(latents, torch.full((2,), now), labels)  # noise that no update explains
    plan = Plan.from_trajectory(dit, recording, rank=4, schedule=3)
    assert plan.recipe.output_weights is None
    assert plan.recipe.correction.startswith("not fitted: ")
    assert "no fixed weighted sum" in plan.recipe.correction


def test_run_of_another_length_gets_no_output_weights(
    dit: FashionDiT, dit_recording: Recording
) -> None:
    plan = Plan.from_trajectory(dit, dit_recording, rank=4, schedule=(R, C, C))
    assert plan.recipe.correction == "not fitted: no recorded run has the plan's 3 steps"


def test_rule_that_fits_nothing_is_refused(dit: FashionDiT, dit_recording: Recording) -> None:
    rule = SiteRule("blocks.7.*", SiteMode.FULL)
    with pytest.raises(PlanError, match=r"rule blocks\.7\.\*: expected a pattern that fits"):
        Plan.from_trajectory(dit, dit_recording, rank=4, rules=(rule,))


def test_second_moments_of_another_width_are_refused(
    ruled_plan: Plan, graph_and_sites: tuple[CapturedGraph, Sites]
) -> None:
    targets, _ = assign(*graph_and_sites, rank=4, rules=RULES, joint=True)
    check(ruled_plan, targets)  # fits
    bad = {**ruled_plan.statistics, "blocks.0.mlp": SecondMoments(input=torch.eye(32))}
    with pytest.raises(PlanError, match=r"statistics of blocks\.0\.mlp: .*'cross': \(32, 32\)"):
        check(replace(ruled_plan, statistics=bad), targets)
