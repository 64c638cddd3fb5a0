"""What compiling takes: seconds and memory of every stage, each repeat in a process of its own."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch

from calicache.export import Layout, export_onnx
from calicache.graph_passes import Plan, Recording, optimize, uniform_schedule
from calicache.graph_passes.common.progress import Meter, OnProgress
from calicache.graph_passes.recording.binding import bind
from calicache.tools.bench.models import find_model
from calicache.tools.bench.needed_memory import needed_memory
from calicache.tools.bench.prepare import RECORDING, own_process, record_run
from calicache.tools.bench.rows import BenchSettings

STAGES = ("torch.export", "from_trajectory", "optimize", "step", "pair")
Result = TypeVar("Result")


def measure_compile(
    settings: BenchSettings, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Record once, then compile `repeats` times; medians by stage, as plain data.

    Raises:
        CalicacheError: an unknown model, or one that cannot be optimised.
    """
    meter = Meter(1 + settings.repeats, on_progress)
    meter.stage("record")
    with own_process() as process:
        process.submit(record_run, settings).result()
    meter.add()
    runs: list[Mapping[str, Any]] = []
    for repeat in range(settings.repeats):
        meter.stage(f"compile {repeat + 1} of {settings.repeats}")
        with own_process() as process:
            runs.append(process.submit(_compile, settings).result())
        meter.add()
    first = runs[0]
    return {
        "model": first["model"],
        "repeats": settings.repeats,
        "weight_bytes": first["weight_bytes"],
        "peak_bytes": median(run["peak_bytes"] for run in runs),
        **{
            kind: {stage: median(run[kind][stage] for run in runs) for stage in STAGES}
            for kind in ("seconds", "cpu_seconds")
        },
    }


def _compile(settings: BenchSettings) -> dict[str, Any]:
    """Every stage once, in this process; memory is what the last three add, without files."""
    model = find_model(settings.model)
    module = model.build()
    recording = Recording.load(settings.folder / RECORDING)
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Result]) -> Result:
        start, cpu_start = time.perf_counter(), time.process_time()
        result = work()
        seconds[stage] = time.perf_counter() - start
        cpu_seconds[stage] = time.process_time() - cpu_start
        return result

    timed("torch.export", lambda: _exported(module, recording))
    plan = timed(
        "from_trajectory",
        lambda: Plan.from_trajectory(
            module,
            recording,
            schedule=uniform_schedule(settings.steps, settings.interval),
            rank=settings.rank or round(model.width / 9),
            order=settings.order,
        ),
    )
    with needed_memory() as memory:
        fast = timed("optimize", lambda: optimize(module, plan))
        for layout in (Layout.STEP, Layout.PAIR):
            folder = settings.folder / f"{layout.value}.onnx.d"
            timed(layout.value, partial(export_onnx, fast, folder, layout=layout))
    return {
        "model": model.name,
        "weight_bytes": sum(value.nbytes for value in module.parameters()),
        "peak_bytes": memory.added,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def _exported(module: torch.nn.Module, recording: Recording) -> object:
    """What every compiler of a torch model begins with."""
    signature = bind(module, recording).signature
    inputs = [torch.zeros(spec.shape, dtype=spec.torch_dtype) for spec in signature.tensors]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(module, (), signature.unflatten(inputs), strict=False)
