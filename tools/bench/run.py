"""`calicache bench`: ways to run one model side by side, each in a process of its own."""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from calicache.export import Manifest, Session, read_manifest
from calicache.graph_passes import StepMode
from calicache.graph_passes.common.errors import BenchError, reason_of
from calicache.tools.bench.models import find_model
from calicache.tools.bench.prepare import available_memory, peak_memory, prepare
from calicache.tools.bench.rows import (
    BenchRow,
    BenchSettings,
    BenchTask,
    chosen_rows,
    session_runner,
)
from calicache.tools.compare.operators import RUNS, OperatorTime, profile

Tick = Callable[[str], None]
STOP_SECONDS = 20.0
MEMORY_PER_ROW = 2.3  # of the weights: the model and its packed copy, or its caches


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


def run_bench(settings: BenchSettings, tick: Tick = lambda _: None) -> dict[str, Any]:
    """Prepare the artifacts, run all rows in turn, and return everything as plain data.

    Args:
        settings: what to measure.
        tick: called with what is being done.

    Raises:
        CalicacheError: an unknown model or row, or the model cannot be optimised.
    """
    model, rows = find_model(settings.model), chosen_rows(settings)
    tick("plan, optimise and export")
    facts = prepare(settings)
    timings = _measure(settings, rows, facts["weight_bytes"], tick)
    tick("profile operators")
    profiles = {
        name: operator_times(BenchTask(model, settings, settings.folder / name))
        for name in ("plain", "step", "sampler")
    }
    plain = read_manifest(settings.folder / "plain")
    calibrate = read_manifest(settings.folder / "step")
    return {
        "model": model.name,
        "width": model.width,
        "rank": calibrate.rank,
        "order": settings.order,
        "interval": settings.interval,
        "steps": settings.steps,
        "repeats": settings.repeats,
        "provider": settings.provider,
        "plain_macs": plain.plain_macs,
        "mode_macs": {record.mode.name: record.macs for record in calibrate.modes},
        "cache_bytes": calibrate.cache_bytes,
        "cache_values_per_channel": _cache_values(calibrate, model.width),
        **facts,
        "files": {name: _file_bytes(read_manifest(settings.folder / name)) for name in profiles},
        "rows": [asdict(timing) for timing in timings],
        "profiles": {name: [asdict(e) for e in entries] for name, entries in profiles.items()},
    }


def _measure(
    settings: BenchSettings, rows: Sequence[BenchRow], weight_bytes: int, tick: Tick
) -> list[Timing]:
    """Time all rows, as many side by side as memory holds; the plain one is in every group."""
    plain, *others = rows
    room = int(available_memory() / (MEMORY_PER_ROW * weight_bytes))
    size = max(1, min(len(others), room - 1))
    timings: list[Timing] = []
    for start in range(0, max(1, len(others)), size):
        first, *found = _measure_group(settings, [plain, *others[start : start + size]], tick)
        timings += found if timings else [first, *found]
    return timings


def _measure_group(settings: BenchSettings, rows: Sequence[BenchRow], tick: Tick) -> list[Timing]:
    """Run every row `repeats` times in turn, so that a change of the machine meets all of them."""
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[BaseProcess, Any]] = {}
    loaded: dict[str, float] = {}
    refused: dict[str, str] = {}
    runs: dict[str, list[list[float]]] = {row.name: [] for row in rows}
    try:
        for row in rows:
            tick(f"load {row.name}")
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(
                target=_work, args=(theirs, settings, row.name), daemon=True
            )
            process.start()
            theirs.close()  # so that a process that dies is heard
            workers[row.name] = process, ours
            answer = _ask(ours)
            if isinstance(answer, str):
                refused[row.name] = answer
            else:
                loaded[row.name] = answer
        for repeat in range(settings.repeats):
            for name in loaded:
                tick(f"run {repeat + 1} of {settings.repeats}: {name}")
                workers[name][1].send("run")
                runs[name].append(_ask(workers[name][1]))
        peaks = {}
        for name in loaded:
            workers[name][1].send("peak")
            peaks[name] = _ask(workers[name][1])
    finally:
        for process, pipe in workers.values():
            pipe.close()  # which ends the process, if nothing keeps it
            process.join(STOP_SECONDS)
            process.terminate()
    plain_seconds = _median_run(runs[rows[0].name]) if rows[0].name in loaded else 0.0
    return [
        Timing(row.name, refused=refused[row.name])
        if row.name in refused
        else _timing(
            settings, row, runs[row.name], plain_seconds, peaks[row.name], loaded[row.name]
        )
        for row in rows
    ]


def _timing(
    settings: BenchSettings,
    row: BenchRow,
    runs: Sequence[Sequence[float]],
    plain_seconds: float,
    peak: int,
    load_seconds: float,
) -> Timing:
    manifest = read_manifest(settings.folder / row.artifact)
    modes = manifest.schedule if row.schedule is None else row.schedule(settings)
    macs = sum(manifest.mode(mode).macs for mode in modes)
    return Timing(
        name=row.name,
        run_seconds=_median_run(runs),
        plain_seconds=plain_seconds,
        step_seconds=_by_mode(runs, modes),
        macs_share=macs / (len(modes) * manifest.plain_macs),
        peak_bytes=peak,
        load_seconds=load_seconds,
    )


def _median_run(runs: Sequence[Sequence[float]]) -> float:
    return statistics.median(sum(run) for run in runs)


def _by_mode(runs: Sequence[Sequence[float]], modes: Sequence[StepMode]) -> dict[str, float]:
    """Median seconds of a step by mode."""
    if len(runs[0]) != len(modes):
        return {}
    return {
        mode.name: statistics.median(
            run[k] for run in runs for k in range(len(modes)) if modes[k] is mode
        )
        for mode in sorted(set(modes))
    }


def _work(pipe: Connection, settings: BenchSettings, name: str) -> None:
    """A row's process: load, warm up, then run whenever asked."""
    try:
        model = find_model(settings.model)
        row = next(row for row in chosen_rows(settings) if row.name == name)
        with peak_memory() as peak:
            start = time.perf_counter()
            runner = row.make(BenchTask(model, settings, settings.folder / row.artifact))
            runner.measure(model, settings.steps)
            pipe.send(time.perf_counter() - start)
            while True:
                wish = pipe.recv()
                pipe.send(peak() if wish == "peak" else runner.measure(model, settings.steps))
    except EOFError:
        return
    except Exception as error:  # a peer that cannot run is a result, not a failure of the bench
        pipe.send(reason_of(error))


def _ask(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError as error:
        raise BenchError(
            "row", expected="an answer", got="a process that died", fix="Free some memory."
        ) from error


def operator_times(task: BenchTask) -> list[OperatorTime]:
    """Time of a benchmarked artifact's operators by mode, the slowest of every mode first."""

    def run_once(session: Session) -> None:
        session_runner(session, task).measure(task.model, task.settings.steps)

    return profile(task.folder, run_once, runs=RUNS, provider=task.settings.provider)


def _cache_values(manifest: Manifest, width: int) -> float:
    """Kept values per token and block, in multiples of the width; a block has two branches."""
    shapes = [cache.shape for cache in manifest.caches]
    tokens = max(math.prod(shape[:-1]) for shape in shapes)
    kept = manifest.cache_bytes / manifest.caches[0].torch_dtype.itemsize
    return 2 * kept / (len(manifest.branches) * tokens * width)


def _file_bytes(manifest: Manifest) -> int:
    return sum(record.size for record in manifest.files)
