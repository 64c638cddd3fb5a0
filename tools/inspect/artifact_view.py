"""Facts of an artifact as text for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from calicache.export.artifact.manifest import TargetRecord
from calicache.tools.inspect.artifact_facts import ArtifactFacts
from calicache.tools.terminal.front import front_lines
from calicache.tools.terminal.text import (
    fact_grid,
    files_in_words,
    format_count,
    plain_table,
    schedule_strip,
    some_of,
    title,
)

COST_COLUMNS = ("mode", "steps", "MACs", "of plain", "reads", "keeps")
_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


def describe_artifact(facts: ArtifactFacts) -> Iterator[RenderableType]:
    """What `calicache inspect` prints of an artifact."""
    yield Text(f"calicache artifact, layout {facts.layout}", style="bold")
    yield fact_grid(_heading(facts))
    yield title(f"Schedule, interval {facts.schedule.interval}")
    yield from schedule_strip(facts.schedule.modes)
    yield title("Targets, with MACs and cache bytes of one call")
    yield _target_table(facts.targets)
    yield title("Linear layers by step mode")
    yield _layer_table(facts)
    yield title("Left alone")
    rejections = ((rejection.name, rejection.reason) for rejection in facts.rejections)
    yield plain_table(["layer", "reason"], rows=rejections)
    yield title("Totals of one call")
    yield _total_table(facts)
    if facts.front is not None:
        yield from front_lines(facts.front)


def fold_layers(
    rows: Iterable[tuple[str, tuple[str, ...]]],
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Rows of a table whose names differ in one number and whose cells do not, as one row."""
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, cells in rows:
        alike.setdefault((_NUMBER.sub("*", name, count=1), cells), []).append(name)
    for (_, cells), names in alike.items():
        yield fold_names(names), cells


def fold_names(names: Sequence[str]) -> str:
    """Names that differ in one number as one: `blocks.{0-3,5}.attn.q`."""
    first = _NUMBER.search(names[0])
    if first is None or len(names) == 1:
        return ", ".join(names)
    numbers = [int(_NUMBER.search(name).group()) for name in names]  # type: ignore[union-attr]
    # Neighbours have the same distance from their places in the list.
    runs = [
        [number for _, number in members]
        for _, members in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ]
    shown = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{names[0][: first.start()]}{{{shown}}}{names[0][first.end() :]}"


def _heading(facts: ArtifactFacts) -> Iterator[tuple[str, str]]:
    order = facts.schedule.order
    yield "written by", f"calicache {facts.calicache}"
    yield "weights", facts.weights_hash[:16]
    yield "files", files_in_words(facts.files)
    yield "inputs", some_of([f"{spec.name} {spec}" for spec in facts.inputs])
    if facts.fixed:
        yield "built in", f"the recorded values of {', '.join(facts.fixed)}"
    if facts.calls_per_step > 1:
        yield "calls", f"{facts.calls_per_step} of the model a step"
    yield "plan", f"rank {facts.rank}, order {order}, weighting {facts.weighting}"
    yield "output weights", facts.correction
    kept = f"{facts.history} refresh{'es' if facts.history > 1 else ''} of each at most"
    yield "caches", f"{facts.caches} values, {kept}, {format_count(facts.cache_bytes, 'B')}"
    record = facts.sampler
    if record is not None:
        given = [f"{spec.name} {spec}" for spec in (record.noise, *record.inputs)]
        if record.guidance is not None:
            given.append(f"guidance scale {record.guidance:g}")
        yield "sampler", some_of(given)


def _target_table(targets: Sequence[TargetRecord]) -> Table:
    rows = (
        (
            target.name,
            str(target.in_features),
            str(sum(target.out_features)),
            str(target.rank),
            "-" if target.energy is None else f"{target.energy:.3f}",
            format_count(target.full_macs),
            format_count(target.calibrate_macs),
            format_count(target.cache_bytes, "B"),
        )
        for target in targets
    )
    right = ("in", "out", "rank", "energy", "full", "calibrate", "cache")
    return plain_table(["target"], right, rows)


def _layer_table(facts: ArtifactFacts) -> Table:
    """What is done where; layers of several blocks that are treated alike in one row."""
    modes = [entry.mode.name for entry in facts.modes]
    rows = [(one.name, tuple(one.work[mode].value for mode in modes)) for one in facts.layers]
    return plain_table(["layer", *modes], rows=((name, *work) for name, work in fold_layers(rows)))


def cost_rows(facts: ArtifactFacts) -> Iterator[tuple[str, ...]]:
    """Costs of one call of the plain model, then by mode: the cells below `COST_COLUMNS`."""
    yield "plain model", "", format_count(facts.plain_macs), "1.000", "", ""
    for entry in facts.modes:
        yield (
            entry.mode.name,
            str(entry.steps),
            format_count(entry.macs),
            f"{entry.share:.3f}",
            format_count(entry.read_bytes, "B"),
            format_count(entry.written_bytes, "B"),
        )


def _total_table(facts: ArtifactFacts) -> Table:
    whole = ("whole run", str(len(facts.schedule.modes)), "", f"{facts.run_share:.3f}", "", "")
    return plain_table(COST_COLUMNS[:1], COST_COLUMNS[1:], [*cost_rows(facts), whole])
