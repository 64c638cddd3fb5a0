"""Plans of REFRESH and FORECAST steps: any module that can be called, whatever it does inside."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from model import FashionDiT
from support.models import STEPS, relative, sample_dit
from torch import Tensor, nn
from zoo.drive import make_model, run_sampler
from zoo.report import ENTRIES

from calicache.export import export_onnx
from calicache.graph_passes import OptimizedModel, Plan, Recording, StepMode, optimize, record
from calicache.graph_passes.api.running.forms import compile_plan
from calicache.graph_passes.common.errors import CaptureError, PlanError, RecordError

SCHEDULE = "RRFRFF"


class Fickle(nn.Module):
    """A model that decides in Python by its latents: nothing can capture it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        output = self.model(hidden_states, timestep=timestep, class_labels=class_labels)
        return output * 2 if float(hidden_states.mean()) > 1e9 else output


def planned(model: nn.Module, **options: Any) -> OptimizedModel:
    with record(model) as recording:
        for seed in (1, 2):
            recording.finish(sample_dit(model, seed=seed))
    return optimize(model, Plan.from_trajectory(model, recording, schedule=SCHEDULE, **options))


@pytest.fixture(scope="module")
def fickle(dit: FashionDiT) -> OptimizedModel:
    return planned(Fickle(dit).eval())


def graph_of(model: nn.Module, plan: Plan) -> OptimizedModel:
    """The same plan on a captured graph."""
    return OptimizedModel(model, plan, compile_plan(model, plan))


def test_a_model_that_cannot_be_captured_is_forecast(
    fickle: OptimizedModel, dit: FashionDiT
) -> None:
    assert fickle.plan.recipe.correction == "fitted to the recorded runs"
    got = sample_dit(fickle, seed=3)
    # The same sums in another order, over a run of six steps.
    assert relative(got, sample_dit(graph_of(dit, fickle.plan), seed=3)) < 1e-5
    assert 1e-5 < relative(got, sample_dit(dit, seed=3)) < 0.1


def test_its_graph_is_refused_only_where_it_is_asked_for(
    fickle: OptimizedModel, tmp_path: Any
) -> None:
    with pytest.raises(CaptureError):
        export_onnx(fickle, tmp_path / "d")


def test_a_graph_is_made_when_it_is_exported(dit: FashionDiT) -> None:
    fast = planned(dit, correct=False)
    assert not fast.variants
    assert len(fast.compiled.variant_set.variants) == 2
    assert fast.compiled is fast.compiled


@pytest.mark.parametrize("correct", [True, False])
def test_refresh_steps_are_the_models_own(dit: FashionDiT, correct: bool) -> None:
    with record(dit) as recording:
        recording.finish(sample_dit(dit))
    options = {"schedule": "R" * STEPS, "correct": correct}
    fast = optimize(dit, Plan.from_trajectory(dit, recording, **options))
    # Nothing but the model itself runs; fitted weights of exact steps are 1 up to rounding.
    assert relative(sample_dit(fast), sample_dit(dit)) < 1e-4


def doubled(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)


def test_weights_may_change_at_any_time(dit: FashionDiT) -> None:
    model = copy.deepcopy(dit)
    fast = planned(model, correct=False)
    before = sample_dit(fast)
    doubled(model)
    after, plain = sample_dit(fast), sample_dit(model)
    assert relative(after, before) > 1e-3
    first = {"timestep": torch.full((2,), 999), "class_labels": torch.tensor([1, 2])}
    noise = torch.randn(2, 1, 28, 28)
    fast.reset()
    assert torch.equal(fast(noise, **first), model(noise, **first))
    assert relative(after, plain) < 0.5


