"""What `calicache bench` measures on, plans and artifacts, and processes to measure in."""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import forkserver
from pathlib import Path
from threading import current_thread, main_thread

from calicache.export import Layout, export_onnx, read_sampler
from calicache.graph_passes import OptimizedModel, Plan, Recording, optimize, record
from calicache.tools.bench.models import find_model
from calicache.tools.bench.rows import SEED, BenchSettings, plan_folder

RECORDING = "recording.safetensors"
_MODES = {"plain": None, "reuse": "REUSE", Layout.STEP.value: "CALIBRATE"}
ARTIFACTS = (*_MODES, Layout.PAIR.value, Layout.SAMPLER.value)
PRELOADED = ["calicache.tools.bench.run"]  # modules that every process begins with


def record_run(settings: BenchSettings) -> None:
    """Record a run of the model, into the folder."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    model = find_model(settings.model)
    module = model.build()
    with record(module) as recording:
        recording.finish(model.sample(module, model.draw(SEED + 1), settings.steps))
    recording.save(settings.folder / RECORDING)


def make_artifact(settings: BenchSettings, name: str) -> int:
    """Plan, optimise and export for the rows of one artifact; returns the bytes of the weights.

    Args:
        settings: whose run is recorded.
        name: one of `ARTIFACTS`.
    """
    fast = _optimized(settings, name if name in _MODES else Layout.STEP)
    layout = Layout(name) if name in list(Layout) else Layout.STEP
    sampler = None
    if layout is Layout.SAMPLER:
        sampler = read_sampler(fast, Recording.load(settings.folder / RECORDING))
    export_onnx(fast, settings.folder / name, layout=layout, sampler=sampler, check=False)
    return sum(value.nbytes for value in fast.original.parameters())


@lru_cache(1)  # CALIBRATE is made once for all layouts: they come one after another in a process
def _optimized(settings: BenchSettings, name: str) -> OptimizedModel:
    """The model under the plan of an artifact, which is saved beside it."""
    model = find_model(settings.model)
    module, mode = model.build(), _MODES[name]
    plan = Plan.from_trajectory(
        module,
        Recording.load(settings.folder / RECORDING),
        schedule=1 if mode is None else settings.interval,
        mode=mode,
        rank=settings.rank or round(model.width / 9),
        order=settings.order,
        correct=False,
    )
    plan.save(plan_folder(settings.folder / name))
    return optimize(module, plan)


def own_process() -> ProcessPoolExecutor:
    """A fresh process for some work, so that its memory is its own and is given back.

    Where there can be a process to copy it from, the libraries are read once for all of them.
    Ctrl-C ends all of them at once and in silence, so that none is waited for.
    """
    known = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
    context.set_forkserver_preload(PRELOADED)
    if "forkserver" in known and current_thread() is main_thread():
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process to copy inherits it
        forkserver.ensure_running()
        signal.signal(signal.SIGINT, before)
    return ProcessPoolExecutor(1, context, signal.signal, (signal.SIGINT, signal.SIG_DFL))


def peak_memory() -> Callable[[], int]:
    """Gives the bytes of resident memory that this process has added at its highest from now."""
    reset, before = Path("/proc/self/clear_refs"), status_bytes("VmRSS")
    if reset.exists():
        reset.write_text("5")  # the high-water mark starts again
    return lambda: status_bytes("VmHWM") - before


def available_memory() -> int:
    """Bytes that processes can still take; plenty where there is no /proc to ask."""
    return _field(Path("/proc/meminfo"), "MemAvailable") or 1 << 40


def status_bytes(field: str) -> int:
    """A memory field of this process in bytes; its high-water mark where there is no /proc."""
    own = _field(Path("/proc/self/status"), field)
    return own or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _field(path: Path, name: str) -> int | None:
    """A field of a file below /proc, which counts in kB, in bytes."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
