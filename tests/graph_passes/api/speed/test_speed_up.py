"""speed_up on a model of one's own: what is kept, gone on with, refused and left."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from support.search.searches import assert_same_plan, sample_errors
from support.search.steady import counting, steady
from support.small.subjects import STEPS, small_model
from torch import Tensor, nn

from calicache import speed_up
from calicache.graph_passes import OptimizedModel, Plan, StepMode, Summary
from calicache.graph_passes.api.speed import planning
from calicache.graph_passes.api.speed.planning import Task
from calicache.graph_passes.api.speed.store import Kept, Store
from calicache.graph_passes.common.errors import (
    CalicacheError,
    CalicacheWarning,
    PlanError,
    RecordError,
)
from calicache.graph_passes.common.progress import Progress

Sample = Callable[[nn.Module], Tensor]
BUDGET = 0.6

pytestmark = pytest.mark.usefixtures("steady_clock")


@pytest.fixture(scope="module")
def first(
    model: nn.Module, sample: Sample, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Summary]:
    """One search, whose folder nobody may change."""
    with pytest.MonkeyPatch.context() as patch:
        steady(patch)
        yield sped_up(model, sample, tmp_path_factory.mktemp("first"))


@pytest.fixture
def copy(first: Summary, tmp_path: Path) -> Path:
    """A copy of what is kept of it."""
    assert first.folder is not None
    shutil.copytree(first.folder, tmp_path / first.folder.name)
    return tmp_path


@pytest.fixture
def made_again(first: Summary, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In the place of another search: what the first came to, and a note that it was asked for."""
    assert first.folder is not None
    kept, notes = Store(first.folder.parent).load(first.folder.name), list[str]()
    assert kept is not None

    def run(_: Task) -> tuple[Kept, dict[str, nn.Module]]:
        notes.append("searched")
        return kept, dict(first.models)

    monkeypatch.setattr(Task, "run", run)
    return notes


def sped_up(model: nn.Module, sample: Sample, folder: Path | None, **options: Any) -> Summary:
    return speed_up(model, sample, budget=BUDGET, cache=folder, **options)


def no_search(*_: Any, **__: Any) -> Plan:
    raise AssertionError("searched again")


def test_the_promise_is_true(model: nn.Module, sample: Sample, first: Summary) -> None:
    summary = first
    (part,) = summary.parts
    fast = summary.model
    assert isinstance(fast, OptimizedModel)
    assert fast.original is model
    assert part.name == "model"
    assert part.seconds is not None
    assert part.seconds <= BUDGET
    assert (summary.searched, summary.left, summary.speedup) == (True, "", 2.0)
    torch.manual_seed(2)  # that of the timed run, the last of three
    full = sample(model)
    torch.manual_seed(2)
    errors = sample_errors(sample(fast), full)
    # rtol: float32 sums in another order, on an error of 1e-4 of the latents.
    assert summary.error == pytest.approx(fmean(errors), rel=1e-2)
    assert part.error is not None
    assert part.error.mean == pytest.approx(fmean(errors), rel=1e-2)  # the only run to report with


def test_a_second_start_searches_nothing(
    model: nn.Module,
    sample: Sample,
    first: Summary,
    copy: Path,
    made_again: list[str],
) -> None:
    with counting({"model": model}) as calls:
        second = sped_up(model, sample, copy)
    assert len(calls) == STEPS  # one of them computed: the others are answered with noise
    assert (first.searched, second.searched, made_again) == (True, False, [])
    assert second.parts == first.parts
    assert (second.plain_seconds, second.error) == (first.plain_seconds, first.error)
    torch.manual_seed(5)
    one = sample(first.model)
    torch.manual_seed(5)
    assert torch.equal(sample(second.model), one)


def slower_steps(model: nn.Module) -> Tensor:
    """Another sampler at the same timesteps."""
    x = torch.randn(2, 5, 4)
    for step in range(STEPS):
        x = x - 0.08 * model(x, torch.full((2,), 1 - step / STEPS))
    return x


@pytest.mark.parametrize("change", ["sampler", "budget", "weights"])
def test_what_a_plan_was_not_made_for_is_searched(
    change: str, model: nn.Module, sample: Sample, copy: Path, made_again: list[str]
) -> None:
    other = small_model(seed=1) if change == "weights" else model
    budget = 0.7 if change == "budget" else BUDGET
    run = slower_steps if change == "sampler" else sample
    speed_up(other, run, budget=budget, cache=copy)
    assert made_again == ["searched"]
    assert len([*copy.iterdir()]) == 2


