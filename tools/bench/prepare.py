"""What `calicache bench` measures on, plans and artifacts, and processes to measure in."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from calicache.export import Layout, export_onnx, read_sampler
from calicache.graph_passes import Plan, Recording, optimize, record
from calicache.tools.bench.models import find_model
from calicache.tools.bench.rows import SEED, BenchSettings, plan_folder

RECORDING = "recording.safetensors"
PRELOADED = ["calicache.tools.bench.run"]  # modules that every process begins with


def record_run(settings: BenchSettings) -> None:
    """Record a run of the model, into the folder."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    model = find_model(settings.model)
    module = model.build()
    with record(module) as recording:
        recording.finish(model.sample(module, model.draw(SEED + 1), settings.steps))
    recording.save(settings.folder / RECORDING)


def make_artifacts(settings: BenchSettings) -> int:
    """Record, plan, optimise and export for every row; returns the bytes of the weights."""
    record_run(settings)
    recording = Recording.load(settings.folder / RECORDING)
    model = find_model(settings.model)
    module = model.build()
    modes = {"plain": (1, None), "reuse": (settings.interval, "REUSE")}
    modes["step"] = (settings.interval, "CALIBRATE")
    for name, (interval, mode) in modes.items():
        plan = Plan.from_trajectory(
            module,
            recording,
            schedule=interval,
            mode=mode,
            rank=settings.rank or round(model.width / 9),
            order=settings.order,
            correct=False,
        )
        plan.save(plan_folder(settings.folder / name))
        fast = optimize(module, plan)
        export_onnx(fast, settings.folder / name, check=False)
    # The last one is CALIBRATE's.
    samplers = {Layout.PAIR: None, Layout.SAMPLER: read_sampler(fast, recording)}
    for layout, sampler in samplers.items():
        path = settings.folder / layout.value
        export_onnx(fast, path, layout=layout, sampler=sampler, check=False)
    return sum(value.nbytes for value in module.parameters())


def own_process() -> ProcessPoolExecutor:
    """A fresh process for some work, so that its memory is its own and is given back.

    Where there can be a process to copy it from, the libraries are read once for all of them.
    """
    known = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
    context.set_forkserver_preload(PRELOADED)
    return ProcessPoolExecutor(1, context)


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
