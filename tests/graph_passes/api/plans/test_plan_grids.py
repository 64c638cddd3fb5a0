"""Plans of several recipes: how they are made, kept, told apart and refused."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.comparisons import draw, residual
from torch import Tensor, nn

from calicache.export import export_onnx
from calicache.graph_passes import OptimizedModel, Plan, Progress, Recording, optimize, record
from calicache.graph_passes.api.plan_file import PLAN_FILE, PLANS_FILE, STATISTICS_FILE
from calicache.graph_passes.common.disk.bounds import MAX_GRIDS
from calicache.graph_passes.common.disk.documents import sum_of
from calicache.graph_passes.common.errors import CalicacheError, ExportError, PlanError, RunError
from calicache.graph_passes.recording.grid import Grid

FEW, MANY = 4, 6


def times(steps: int) -> list[float]:
    return torch.linspace(1000, 1000 / steps, steps).tolist()


def flow(model: nn.Module, timesteps: Sequence[float], seed: int = 0, rows: int = 2) -> Tensor:
    x, labels = draw(seed, rows, 5, 8), torch.arange(rows)
    for now, after in zip(timesteps, [*timesteps[1:], 0.0], strict=True):
        with torch.no_grad():
            output = model(x, torch.full((rows,), now), labels)
        x = x + (after - now) / 1000 * output
    return x


def recorded(model: nn.Module, steps: int, runs: int = 1) -> Recording:
    with record(model) as recording:
        for seed in range(runs):
            recording.finish(flow(model, times(steps), seed))
    return recording


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return residual()


@pytest.fixture(scope="module")
def recordings(model: nn.Module) -> dict[int, Recording]:
    return {steps: recorded(model, steps) for steps in (FEW, MANY)}


@pytest.fixture(scope="module")
def plan(model: nn.Module, recordings: dict[int, Recording]) -> Plan:
    return Plan.from_trajectory(model, recordings, schedule=2, rank=2)


@pytest.fixture(scope="module")
def fast(model: nn.Module, plan: Plan) -> OptimizedModel:
    return optimize(model, plan)


def assert_same(one: Plan, other: Plan) -> None:
    assert one.names == other.names
    for a, b in zip(one.plans, other.plans, strict=True):
        assert (a.binding, a.recipe, a.front) == (b.binding, b.recipe, b.front)
        assert a.statistics.keys() == b.statistics.keys()


def refused(call: Callable[[], Any], match: str, kind: type[CalicacheError] = PlanError) -> None:
    with pytest.raises(kind, match=match):
        call()


# --- making --------------------------------------------------------------------------------------


def test_every_recording_makes_the_plan_that_it_makes_alone(
    model: nn.Module, plan: Plan, recordings: dict[int, Recording]
) -> None:
    assert plan.names == ("4", "6")
    for steps, recording in recordings.items():
        alone = Plan.from_trajectory(model, recording, schedule=2, rank=2)
        assert_same(plan.for_grid(steps), alone)
        assert plan.for_grid(steps).others == ()


def test_plans_are_joined(model: nn.Module, plan: Plan, recordings: dict[int, Recording]) -> None:
    more = Plan.from_trajectory(model, recorded(model, 3), schedule=3, rank=1)
    joined = Plan.join(more, plan)
    assert joined.names == ("3", "4", "6")
    assert_same(Plan.join(joined.for_grid(4), joined.for_grid(6)), plan)
    assert Plan.join(more) is more


@pytest.mark.slow
def test_searched_plans_keep_their_journals_apart(model: nn.Module, tmp_path: Path) -> None:
    recordings = {steps: recorded(model, steps, runs=3) for steps in (5, 7)}
    told: list[Progress] = []
    plan = Plan.search(
        model, recordings, budget=0.6, path=tmp_path / "journal", on_progress=told.append
    )
    assert sorted(path.name for path in (tmp_path / "journal").iterdir()) == ["5", "7"]
    for steps in recordings:
        front = plan.for_grid(steps).front
        assert front is not None
        assert {len(point.schedule) for point in front.points} == {steps}
    shares = [progress.done for progress in told]
    assert shares == sorted(shares)
    assert {progress.total for progress in told} == {2.0}
    assert told[0].stage.startswith("5 steps: ")
    assert told[-1].stage.startswith("7 steps: ")


@pytest.mark.parametrize("maker", [Plan.from_trajectory, Plan.search])
def test_recordings_that_do_not_fit_are_refused(
    model: nn.Module, recordings: dict[int, Recording], maker: Callable[..., Plan]
) -> None:
    options = {"budget": 0.5} if maker is Plan.search else {}

    def make(given: Any) -> Callable[[], Plan]:
        return lambda: maker(model, given, **options)

    refused(make({FEW: recordings[MANY]}), "recording of 4 steps: expected runs .* 6")
    refused(make({FEW: "recording"}), "recording of 4 steps: .*class Recording")
    refused(make({"few": recordings[FEW]}), "steps: expected a whole number")
    refused(make({}), "number of recipes: expected 1 .. 64, got 0")


def test_modes_of_single_steps_are_refused_for_several(
    model: nn.Module, recordings: dict[int, Recording]
) -> None:
    make = lambda: Plan.from_trajectory(model, recordings, schedule="RCRC")  # noqa: E731
    refused(make, "schedule: expected an interval, for 2 numbers of steps")
    assert (
        Plan.from_trajectory(model, {FEW: recordings[FEW]}, schedule="RCCC", rank=1).interval == 4
    )


def test_plans_that_do_not_go_together_are_refused(model: nn.Module, plan: Plan) -> None:
    few, many = plan.plans
    other = replace(many, binding=replace(many.binding, weights_hash="0" * 64))
    refused(lambda: Plan.join(few, other), "expected the same weights, got 0{12} beside")
    refused(lambda: Plan.join(few, few), "expected timesteps of their own, got the same .* twice")
    counted = many.with_schedule("RCCCC")
    refused(lambda: Plan.join(few, counted), "expected timesteps that were recorded, got none")
    assert many.binding.timestep is not None
    doubled = replace(many.binding, timestep=replace(many.binding.timestep, calls=2))
    refused(lambda: Plan.join(few, replace(many, binding=doubled)), "the same calls in a step")
    refused(lambda: Plan.join(few, model), "plan 1: expected a value of the class Plan")  # type: ignore[arg-type]
    refused(Plan.join, "number of recipes: expected 1 .. 64, got 0")
    grids = [Grid((9.0, 8.0 - n / 100), (0.0, 0.1)) for n in range(MAX_GRIDS + 1)]
    plans = [replace(few, binding=replace(few.binding, grid=grid)) for grid in grids]
    refused(lambda: Plan.join(*plans), "number of recipes: .* got 65")


def test_recipes_with_as_many_steps_have_names_of_their_own(plan: Plan) -> None:
    few, many = plan.plans
    grid = Grid(tuple(value / 2 for value in few.binding.grid.timesteps), (0.0, 0.1, 0.1, 0.1))
    twin = replace(few, binding=replace(few.binding, grid=grid))
    assert Plan.join(few, many, twin).names == ("4", "6", "4-2")
    refused(
        lambda: Plan.join(few, twin).for_grid(4), r"4 steps \(1000 to 250\).* got .*which several"
    )
    assert Plan.join(few, twin).for_grid(grid.timesteps).binding.grid == grid


# --- choosing ------------------------------------------------------------------------------------


def test_a_recipe_is_found_by_steps_and_by_timesteps(plan: Plan) -> None:
    for steps in (FEW, MANY):
        wishes = (steps, times(steps), torch.tensor(times(steps)), times(steps)[2:])
        assert {plan.for_grid(wish).schedule for wish in wishes} == {plan.for_grid(steps).schedule}
    refused(lambda: plan.for_grid(5), r"one of 4 steps \(1000 to 250\), .* got 5 steps, which none")
    refused(lambda: plan.for_grid([1000.0, 400.0]), "got timesteps 1000 to 400, which none")
    refused(lambda: plan.for_grid("4"), "grid: expected a list of numbers")  # type: ignore[arg-type]
    assert plan.for_grid(FEW).for_grid(FEW).schedule == plan.for_grid(FEW).schedule


@pytest.mark.slow
def test_what_takes_one_recipe_refuses_several(
    plan: Plan, fast: OptimizedModel, tmp_path: Path
) -> None:
    several = "expected a plan with one recipe, got one for 4, 6 steps. Take .*for_grid"
    for use in (
        lambda: plan.schedule,
        lambda: plan.interval,
        lambda: plan.take(0),
        lambda: plan.with_schedule("RCRC"),
        lambda: fast.compiled,
        fast.by_step,
        lambda: fast.for_call(draw(0, 2, 7, 8), torch.ones(2), torch.arange(2)),
        lambda: export_onnx(fast, tmp_path / "a"),
    ):
        refused(use, several)
    export_onnx(fast.for_grid(FEW), tmp_path / "a", check=False)
    assert (tmp_path / "a").is_dir()
    refused(lambda: export_onnx(plan, tmp_path / "b"), "of the class OptimizedModel", ExportError)  # type: ignore[arg-type]


def test_changes_that_fit_all_recipes_reach_all(plan: Plan) -> None:
    assert [one.recipe.rank for one in plan.with_rank(5).plans] == [5, 5]
    refused(lambda: plan.with_rank(-1), "rank: expected 0 or more")


def test_all_recipes_are_shown(plan: Plan, fast: OptimizedModel) -> None:
    lines = plan.describe().splitlines()
    assert lines[0] == "2 recipes, chosen by the timesteps"
    assert lines[1] == "  4 steps: 2 REFRESH + 2 CALIBRATE"
    assert "  6 steps: 3 REFRESH + 3 CALIBRATE" in lines
    for shown in (repr(plan), repr(fast)):
        assert all(line in shown for line in lines)
    assert plan._repr_html_().count("<b>calicache plan</b>") == 2
    assert fast._repr_html_().count("optimised by calicache") == 2


# --- keeping -------------------------------------------------------------------------------------


def test_saving_keeps_all_and_each_is_a_plan_by_itself(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan")
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == ["4", "6", PLANS_FILE]
    assert_same(Plan.load(tmp_path / "plan"), plan)
    for steps in (FEW, MANY):
        assert_same(Plan.load(tmp_path / "plan" / str(steps)), plan.for_grid(steps))
    plan.save(tmp_path / "again")
    files = [path for path in (tmp_path / "plan").rglob("*") if path.is_file()]
    assert len(files) > 4
    for file in files:
        assert (
            file.read_bytes()
            == (tmp_path / "again" / file.relative_to(tmp_path / "plan")).read_bytes()
        )


def test_plans_replace_one_another_and_nothing_else(plan: Plan, tmp_path: Path) -> None:
    for one in (plan, plan.for_grid(FEW), plan):
        one.save(tmp_path / "plan")
        assert_same(Plan.load(tmp_path / "plan"), one)
    for place in ("notes.txt", "4/notes.txt"):
        (tmp_path / "plan" / place).write_text("mine")
        refused(lambda: plan.save(tmp_path / "plan"), "nothing, or a plan.* got a f")
        (tmp_path / "plan" / place).unlink()
    plan.for_grid(MANY).save(tmp_path / "plan")
    assert (tmp_path / "plan" / PLAN_FILE).is_file()


def crafted(folder: Path, plans: Any) -> None:
    """Other content of `plans.json`, with a sum that fits."""
    content = json.loads((folder / PLANS_FILE).read_text())
    content["plans"] = plans
    (folder / PLANS_FILE).write_text(json.dumps({**content, "sha256": sum_of(content)}))


def swap(folder: Path) -> None:
    (folder / "4").rename(folder / "4 away")
    (folder / "6").rename(folder / "4")
    (folder / "4 away").rename(folder / "6")


def digest_of(folder: Path, name: str = "4") -> str:
    plans: dict[str, str] = json.loads((folder / PLANS_FILE).read_text())["plans"]
    return plans[name]


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (swap, "4/plan.json is not the file the plan was saved with"),
        (lambda f: shutil.rmtree(f / "6"), "FileNotFoundError"),
        (lambda f: (f / "6" / STATISTICS_FILE).unlink(), "FileNotFoundError"),
        (lambda f: (f / "6" / PLAN_FILE).write_text("{}"), "6/plan.json is not the file"),
        (lambda f: (f / PLANS_FILE).write_text("{}"), "no JSON that is marked as calicache plans"),
        (lambda f: crafted(f, {}), "plans: Dictionary should have at least 2 items"),
        (lambda f: crafted(f, {"4": digest_of(f)}), "at least 2 items"),
        (lambda f: crafted(f, {"4": digest_of(f), "../4": digest_of(f)}), "String should match"),
        (lambda f: crafted(f, {str(k): "0" * 64 for k in range(65)}), "at most 64 items"),
        (lambda f: crafted(f, {"4": digest_of(f), "6": 6}), "valid string"),
    ],
)
def test_damaged_folders_are_refused(
    plan: Plan, tmp_path: Path, damage: Callable[[Path], Any], match: str
) -> None:
    plan.save(tmp_path / "plan")
    damage(tmp_path / "plan")
    refused(lambda: Plan.load(tmp_path / "plan"), f"{tmp_path}.*{match}")


def test_one_plan_twice_in_a_folder_is_refused(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan")
    shutil.rmtree(tmp_path / "plan" / "6")
    shutil.copytree(tmp_path / "plan" / "4", tmp_path / "plan" / "6")
    digest = digest_of(tmp_path / "plan")
    crafted(tmp_path / "plan", {"4": digest, "6": digest})
    refused(lambda: Plan.load(tmp_path / "plan"), "expected timesteps of their own")


# --- other weights -------------------------------------------------------------------------------


def tuned() -> nn.Module:
    other = residual()
    with torch.no_grad():
        next(other.parameters()).mul_(1.1)
    return other


def test_all_recipes_are_carried_to_other_weights(plan: Plan) -> None:
    other = tuned()
    rebound = plan.rebind(other)
    assert len({one.binding.weights_hash for one in rebound.plans}) == 1
    assert all("other weights" in one.recipe.correction for one in rebound.plans)
    assert len(optimize(other, rebound).plan.plans) == 2
    recordings = {steps: recorded(other, steps) for steps in (MANY, FEW)}  # in whatever order
    fitted = plan.rebind(other, recordings)
    fresh = Plan.from_trajectory(other, recordings, schedule=2, rank=2)
    assert fitted.names == plan.names
    for steps in (FEW, MANY):
        assert fitted.for_grid(steps).recipe == fresh.for_grid(steps).recipe
    for given in (recordings[FEW], {FEW: recordings[FEW]}):
        refused(
            lambda given=given: plan.rebind(other, given), "recording: expected one for each of"
        )  # type: ignore[misc]


def test_a_change_of_weights_reaches_all_recipes(plan: Plan) -> None:
    other = residual()
    fast = optimize(other, plan, on_change="refactor")
    flow(fast, times(FEW))
    with torch.no_grad():
        next(other.parameters()).mul_(1.1)
    again = optimize(other, plan.rebind(other))
    for steps in (FEW, MANY):
        with fast.start_run(timesteps=times(steps)), again.start_run(timesteps=times(steps)):
            # The same program on the same numbers.
            assert torch.equal(flow(fast, times(steps)), flow(again, times(steps)))
    strict = optimize(other, again.plan)
    with torch.no_grad():
        next(other.parameters()).mul_(1.1)
    refused(lambda: flow(strict, times(FEW)), "expected the weights that the model was", RunError)


# --- the model -----------------------------------------------------------------------------------


def test_recipes_share_the_model_and_have_graphs_of_their_own(
    model: nn.Module, fast: OptimizedModel
) -> None:
    assert {key.split(".")[0] for key in fast.variants.state_dict()} <= {"4", "6"}
    assert list(fast.variants) == ["4", "6"]
    names = {id(value) for value in model.parameters()}
    assert names <= {id(value) for value in fast.parameters()}
    for steps in (FEW, MANY):
        one = fast.for_grid(steps)
        assert one.original is model
        assert one.plan.schedule == fast.plan.for_grid(steps).schedule
        assert one.run_bytes <= fast.run_bytes
    assert fast.run_bytes == max(fast.for_grid(steps).run_bytes for steps in (FEW, MANY))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_keep_all_recipes(
    fast: OptimizedModel, copied: Callable[[OptimizedModel], OptimizedModel]
) -> None:
    other = copied(fast)
    for steps in (FEW, MANY):
        with fast.start_run(timesteps=times(steps)), other.start_run(timesteps=times(steps)):
            # The same program on the same numbers.
            assert torch.equal(flow(other, times(steps)), flow(fast, times(steps)))


def test_a_copy_in_the_middle_of_an_open_choice_goes_on(fast: OptimizedModel) -> None:
    call = {"timestep": torch.full((2,), 1000.0), "class_labels": torch.arange(2)}
    fast.reset()
    fast(draw(0, 2, 5, 8), **call)
    assert [len(state.opening) for state in fast.state.calls] == [1]
    other = copy.deepcopy(fast)
    call["timestep"] = torch.full((2,), times(MANY)[1])
    outputs = [one(draw(0, 2, 5, 8) * 1.01, **call) for one in (fast, other)]
    assert torch.equal(*outputs)  # the same program on the same numbers
    assert [(state.recipe, state.opening) for state in other.state.calls] == [(1, ())]


def test_other_sizes_are_captured_under_every_recipe(model: nn.Module, plan: Plan) -> None:
    exact = optimize(model, plan.with_rank(32))
    for steps in (FEW, MANY):
        with exact.start_run(timesteps=times(steps)):
            got = flow(exact, times(steps), rows=3)
        # Every branch at full rank: float32 through two orders of the same products.
        assert torch.allclose(got, flow(model, times(steps), rows=3), rtol=1e-4, atol=1e-4)


def test_whole_models_beside_graphs(model: nn.Module, recordings: dict[int, Recording]) -> None:
    whole = Plan.from_trajectory(model, recordings[FEW], schedule="RFRF")
    graphs = Plan.from_trajectory(model, recordings[MANY], schedule=2, rank=2)
    fast = optimize(model, Plan.join(whole, graphs))
    for steps, plan in ((FEW, whole), (MANY, graphs)):
        with fast.start_run(timesteps=times(steps)):
            got = flow(fast, times(steps))
        assert torch.equal(got, flow(optimize(model, plan), times(steps)))  # the same programs
    fast.double().float()
    with fast.start_run(timesteps=times(MANY)):
        assert flow(fast, times(MANY)).isfinite().all()