@pytest.mark.parametrize("damage", ["summary", "plan", "statistics", "file", "part", "weights"])
def test_damaged_plans_are_made_again(
    damage: str, model: nn.Module, sample: Sample, copy: Path, made_again: list[str]
) -> None:
    (folder,) = copy.iterdir()
    if damage == "summary":
        (folder / "summary.json").write_text("{}")
    elif damage == "plan":
        (folder / "model" / "plan.json").unlink()
    elif damage == "statistics":
        (folder / "model" / "statistics.safetensors").write_bytes(bytes(64))
    elif damage == "file":
        shutil.rmtree(folder)
        folder.write_text("something")
    elif damage == "part":
        (folder / "model").rename(folder / "elsewhere")
    else:
        Plan.load(folder / "model").rebind(small_model(seed=1)).save(folder / "model")
    with pytest.warns(CalicacheWarning, match="made again"):
        second = sped_up(model, sample, copy)
    assert (second.searched, made_again) == (True, ["searched"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", CalicacheWarning)
        assert not sped_up(model, sample, copy).searched


class Stopped(Exception):  # noqa: N818
    """Of a test."""


def stopped(model: nn.Module, sample: Sample, folder: Path, share: float) -> None:
    def stop(progress: Progress) -> None:
        if progress.done > share * progress.total:
            raise Stopped

    with pytest.raises(Stopped):
        sped_up(model, sample, folder, on_progress=stop)


def test_an_interrupted_search_goes_on(
    model: nn.Module,
    sample: Sample,
    first: Summary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped(model, sample, tmp_path, 0.6)
    (work,) = tmp_path.iterdir()
    assert {"model.recording", "model.latency", "model.search"} == {p.name for p in work.iterdir()}
    monkeypatch.setattr(planning, "record_parts", no_search)
    monkeypatch.setattr(planning, "measure_eager", no_search)
    told: list[Progress] = []
    summary = sped_up(model, sample, tmp_path, on_progress=told.append)
    assert isinstance(summary.model, OptimizedModel)
    assert isinstance(first.model, OptimizedModel)
    assert_same_plan(summary.model.plan, first.model.plan)
    assert not work.exists()
    done = [progress.done for progress in told]
    assert done == sorted(done)
    assert done[-1] == pytest.approx(told[-1].total)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.recording", "model.latency", "model.search/search.json"])
def test_damaged_work_is_done_again(
    name: str, model: nn.Module, sample: Sample, tmp_path: Path
) -> None:
    stopped(model, sample, tmp_path, 0.6)
    (work,) = tmp_path.iterdir()
    (work / name).write_bytes(b"{}")
    with pytest.warns(CalicacheWarning, match="done again"):
        summary = sped_up(model, sample, tmp_path)
    assert summary.searched
    assert not work.exists()


@pytest.mark.slow
def test_work_of_another_process_is_left_alone(
    model: nn.Module, sample: Sample, tmp_path: Path
) -> None:
    """The one that comes second keeps no work of its own, and both end with a plan."""
    inner: list[Summary] = []

    def begin_another(progress: Progress) -> None:
        if progress.done > 0.6 * progress.total and not inner:
            inner.append(sped_up(model, sample, tmp_path))

    outer = sped_up(model, sample, tmp_path, on_progress=begin_another)
    assert (inner[0].searched, outer.searched) == (True, True)
    assert [part.steps for part in inner[0].parts] == [part.steps for part in outer.parts]
    assert not sped_up(model, sample, tmp_path).searched


def test_what_cannot_be_kept_is_said(
    model: nn.Module, sample: Sample, tmp_path: Path, made_again: list[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(CalicacheWarning, match="could not be kept"):
        summary = sped_up(model, sample, tmp_path / "file")
    assert (summary.left, made_again) == ("", ["searched"])


def test_nothing_is_kept_without_a_folder(
    model: nn.Module,
    sample: Sample,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made_again: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    summary = sped_up(model, sample, None)
    assert (summary.folder, [*tmp_path.iterdir()], made_again) == (None, [], ["searched"])
    assert "not kept" in str(summary)


def test_a_plan_that_is_slower_here_is_not_used(
    model: nn.Module,
    sample: Sample,
    first: Summary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steady(monkeypatch, speedup=0.8)
    assert isinstance(first.model, OptimizedModel)
    plan = first.model.plan
    monkeypatch.setattr(Plan, "search", staticmethod(lambda *_, **__: plan))
    summary = sped_up(model, sample, tmp_path)
    assert summary.left == "the plan takes 1.25 of the time here"
    assert (summary.model, summary.speedup) == (model, 1.0)
    assert "left as it was" in str(summary)


def test_a_sampler_that_adds_noise_gets_forecasts(model: nn.Module, tmp_path: Path) -> None:
    def ancestral(model: nn.Module) -> Tensor:
        x = torch.randn(2, 5, 4)
        for step in range(STEPS):
            x = x - 0.1 * model(x, torch.full((2,), 1 - step / STEPS)) + 0.05 * torch.randn_like(x)
        return x

    with pytest.warns(CalicacheWarning, match="forecast evenly"):
        summary = sped_up(model, ancestral, tmp_path)
    (part,) = summary.parts
    assert isinstance(summary.model, OptimizedModel)
    assert summary.model.plan.schedule == 3 * (StepMode.REFRESH, StepMode.FORECAST)
    assert (part.error, part.seconds, part.macs) == (None, None, 0.5)
    assert "sampler" in part.fallback
    assert summary.error is not None
    assert 0 < summary.error < math.inf
    assert "not searched" in str(summary)


class Deciding(nn.Module):
    """Decides in Python by its latents: nothing can capture it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        output = self.model(x, timestep)
        return output * 2 if float(x.mean()) > 1e9 else output


def test_a_model_without_a_graph_gets_searched_forecasts(model: nn.Module, sample: Sample) -> None:
    summary = sped_up(Deciding(model).eval(), sample, None)
    (part,) = summary.parts
    assert isinstance(summary.model, OptimizedModel)
    assert set(summary.model.plan.schedule) == {StepMode.REFRESH, StepMode.FORECAST}
    assert summary.model.plan.front is not None
    assert part.error is not None
    assert part.seconds is None
    assert part.macs <= BUDGET
    assert "capture" in part.fallback
    assert "forecasts alone: capture" in str(summary)


def test_a_model_of_one_step_is_left_as_it_is(model: nn.Module, tmp_path: Path) -> None:
    def distilled(model: nn.Module) -> Tensor:
        return model(torch.randn(2, 5, 4), torch.ones(2))

    with pytest.warns(CalicacheWarning, match="forecast evenly"):
        summary = sped_up(model, distilled, tmp_path)
    assert summary.model is model
    assert "1 step" in summary.left
    assert (summary.parts[0].steps, summary.parts[0].macs) == ("", 1.0)
    assert not sped_up(model, distilled, tmp_path).searched


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"budget": 1.5}, "budget"),
        ({"budget": 0.5, "max_error": 0.1}, "search"),
        ({"budget": 0.5, "effort": 0}, "effort"),
        ({"budget": 0.5, "cache": 7}, "path"),
    ],
)
def test_wishes_that_make_no_sense_are_refused_before_anything_runs(
    options: dict[str, Any], where: str, model: nn.Module, sample: Sample
) -> None:
    with counting({"model": model}) as calls, pytest.raises(CalicacheError) as caught:
        speed_up(model, sample, **{"cache": None, **options})
    assert (caught.value.where, calls) == (where, [])


def test_a_budget_that_no_plan_keeps_is_refused(model: nn.Module, sample: Sample) -> None:
    with pytest.raises(PlanError) as caught:
        speed_up(model, sample, budget=0.1, cache=None)
    assert caught.value.where == "budget"


def test_runs_of_the_same_noise_are_refused(model: nn.Module, sample: Sample) -> None:
    def seeded(model: nn.Module) -> Tensor:
        torch.manual_seed(0)
        return sample(model)

    with pytest.raises(RecordError, match=r"calls: expected runs with other noise.*run 1"):
        sped_up(model, seeded, None)


def test_random_numbers_go_on_as_without_it(model: nn.Module, sample: Sample) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with pytest.raises(PlanError):
        speed_up(model, sample, budget=0.1, cache=None)
    assert torch.equal(torch.rand(2), expected)
