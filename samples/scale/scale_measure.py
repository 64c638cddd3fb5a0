"""Peak memory and time of planning, measured, beside what `calicache cost` says of the same model.

Every measurement is a process of its own with one thread. Time is CPU time, as a multiple of the
model's own call, which is timed in the same process before, during and after the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import nn

from calicache.graph_passes import Plan, Recording, record
from calicache.graph_passes.api.scale.scale import ModelScale, model_scale
from calicache.graph_passes.api.scale.stages import Extent
from calicache.graph_passes.recording.binding import bind
from calicache.graph_passes.rewriting.workspace import Workspace
from calicache.tools.bench.models import BenchModel, find_model
from calicache.tools.bench.prepare import peak_memory
from calicache.tools.make.cost import imagined_binding, on_meta, usual_recipe

HERE = Path(__file__).parent
SAMPLE = f"{HERE.parent / 'fashion_dit' / 'bench_model.py'}:fashion_dit"
OBSERVE, PLAN, SEARCH = "observe", "plan", "search"
OBSERVING = 2  # stages of planning, up to the statistics
ORDER, BUDGET, RUNS = 2, 0.4, 3
APART = 5.0  # seconds of work between two timed calls of the model


@dataclass(frozen=True, slots=True)
class Case:
    """A model of a size that fits here.

    Attributes:
        model: as `calicache cost` takes it.
        rank: of the plan.
        works: what is measured.
        steps: of a run.
    """

    model: str
    rank: int
    works: tuple[str, ...] = (OBSERVE, PLAN, SEARCH)
    steps: int = 9


def _here(name: str) -> str:
    return f"{HERE / 'scale_models.py'}:{name}"


CASES = (
    Case(SAMPLE, 28),
    Case("dit-s", 43),
    Case(_here("narrow_flux"), 57, steps=6),
    Case(_here("narrow_wan"), 57, steps=6),
    Case(_here("short_flux"), 128, (OBSERVE,), steps=6),
    Case(_here("short_wan"), 128, (OBSERVE,), steps=6),
    Case("dit-b", 85, (OBSERVE, PLAN), steps=6),
    Case("dit-xl", 128, (OBSERVE, PLAN), steps=6),
)


def said(case: Case) -> dict[str, dict[str, float]]:
    """What `calicache cost` says of every piece of work."""
    scale = scale_of(case)
    stages = {OBSERVE: scale.planning[:OBSERVING], PLAN: scale.planning, SEARCH: scale.search}
    return {
        work: {
            "weight_bytes": scale.weight_bytes,
            "peak_bytes": scale.peak(stages[work]),
            "calls": scale.calls_of(stages[work]),
        }
        for work in case.works
    }


def scale_of(case: Case, dtype: str | None = None) -> ModelScale:
    """What `calicache cost` counts."""
    module, bench = on_meta(case.model, dtype)
    assert bench is not None
    recipe = usual_recipe(case.steps, case.rank, ORDER)
    binding = imagined_binding(module, bench, case.steps)
    return model_scale(module, binding, recipe, Extent(search_runs=RUNS, budget=BUDGET))


def took(case: Case, work: str) -> dict[str, float]:
    """What a piece of work takes, done in this process."""
    torch.set_num_threads(1)
    model = find_model(case.model)
    module = model.build()
    recording = _recorded(model, module, case.steps, RUNS if work == SEARCH else 1)
    space, start = Workspace(), time.process_time()
    space.analysis(module, bind(module, recording))
    capture = time.process_time() - start
    beside = _BesideCalls(module, recording)
    peak = peak_memory()
    seconds = beside.time(lambda told: _do(case, work, module, recording, space, told))
    added = max(0, peak())  # a process that has worked before gives back what it does not need
    weights = sum(value.nbytes for value in (*module.parameters(), *module.buffers()))
    return {
        "capture_seconds": capture,
        "call_seconds": beside.call_seconds,
        "peak_bytes": weights + added,
        "seconds": seconds,
        "calls": seconds / beside.call_seconds,
    }


def _recorded(model: BenchModel, module: nn.Module, steps: int, runs: int) -> Recording:
    with record(module) as recording:
        for seed in range(runs):
            recording.finish(model.sample(module, model.draw(seed), steps))
    return recording


def _do(
    case: Case,
    work: str,
    module: nn.Module,
    recording: Recording,
    space: Workspace,
    told: Callable[[object], None],
) -> None:
    if work == SEARCH:
        Plan.search(module, recording, budget=BUDGET, workspace=space, on_progress=told)
    else:
        Plan.from_trajectory(
            module,
            recording,
            rank=case.rank,
            order=ORDER,
            correct=work == PLAN,
            workspace=space,
            on_progress=told,
        )


@dataclass(slots=True)
class _BesideCalls:
    """Times work, and the model's own call in the middle of it."""

    module: nn.Module
    recording: Recording
    times: list[float] = field(default_factory=list)
    newest: float = 0.0

    @property
    def call_seconds(self) -> float:
        """The median."""
        return median(self.times)

    def call(self) -> None:
        """Time one call of the model."""
        start = time.process_time()
        arguments = self.recording.signature.unflatten([*self.recording.calls[0].values()])
        with torch.no_grad():
            self.module(**arguments)
        self.newest = time.process_time()
        self.times.append(self.newest - start)

    def time(self, work: Callable[[Callable[[object], None]], None]) -> float:
        """CPU seconds of the work, the calls in it left out."""
        for _ in range(3):
            self.call()
        self.times.clear()  # the first ones are slower
        self.call()
        outside, start = sum(self.times), time.process_time()

        def told(_: object) -> None:
            if time.process_time() - self.newest > APART:
                self.call()

        work(told)
        seconds = time.process_time() - start - (sum(self.times) - outside)
        self.call()
        return seconds
