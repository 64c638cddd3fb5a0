"""Ways to run one model side by side, each in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from calicache.export import Session, read_manifest
from calicache.graph_passes.common.errors import BenchError, reason_of
from calicache.graph_passes.common.progress import Meter, OnProgress
from calicache.tools.bench.models import find_model
from calicache.tools.bench.prepare import (
    ARTIFACTS,
    available_memory,
    make_artifact,
    own_process,
    peak_memory,
    record_run,
)
from calicache.tools.bench.rows import (
    BenchRow,
    BenchSettings,
    BenchTask,
    chosen_rows,
    session_runner,
)
from calicache.tools.compare.operators import RUNS, OperatorTime, profile

MEMORY_PER_ROW = 2.3  # of the weights: the model and its packed copy, or its caches
EXPORT_WORK = 3  # for a progress bar: what an artifact takes, in runs
PROFILED = ("plain", "step", "sampler")  # artifacts


@dataclass(frozen=True, slots=True)
class Timing:
    """One row as measured.

    Attributes:
        name: of the row.
        run_seconds: median over the repeats of a whole run.
        plain_seconds: the same of the plain row in the same group.
        step_seconds: median by mode; empty where only the whole run can be timed.
        macs_share: of a run, against the plain model.
        peak_bytes: resident memory that its process added, loading and running.
        load_seconds: until it could run, torch.compile's own work included.
        refused: why it could not run, or None.
    """

    name: str
    run_seconds: float = 0.0
    plain_seconds: float = 0.0
    step_seconds: Mapping[str, float] | None = None
    macs_share: float = 1.0
    peak_bytes: int = 0
    load_seconds: float = 0.0
    refused: str | None = None


def run_bench(settings: BenchSettings, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Prepare the artifacts, run all rows in turn, and return everything as plain data.

    Args:
        settings: what to measure.
        on_progress: told what is being done.

    Raises:
        CalicacheError: an unknown model or row, or the model cannot be optimised.
    """
    model, rows = find_model(settings.model), chosen_rows(settings)
    pieces = EXPORT_WORK * len(ARTIFACTS) + len(rows) * (1 + settings.repeats) + len(PROFILED)
    meter = Meter(1 + pieces, on_progress)
    weight_bytes = _prepare(settings, meter)
    timings = _measure(settings, rows, weight_bytes, meter)
    folders = {name: settings.folder / name for name in PROFILED}
    profiles = {}
    for name, folder in folders.items():
        meter.stage(f"profile operators of {name}")
        profiles[name] = operator_times(BenchTask(model, settings, folder))
        meter.add()
    manifests = {name: read_manifest(folder) for name, folder in folders.items()}
    calibrate = manifests["step"]
    return {
        "model": model.name,
        "width": model.width,
        "rank": calibrate.rank,
        "order": settings.order,
        "interval": settings.interval,
        "steps": settings.steps,
        "repeats": settings.repeats,
        "provider": settings.provider,
        "cache_bytes": calibrate.cache_bytes,
        "weight_bytes": weight_bytes,
        "files": {
            name: sum(record.size for record in manifest.files)
            for name, manifest in manifests.items()
        },
        "rows": [asdict(timing) for timing in timings],
        "profiles": {name: [asdict(e) for e in entries] for name, entries in profiles.items()},
    }


def _prepare(settings: BenchSettings, meter: Meter) -> int:
    """Record a run and make all artifacts; returns the bytes of the weights."""
    weight_bytes = 0
    with own_process() as process:
        meter.stage("record a run")
        process.submit(record_run, settings).result()
        meter.add()
        for name in ARTIFACTS:
            meter.stage(f"plan, optimise and export {name}", EXPORT_WORK)
            weight_bytes = process.submit(make_artifact, settings, name).result()
            meter.add()
    return weight_bytes


def operator_times(task: BenchTask) -> list[OperatorTime]:
    """Time of a benchmarked artifact's operators by mode, the slowest of every mode first."""

    def run_once(session: Session) -> None:
        session_runner(session, task).measure(task.model, task.settings.steps)

    return profile(task.folder, run_once, runs=RUNS, provider=task.settings.provider)


