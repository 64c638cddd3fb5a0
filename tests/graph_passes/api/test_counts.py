"""Captures, decompositions and runs of the plain model, counted from a recording to an artifact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.comparisons import STEPS, Denoise, ddim, draw, recorded, residual, two_calls
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from calicache.export import export_onnx, read_sampler
from calicache.graph_passes import OptimizedModel, Plan, Recording, optimize

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_captures")]

RUNS, ROWS, TARGETS = 2, 2, ("fc1", "fc2")
ONE_CALL, TWO_CALLS = "one call a step", "two calls a step"
SAMPLERS: dict[str, tuple[Denoise, int]] = {ONE_CALL: (ddim, 1), TWO_CALLS: (two_calls, 2)}
CAPTURE, DECOMPOSITION = "capture", "decomposition"
READ, OBSERVED, PLAIN = "the model itself", "the plain graph node by node", "the plain graph"


def real(values: Any) -> bool:
    """Not a tracer's values."""
    return all(type(value) is Tensor for value in values)


@contextmanager
def counting(model: nn.Module) -> Iterator[Counter[str]]:
    """What is done inside the block, by kind; all of it is really done."""
    counts: Counter[str] = Counter()
    export, eigh, run = torch.export.export, torch.linalg.eigh, fx.Interpreter.run

    def counted_export(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        counts[CAPTURE] += isinstance(module, type(model))  # torch.onnx exports variants by it
        return export(module, *args, **kwargs)

    def counted_eigh(*args: Any, **kwargs: Any) -> Any:
        counts[DECOMPOSITION] += 1
        return eigh(*args, **kwargs)

    def counted_run(interpreter: fx.Interpreter, *args: Any, **kwargs: Any) -> Any:
        counts[OBSERVED] += type(interpreter.module).__name__ == "Captured"
        return run(interpreter, *args, **kwargs)

    def count_call(module: nn.Module, args: tuple[Any, ...]) -> None:
        counts[READ] += module is model
        counts[PLAIN] += type(module).__name__ == "Captured" and real(args)

    handle = register_module_forward_pre_hook(count_call)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.export, "export", counted_export)
            patch.setattr(torch.linalg, "eigh", counted_eigh)
            patch.setattr(fx.Interpreter, "run", counted_run)
            yield counts
    finally:
        handle.remove()


def counted_model() -> nn.Module:
    """One residual branch of two layers, whose increments go every way.

    A LayerNorm's outputs never leave a plane: moments of them are singular, and their square root
    would take another eigendecomposition.
    """
    model = residual()
    model.norm = nn.Tanh()
    return model.eval()


@dataclass(frozen=True, slots=True)
class Work:
    """A model all the way to its artifacts, and what every stage of that did."""

    calls: int
    model: nn.Module
    recording: Recording
    plan: Plan
    fast: OptimizedModel
    stages: dict[str, Counter[str]]


@pytest.fixture(scope="module", params=SAMPLERS)
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Work:
    denoise, calls = SAMPLERS[request.param]
    model, folder = counted_model(), tmp_path_factory.mktemp("counts")
    recording, _ = recorded(model, denoise, [draw(seed, ROWS, 5, 8) for seed in range(RUNS)])
    stages: dict[str, Counter[str]] = {}

    def end_of(stage: str) -> None:
        stages[stage] = +counts
        counts.clear()

    with counting(model) as counts:
        plan = Plan.from_trajectory(model, recording, schedule=3, rank=4)
        end_of("plan")
        fast = optimize(model, plan)
        end_of("optimize")
        export_onnx(fast, folder / "step")
        end_of("export the steps")
        export_onnx(fast, folder / "run", layout="sampler")
        end_of("export the run")
        tables = read_sampler(fast, recording)
        end_of("read the sampler again")
    assert tables.updates == plan.sampler.updates
    return Work(calls, model, recording, plan, fast, stages)


def test_the_work_is_what_it_seems(work: Work) -> None:
    assert work.recording.calls_per_step == work.calls
    assert len(work.recording.calls) == RUNS * STEPS * work.calls
    assert work.plan.recipe.correction == "fitted to the recorded runs"
    assert tuple(target.name for target in work.fast.compiled.targets) == TARGETS


def test_planning_captures_every_form_once_and_runs_the_recording_once(
    work: Work,
) -> None:
    assert work.stages["plan"] == {
        CAPTURE: work.calls,  # the calls as they are; and all calls of a step in one, if several
        DECOMPOSITION: len(TARGETS),
        READ: 1,  # it reads nothing off its tensors, so one call tells
        OBSERVED: RUNS * STEPS * work.calls,
        PLAIN: RUNS,  # to see that the recorded outputs are this model's, once a run
    }


@pytest.mark.parametrize("stage", ["optimize", "export the steps", "export the run"])
def test_nothing_is_done_again_for_what_a_plan_becomes(work: Work, stage: str) -> None:
    assert work.stages[stage] == {}


def test_reading_the_sampler_again_runs_one_call_of_a_run_and_captures_nothing(work: Work) -> None:
    assert work.stages["read the sampler again"] == {PLAIN: RUNS}


def test_another_rank_is_cut_from_the_same_decompositions(work: Work) -> None:
    with counting(work.model) as counts:
        fast = optimize(work.model, work.plan.with_rank(8))
    assert {factors.rank for factors in fast.compiled.factors.values()} == {8}
    assert +counts == {}


def test_a_second_plan_with_the_workspace_of_the_first_captures_and_recovers_nothing(
    work: Work,
) -> None:
    with counting(work.model) as counts:
        plan = Plan.from_trajectory(
            work.model, work.recording, schedule=2, rank=4, workspace=work.plan.workspace
        )
        optimize(work.model, plan)
    assert counts[CAPTURE] == counts[PLAIN] == 0
    assert plan.sampler.updates == work.plan.sampler.updates


def test_another_batch_size_is_one_more_capture(work: Work) -> None:
    call = {name: value[:1] for name, value in work.recording.calls[0].items()}
    with counting(work.model) as counts:
        other = work.fast.for_call(**call)
        assert work.fast.for_call(**call) is other
    assert +counts == {CAPTURE: 1}


def test_a_plan_from_a_file_makes_everything_once_more(work: Work, tmp_path: Path) -> None:
    work.plan.save(tmp_path / "plan")
    plan = Plan.load(tmp_path / "plan")
    for expected in ({CAPTURE: 1, DECOMPOSITION: len(TARGETS)}, {}):
        with counting(work.model) as counts:
            optimize(work.model, plan)
        assert +counts == expected


def test_without_output_weights_no_sampler_is_recovered(work: Work) -> None:
    with counting(work.model) as counts:
        optimize(
            work.model,
            Plan.from_trajectory(work.model, work.recording, schedule=3, rank=4, correct=False),
        )
    assert +counts == {
        CAPTURE: 1,
        DECOMPOSITION: len(TARGETS),
        READ: 1,
        OBSERVED: RUNS * STEPS * work.calls,
    }