def int8(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrapped", [int8, compiled])
def test_quantised_and_compiled_models(
    dit: FashionDiT, wrapped: Callable[[nn.Module], nn.Module]
) -> None:
    model = wrapped(copy.deepcopy(dit))
    fast = planned(model, correct=False)
    got = sample_dit(fast)
    assert 1e-4 < relative(got, sample_dit(model)) < 0.5


@pytest.mark.parametrize("batch", [1, 5])
def test_other_sizes(fickle: OptimizedModel, dit: FashionDiT, batch: int) -> None:
    got = sample_dit(fickle, batch=batch)
    expected = sample_dit(graph_of(dit, fickle.plan), batch=batch)
    # The same sums in another order, over a run of six steps.
    assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("again", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
def test_copies_give_the_same_run(
    dit: FashionDiT, again: Callable[[OptimizedModel], OptimizedModel]
) -> None:
    fast = planned(dit)
    expected = sample_dit(fast)
    twin = again(fast)
    twin.reset()
    assert torch.equal(sample_dit(twin), expected)


@pytest.mark.slow
def test_hidream_which_picks_experts_in_python() -> None:
    entry = ENTRIES["HiDreamImageTransformer2DModel"]
    model = make_model(entry)
    with record(model) as recording:
        run = run_sampler(model, entry, linear=True)
        recording.finish(run.latents)
    plan = Plan.from_trajectory(model, recording, schedule=2, mode="FORECAST", correct=False)
    fast = optimize(model, plan)
    got = run_sampler(fast, entry, linear=True)
    assert 0 < relative(got.latents, run.latents) < 0.5


class Given(nn.Module):
    """A model that has some of its arguments already."""

    def __init__(self, model: nn.Module, **given: Any) -> None:
        super().__init__()
        self.model, self.given = model, given

    def forward(self, **call: Any) -> Any:
        return self.model(**call, **self.given)


@pytest.mark.slow
def test_wan_animate_which_reads_keys_from_an_object() -> None:
    entry = ENTRIES["WanAnimate2Transformer3DModel"]
    torch.manual_seed(3)
    cache = entry.inputs(2)["kv_cache"]
    rest = {name: value for name, value in entry.call.items() if name != "kv_cache"}
    bare, plain = replace(entry, call=rest), make_model(entry)
    with pytest.raises(RecordError, match="WanAnimate2KVCache") as caught, record(plain):
        run_sampler(plain, entry, linear=True)
    assert caught.value.where == "kv_cache"
    model = Given(plain, kv_cache=cache).eval()
    before = [[value.clone() for value in layer.get()] for layer in cache.layer_caches]
    with record(model) as recording:
        run = run_sampler(model, bare, linear=True)
        recording.finish(run.latents)
    plan = Plan.from_trajectory(model, recording, schedule=2, mode="FORECAST", correct=False)
    got = run_sampler(optimize(model, plan), bare, linear=True)
    assert 0 < relative(got.latents, run.latents) < 0.5
    # A step that is left out leaves nothing undone: the model reads the object alone.
    after = [layer.get() for layer in cache.layer_caches]
    for one, other in zip(before, after, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_search_of_forecasts_needs_no_graph(dit: FashionDiT) -> None:
    model = Fickle(dit).eval()
    recording = recording_of(model)
    with pytest.raises(CaptureError):
        Plan.search(model, recording, budget=0.6)
    plan = Plan.search(model, recording, budget=0.6, modes=("FORECAST",))
    assert set(plan.schedule) == {StepMode.REFRESH, StepMode.FORECAST}
    assert plan.schedule.count(StepMode.REFRESH) / len(plan.schedule) <= 0.6
    assert plan.front is not None
    # What the front promises of a share of steps is what the plan runs.
    point = plan.front.points[plan.front.choice]
    assert point.cost == pytest.approx(plan.schedule.count(StepMode.REFRESH) / STEPS)
    same = Plan.search(dit, recording_of(dit), budget=0.6, modes=[StepMode.FORECAST])
    assert plan.schedule == same.schedule
    assert relative(sample_dit(optimize(model, plan), seed=7), sample_dit(model, seed=7)) < 0.5


def recording_of(model: nn.Module) -> Recording:
    with record(model) as recording:
        for seed in range(3):
            recording.finish(sample_dit(model, seed=seed))
    return recording


@pytest.mark.parametrize("modes", [("REUSE",), ("FORECAST", "SKIP"), (), "REUSE"])
def test_modes_without_forecasts_or_of_other_names_are_refused(
    modes: Any, dit: FashionDiT, dit_recording: Recording
) -> None:
    with pytest.raises(PlanError, match="expected FORECAST, and what else of"):
        Plan.search(dit, dit_recording, budget=0.5, modes=modes)