def _measure(
    settings: BenchSettings, rows: Sequence[BenchRow], weight_bytes: int, meter: Meter
) -> list[Timing]:
    """Time all rows, as many side by side as memory holds; the plain one is in every group."""
    plain, *others = rows
    room = int(available_memory() / (MEMORY_PER_ROW * weight_bytes))
    size = max(1, min(len(others), room - 1))
    timings: list[Timing] = []
    for start in range(0, max(1, len(others)), size):
        first, *group = _measure_group(settings, [plain, *others[start : start + size]], meter)
        timings += group if timings else [first, *group]
    return timings


def _measure_group(settings: BenchSettings, rows: Sequence[BenchRow], meter: Meter) -> list[Timing]:
    """Run every row `repeats` times in turn, so that a change of the machine meets all of them."""
    processes: dict[str, ProcessPoolExecutor] = {}
    loaded: dict[str, float] = {}
    peaks: dict[str, int] = {}
    refused: dict[str, str] = {}
    runs: dict[str, list[list[float]]] = {row.name: [] for row in rows}
    with ExitStack() as stack:
        for row in rows:
            meter.stage(f"load {row.name}")
            processes[row.name] = stack.enter_context(own_process())
            try:
                loaded[row.name] = processes[row.name].submit(_load, settings, row.name).result()
            except Exception as error:  # a peer that cannot run is a result, not a failure
                refused[row.name] = reason_of(error)
            meter.add()
        for repeat in range(settings.repeats):
            for name in loaded:
                meter.stage(f"run {repeat + 1} of {settings.repeats}: {name}")
                seconds, peaks[name] = _ask(processes[name])
                runs[name].append(seconds)
                meter.add()
    first = rows[0].name
    plain_seconds = _median_run(runs[first]) if first in loaded else 0.0
    return [
        Timing(row.name, refused=refused[row.name])
        if row.name in refused
        else Timing(
            name=row.name,
            run_seconds=_median_run(runs[row.name]),
            plain_seconds=plain_seconds,
            peak_bytes=peaks[row.name],
            load_seconds=loaded[row.name],
            **_by_mode(settings, row, runs[row.name]),
        )
        for row in rows
    ]


def _by_mode(
    settings: BenchSettings, row: BenchRow, runs: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Median seconds of a step by mode, and what the MACs of a run are of the plain model's."""
    manifest = read_manifest(settings.folder / row.artifact)
    modes = manifest.schedule if row.schedule is None else row.schedule(settings)
    seconds = {
        mode.name: median(run[k] for run in runs for k in range(len(modes)) if modes[k] is mode)
        for mode in sorted(set(modes))
        if len(runs[0]) == len(modes)  # else only the whole run can be timed
    }
    macs = sum(manifest.mode(mode).macs for mode in modes)
    return {"step_seconds": seconds, "macs_share": macs / (len(modes) * manifest.plain_macs)}


def _median_run(runs: Sequence[Sequence[float]]) -> float:
    return median(sum(run) for run in runs)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The row that this process is for."""

    measure: Callable[[], list[float]]
    peak: Callable[[], int]


_loaded: list[_Loaded] = []  # filled in a row's own process alone


def _load(settings: BenchSettings, name: str) -> float:
    """Load a row and warm it up; returns the seconds that took."""
    model = find_model(settings.model)
    row = next(row for row in chosen_rows(settings) if row.name == name)
    peak, start = peak_memory(), time.perf_counter()
    runner = row.make(BenchTask(model, settings, settings.folder / row.artifact))
    _loaded.append(_Loaded(lambda: runner.measure(model, settings.steps), peak))
    _run()
    return time.perf_counter() - start


def _run() -> tuple[list[float], int]:
    """Seconds of one run by step, and the most memory that was added until its end."""
    return _loaded[0].measure(), _loaded[0].peak()


def _ask(process: ProcessPoolExecutor) -> tuple[list[float], int]:
    try:
        return process.submit(_run).result()
    except BrokenProcessPool as error:
        raise BenchError(
            "row", expected="an answer", got="a process that died", fix="Free some memory."
        ) from error
