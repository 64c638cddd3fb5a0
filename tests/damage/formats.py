"""Every format that calicache writes: one of each, and all that its reader makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from support.small.subjects import STEPS, small_model, small_plan, small_runs
from torch import Tensor

from calicache.export import Layout, Session, export_onnx
from calicache.graph_passes import LatencyTable, Plan, Recording, optimize
from calicache.graph_passes.search.journal import EntryKind, Journal
from calicache.graph_passes.settings.latency import BranchChoice, LatencyRow

NUMBERS = EntryKind("numbers", TypeAdapter(list[float]))
SEARCH = "model, recording, request"
_MODEL = small_model()


@dataclass(frozen=True, slots=True)
class Format:
    """One format.

    Attributes:
        make: writes a file or a folder of it.
        read: text that is another one wherever anything that was read is.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], str]


@cache
def _runs(runs: int) -> Recording:
    return small_runs(_MODEL, runs)


@cache
def _plan(letters: str = "RCRURF") -> Plan:
    return small_plan(_MODEL, _runs(1), letters)


def _save_two(path: Path, letters: str = "RCRURF") -> None:
    """Two recipes in one plan, the second for timesteps of half the size."""
    plan = _plan(letters)
    grid = replace(plan.binding.grid, timesteps=tuple(t / 2 for t in plan.binding.grid.timesteps))
    Plan.join(plan, replace(plan, binding=replace(plan.binding, grid=grid))).save(path)


def _search(path: Path) -> None:
    Plan.search(_MODEL, _runs(3), budget=0.5).save(path)


def _export(layout: Layout, path: Path, letters: str = "RCRURF") -> None:
    export_onnx(optimize(_MODEL, _plan(letters)), path, layout=layout)


def _export_int8(path: Path) -> None:
    plan = Plan.from_trajectory(_MODEL, _runs(1), schedule=2, branch="int8")
    export_onnx(optimize(_MODEL, plan), path)


def _latency(path: Path, runtime: str = "a runtime") -> None:
    rows = tuple(
        LatencyRow(group, BranchChoice.LINEAR, 1000 * rank, 0.5, 0.25 + rank / 8)
        for group in ("blocks.*", "out")
        for rank in (1, 4)
    )
    LatencyTable("0" * 64, runtime, 1, 0.5, 0.125, rows, {"cpu": "one"}).save(path)


def _journal(path: Path) -> Any:
    """What is kept, or made again where it is gone."""
    journal = Journal.open(path, SEARCH)
    return [
        (journal.result(NUMBERS, key, _numbers), journal.tensors(key, _moments))
        for key in ("one", "two")
    ]


def _read_recording(path: Path) -> str:
    recording = Recording.load(path)
    plan = Plan.from_trajectory(_MODEL, recording, schedule=2, rank=2, correct=False)
    return content_of([recording.signature, list(recording.calls), recording.results, plan.recipe])


def _read_plan(path: Path) -> str:
    plan, x = Plan.load(path), torch.linspace(-1, 1, 40).view(2, 5, 4)
    fast = optimize(_MODEL, plan)
    parts = []
    for scale, one in zip((1.0, 0.5), plan.plans, strict=False):
        times = (torch.full((2,), scale * (1 - step / STEPS)) for step in range(STEPS))
        outputs = [fast(x, time) for time in times]
        parts.append([one.binding, one.recipe, one.statistics, one.sampler, one.front, outputs])
    return content_of(parts)


def _read_latency(path: Path) -> str:
    return content_of(LatencyTable.load(path))


def _read_steps(path: Path) -> str:
    session, x = Session(path), torch.linspace(-1, 1, 40).view(2, 5, 4)
    steps = range(len(session.manifest.schedule))
    outputs = [session.step(step, x=x, timestep=torch.full((2,), 0.5)) for step in steps]
    return content_of([torch.from_numpy(output) for output in outputs])


def _read_sampler(path: Path) -> str:
    latents = Session(path).sample(torch.linspace(-1, 1, 40).view(2, 5, 4))
    return content_of(torch.from_numpy(latents))


def _numbers() -> list[float]:
    return [1.5, float("inf"), -2.0]


def _moments() -> dict[str, Tensor]:
    return {"moments": torch.arange(6.0).view(2, 3)}


def content_of(value: Any) -> str:
    """Text of all that a value holds; tensors to the last bit."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.detach().numpy().tobytes().hex()}"
    if is_dataclass(value):
        return content_of([getattr(value, field.name) for field in fields(value)])
    if isinstance(value, Mapping):
        return content_of([list(pair) for pair in value.items()])
    if isinstance(value, list | tuple):
        return f"[{','.join(content_of(one) for one in value)}]"
    return repr(value)


FORMATS = {
    "recording": Format(lambda path: _runs(1).save(path), _read_recording),
    "plan": Format(lambda path: _plan().save(path), _read_plan),
    "searched plan": Format(_search, _read_plan),
    "plan of two recipes": Format(_save_two, _read_plan),
    "latency table": Format(_latency, _read_latency),
    "journal": Format(_journal, lambda path: content_of(_journal(path))),
    "step": Format(partial(_export, Layout.STEP), _read_steps),
    "int8": Format(_export_int8, _read_steps),
    "pair": Format(partial(_export, Layout.PAIR), _read_steps),
    "sampler": Format(partial(_export, Layout.SAMPLER), _read_sampler),
}

# Two saves of each that differ: whatever kills one, the other is there.
SAVES: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "recording": (lambda path: _runs(1).save(path), lambda path: _runs(2).save(path)),
    "plan": (lambda path: _plan().save(path), lambda path: _plan("RCRCRF").save(path)),
    "plan of two recipes": (_save_two, partial(_save_two, letters="RCRCRF")),
    "latency table": (_latency, partial(_latency, runtime="another")),
    "step": (partial(_export, Layout.STEP), partial(_export, Layout.STEP, letters="RCRCRF")),
}
