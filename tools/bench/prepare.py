"""What `calicache bench` measures on: plans and artifacts, and what making them takes."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from torch import nn

from calicache.export import Layout, export_onnx, read_sampler
from calicache.graph_passes import Plan, Recording, StepMode, optimize, record, uniform_schedule
from calicache.tools.bench.models import find_model
from calicache.tools.bench.rows import SEED, BenchSettings, plan_folder

RECORDING = "recording.safetensors"
LAYOUTS = (Layout.STEP, Layout.PAIR, Layout.SAMPLER)


def record_run(settings: BenchSettings) -> tuple[nn.Module, Recording]:
    """A run of the model, saved in the folder as well."""
    model = find_model(settings.model)
    module = model.build()
    with record(module) as recording:
        recording.finish(model.sample(module, model.draw(SEED + 1), settings.steps))
    recording.save(settings.folder / RECORDING)
    return module, recording


def _plan(settings: BenchSettings) -> dict[str, Any]:
    """Record a run, plan for it, and save both; what that took does not count."""
    model, (module, recording) = find_model(settings.model), record_run(settings)
    steps, interval = settings.steps, settings.interval
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
    return {}


def _export(settings: BenchSettings) -> dict[str, Any]:
    """Optimise and export what was planned; returns what that took for CALIBRATE."""
    module = find_model(settings.model).build()
    recording = Recording.load(settings.folder / RECORDING)
    for name in ("plain", "reuse"):
        plan = Plan.load(plan_folder(settings.folder / name))
        export_onnx(optimize(module, plan), settings.folder / name, check=False)
    plan = Plan.load(plan_folder(settings.folder / "step"))
    start = time.perf_counter()
    fast = optimize(module, plan)
    seconds = {"optimize": time.perf_counter() - start}
    for layout in LAYOUTS:
        sampler = read_sampler(fast, recording) if layout is Layout.SAMPLER else None
        start = time.perf_counter()
        export_onnx(
            fast, settings.folder / layout.value, layout=layout, sampler=sampler, check=False
        )
        seconds[layout.value] = time.perf_counter() - start
    return {"export_seconds": seconds}


def _memory(settings: BenchSettings) -> dict[str, int]:
    """Memory that optimising and exporting add to a process that has loaded the model alone."""
    module = find_model(settings.model).build()
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    peak = peak_memory()
    plan = Plan.load(plan_folder(settings.folder / "step"))
    export_onnx(optimize(module, plan), settings.folder / "step", check=False)
    return {"weight_bytes": weights, "export_peak_bytes": peak()}


def prepare(settings: BenchSettings) -> dict[str, Any]:
    """Plans and artifacts, each made in a process of its own; returns what they took."""
    costs: dict[str, Any] = {}
    for task in (_plan, _export, _memory):
        with own_process() as process:
            costs |= process.submit(task, settings).result()
    return costs


def own_process() -> ProcessPoolExecutor:
    """A fresh process for some work, so that its memory is its own and is given back."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def peak_memory() -> Callable[[], int]:
    """Gives the bytes of resident memory that this process has added at its highest from now."""
    reset, before = Path("/proc/self/clear_refs"), _status("VmRSS")
    if reset.exists():
        reset.write_text("5")  # the high-water mark starts again
    return lambda: _status("VmHWM") - before


def available_memory() -> int:
    """Bytes that processes can still take; plenty where there is no /proc to ask."""
    return _field(Path("/proc/meminfo"), "MemAvailable") or 1 << 40


def _status(field: str) -> int:
    """A memory field of this process in bytes; its high-water mark where there is no /proc."""
    own = _field(Path("/proc/self/status"), field)
    return own or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _field(path: Path, name: str) -> int | None:
    """A field of a file below /proc, which counts in kB, in bytes."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
