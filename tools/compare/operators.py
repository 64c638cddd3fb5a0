"""Where the time of an artifact goes, operator by operator, from ONNX Runtime's own profile."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calicache.export import Session
from calicache.export.session.runtime import onnx_runtime
from calicache.graph_passes import StepMode

CONTROL = {"If", "Loop"}  # their time is that of the nodes inside
RUNS = 2
AROUND = "run"  # what stands outside of the steps


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """What one operator takes in the steps of one mode.

    Attributes:
        mode: of the steps, or `run` for what stands outside of them.
        operator: its ONNX name.
        milliseconds, calls, result_bytes: mean of one step; of the whole run where mode is `run`.
    """

    mode: str
    operator: str
    milliseconds: float
    calls: float
    result_bytes: float


def profile(
    artifact: Path | str,
    run_once: Callable[[Session], object],
    *,
    runs: int = RUNS,
    provider: str = "CPUExecutionProvider",
) -> list[OperatorTime]:
    """Time of an artifact's operators by mode, the slowest of every mode first.

    Args:
        artifact: its folder.
        run_once: makes the session do all steps of a run.
        runs: how often.
        provider: of ONNX Runtime.
    """
    with tempfile.TemporaryDirectory() as scratch:
        options = onnx_runtime().SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "profile")
        session = Session(artifact, provider=provider, options=options)
        for _ in range(runs):
            run_once(session)
        events = [event for path in session.end_profiling() for event in _events(path)]
    schedule = session.manifest.schedule
    steps = {mode.name: schedule.count(mode) * runs for mode in set(schedule)}
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for event in events:
        mode = _mode(event["name"])
        share = 1 / steps.get(mode, runs)
        entry = totals[mode, event["args"]["op_name"]]
        entry[0] += share * event["dur"] / 1e3  # microseconds
        entry[1] += share
        entry[2] += share * int(event["args"].get("output_size") or 0)
    times = [OperatorTime(mode, name, *values) for (mode, name), values in totals.items()]
    return sorted(times, key=lambda entry: (entry.mode, -entry.milliseconds))


def _mode(node: str) -> str:
    """The mode whose graph a node is from; its name starts with it."""
    name = node.partition("/")[0].upper()
    return name if name in StepMode.__members__ else AROUND


def _events(path: Path) -> list[dict[str, Any]]:
    """Kernel runs in a profile, control flow left out."""
    return [
        event
        for event in json.loads(path.read_text())
        if event.get("cat") == "Node"
        and event["name"].endswith("_kernel_time")
        and event["args"]["op_name"] not in CONTROL
    ]
