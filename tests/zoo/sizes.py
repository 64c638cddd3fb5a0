"""Which sizes of a model of the zoo one file can leave open."""

from __future__ import annotations

import tempfile
from pathlib import Path

from calicache.export import export_onnx
from calicache.export.artifact.open_sizes import Axis
from calicache.graph_passes import CalicacheError, OptimizedModel, Plan, optimize, record
from zoo.drive import make_model, run_sampler
from zoo.entry import ZooEntry
from zoo.finding import one_line


def refused_sizes(entry: ZooEntry) -> dict[str, str]:
    """Why each size cannot be left open in the layout `step`; an empty text where it can."""
    try:
        model = make_model(entry)
        with record(model) as recording:
            run_sampler(model, entry, linear=True)
        plan = Plan.from_trajectory(
            model, recording, schedule=3, rank=2, order=0, weighting="none", correct=False
        )
        fast = optimize(model, plan)
    except Exception as error:
        return dict.fromkeys(Axis, one_line(error))
    return {axis: _refusal(fast, axis) for axis in Axis}


def _refusal(fast: OptimizedModel, axis: Axis) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            export_onnx(fast, Path(folder) / "d", dynamic=(axis,), check=False)
        except CalicacheError as error:
            return one_line(error)
    return ""
