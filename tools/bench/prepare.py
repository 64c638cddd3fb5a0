"""What `calicache bench` measures on: plans and artifacts, and what making them takes."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calicache.export import Layout, export_onnx, read_sampler
from calicache.graph_passes import Plan, Recording, StepMode, optimize, record, uniform_schedule
from calicache.tools.bench.models import find_model
from calicache.tools.bench.rows import SEED, BenchSettings, plan_folder

RECORDING = "recording.safetensors"
LAYOUTS = (Layout.STEP, Layout.PAIR, Layout.SAMPLER)


def _plan(settings: BenchSettings) -> None:
    """Record a run, plan for it, and save both."""
    model = find_model(settings.model)
    module = model.build()
    steps, interval = settings.steps, settings.interval
    with record(module) as recording:
        recording.finish(model.sample(module, model.draw(SEED + 1), steps))
    recording.save(settings.folder / RECORDING)
    modes = {
        "plain": uniform_schedule(steps, 1),
        "reuse": uniform_schedule(steps, interval, StepMode.REUSE),
        "step": uniform_schedule(steps, interval, StepMode.CALIBRATE),
    }
    for name, schedule in modes.items():
        plan = Plan.from_trajectory(
            module,
            recording,
            schedule=schedule,
            rank=settings.rank or round(model.width / 9),
            order=settings.order,
            correct=False,
        )
        plan.save(plan_folder(settings.folder / name))


def _export(settings: BenchSettings) -> dict[str, Any]:
    """Optimise and export what was planned; returns what that took for CALIBRATE."""
    module = find_model(settings.model).build()
    recording = Recording.load(settings.folder / RECORDING)
    for name in ("plain", "reuse"):
        plan = Plan.load(plan_folder(settings.folder / name))
        export_onnx(optimize(module, plan), settings.folder / name)
    plan = Plan.load(plan_folder(settings.folder / "step"))
    start = time.perf_counter()
    fast = optimize(module, plan)
    seconds = {"optimize": time.perf_counter() - start}
    for layout in LAYOUTS:
        sampler = read_sampler(fast, recording) if layout is Layout.SAMPLER else None
        start = time.perf_counter()
        export_onnx(fast, settings.folder / layout.value, layout=layout, sampler=sampler)
        seconds[layout.value] = time.perf_counter() - start
    return {"export_seconds": seconds}


def _memory(settings: BenchSettings) -> dict[str, int]:
    """Memory that optimising and exporting add to a process that has loaded the model alone."""
    module = find_model(settings.model).build()
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    with peak_memory() as peak:
        plan = Plan.load(plan_folder(settings.folder / "step"))
        export_onnx(optimize(module, plan), settings.folder / "step")
        return {"weight_bytes": weights, "export_peak_bytes": peak()}


def prepare(settings: BenchSettings) -> dict[str, Any]:
    """Plans and artifacts, each made in a process of its own; returns what they took."""
    _in_process(_plan, settings)
    return {**_in_process(_export, settings), **_in_process(_memory, settings)}


def _in_process(function: Callable[[BenchSettings], Any], settings: BenchSettings) -> Any:
    """Run a function in a fresh process, so that its memory is its own and is given back."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, (settings,))


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Bytes of resident memory that the block has added at its highest so far."""
    reset = Path("/proc/self/clear_refs")
    before = _status("VmRSS")
    if reset.exists():
        reset.write_text("5")  # the high-water mark starts again
    yield lambda: _status("VmHWM") - before


def available_memory() -> int:
    """Bytes that processes can still take; plenty where there is no /proc to ask."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return 1 << 40
    lines = path.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _status(field: str) -> int:
    """A memory field of this process in bytes; its high-water mark where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
