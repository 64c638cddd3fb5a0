"""What a recording holds: runs, steps, the form of the calls, and what its inputs depend on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

from rich.console import RenderableType
from rich.text import Text
from torch import Tensor

from calicache.graph_passes.common.errors import DependenceError
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.signature import ConstantSpec
from calicache.graph_passes.recording.timestep import Timestep
from calicache.tools.inspect.facts import Caution, InputFacts, input_facts
from calicache.tools.terminal.text import (
    constants_in_words,
    fact_grid,
    format_count,
    plain_table,
    title,
)

FOR_A_SEARCH = 3


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One recorded denoising: its steps, and whether `finish` was given its result."""

    steps: int
    finished: bool


@dataclass(frozen=True, slots=True)
class RecordingFacts:
    """Everything that is shown of a recording.

    Attributes:
        kind: `recording`.
        path: of the file.
        bytes: of the file; `value_bytes` of the recorded values, each counted once.
        calls: of the model; `calls_per_step` of them make a step.
        runs: every denoising; those of one guided step stand side by side.
        steps: of the longest run.
        inputs, constants: the arguments of a call.
        timestep: the argument that counts the denoising down, or None.
        timestep_values: of the longest run, step by step; empty without a timestep.
        warnings: what a user should know.
    """

    kind: Literal["recording"] = field(default="recording", init=False)
    path: str
    bytes: int
    value_bytes: int
    calls: int
    calls_per_step: int
    runs: tuple[RunFacts, ...]
    steps: int
    inputs: tuple[InputFacts, ...]
    constants: tuple[ConstantSpec, ...]
    timestep: Timestep | None
    timestep_values: tuple[float, ...]
    warnings: tuple[Caution, ...]


def recording_facts(path: Path, recording: Recording) -> RecordingFacts:
    """Facts of a recording.

    Args:
        path: its file.
        recording: from there.
    """
    timestep, longest = recording.timestep, max(recording.runs, key=len)
    dependence, unknown = _dependence(recording)
    return RecordingFacts(
        path=str(path),
        bytes=path.stat().st_size,
        value_bytes=sum(value.nbytes for value in _values(recording).values()),
        calls=len(recording.calls),
        calls_per_step=recording.calls_per_step,
        runs=tuple(
            RunFacts(len(run), end is not None)
            for run, end in zip(recording.runs, recording.ends, strict=True)
        ),
        steps=recording.steps,
        inputs=input_facts(recording.signature.tensors, dependence),
        constants=recording.signature.constants,
        timestep=timestep,
        timestep_values=()
        if timestep is None
        else tuple(float(call[timestep.name].flatten()[0]) for call in longest),
        warnings=(*unknown, *_cautions(recording)),
    )


def _dependence(recording: Recording) -> tuple[Mapping[str, Dependence], tuple[Caution, ...]]:
    try:
        return recording.dependence, ()
    except DependenceError as error:
        text = f"What the inputs depend on is not known: {error}"
        return {}, (Caution("dependence-unknown", text),)


def _values(recording: Recording) -> dict[int, Tensor]:
    """Every recorded tensor once; one that several calls share is one object."""
    called = chain.from_iterable(call.values() for call in recording.calls)
    return {id(value): value for value in chain(called, recording.results.values())}


def _cautions(recording: Recording) -> Iterator[Caution]:
    runs, ends = recording.runs, recording.ends
    if len(runs) < FOR_A_SEARCH:
        count = "One run" if len(runs) == 1 else f"{len(runs)} runs"
        yield Caution("few-runs", f"{count}: a plan search needs {FOR_A_SEARCH} or more.")
    unfinished = sum(end is None for end in ends)
    if unfinished:
        yield Caution(
            "no-results",
            f"{unfinished} of {len(runs)} runs have no result, as finish() keeps it: "
            "the sampler's last update is not known.",
        )
    lengths = sorted({len(run) for run in runs})
    if len(lengths) > 1:
        yield Caution("uneven-runs", f"Runs of {lengths[0]} to {lengths[-1]} steps.")
    if recording.timestep is None:
        yield Caution("no-timestep", "No input counts the steps: runs are told apart by finish().")
    broken = _not_finite(recording)
    if broken:
        yield Caution("not-finite", f"NaN or Inf among the values of {', '.join(broken)}.")


def _not_finite(recording: Recording) -> list[str]:
    def odd(value: Tensor) -> bool:
        return not bool(value.isfinite().all())

    names = [spec.name for spec in recording.signature.tensors]
    broken = [name for name in names if any(odd(call[name]) for call in recording.calls)]
    results = any(odd(value) for value in recording.results.values())
    return broken + ["the results"] * results


def describe_recording(facts: RecordingFacts) -> Iterator[RenderableType]:
    """What `calicache inspect` prints of a recording."""
    yield Text("calicache recording", style="bold")
    size = format_count(facts.bytes, "B")
    yield fact_grid(
        [
            ("runs", _runs(facts)),
            ("calls", f"{facts.calls} of the model, {facts.calls_per_step} a step"),
            ("size", f"{size}, values {format_count(facts.value_bytes, 'B')}"),
            ("arguments", constants_in_words(facts.constants)),
        ]
    )
    yield title("Inputs")
    rows = (
        (spec.name, spec.dtype, str(spec.shape), spec.depends_on or "unknown")
        for spec in facts.inputs
    )
    yield plain_table(["input", "dtype", "shape", "depends on"], rows=rows)
    if facts.timestep is not None:
        way = "falls" if facts.timestep.descends else "rises"
        yield title(f"Timesteps: {facts.timestep.name} {way}")
        yield Text(" ".join(f"{value:g}" for value in facts.timestep_values))


def _runs(facts: RecordingFacts) -> str:
    """`3 of 6 steps, 2 with a result`."""
    counts = Counter(run.steps for run in facts.runs)
    lengths = ", ".join(f"{count} of {steps} steps" for steps, count in sorted(counts.items()))
    finished = sum(run.finished for run in facts.runs)
    return f"{lengths}; {finished} with a result"
