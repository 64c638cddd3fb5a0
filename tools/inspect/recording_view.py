"""Facts of a recording as text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from calicache.tools.inspect.recording_facts import RecordingFacts
from calicache.tools.terminal.text import (
    constants_in_words,
    fact_grid,
    format_count,
    plain_table,
    title,
)


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
