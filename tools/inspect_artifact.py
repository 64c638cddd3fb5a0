"""What an artifact holds, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from calicache.export.manifest import Manifest, TargetRecord
from calicache.graph_passes.schedule import StepMode

_STYLES = {
    StepMode.REFRESH: "bold red",
    StepMode.CALIBRATE: "yellow",
    StepMode.REUSE: "green",
    StepMode.FORECAST: "cyan",
}
_LETTERS = {
    StepMode.REFRESH: "R",
    StepMode.CALIBRATE: "C",
    StepMode.REUSE: "U",
    StepMode.FORECAST: "F",
}
_STEPS_A_LINE = 50


def describe_artifact(manifest: Manifest) -> RenderableType:
    """Everything `calicache inspect` prints, top to bottom."""
    return Group(
        *_heading(manifest),
        Text("\nSchedule", style="bold"),
        *schedule_strip(manifest.schedule),
        Text("\nCalibrated", style="bold"),
        _target_table(manifest),
        Text("\nLeft alone", style="bold"),
        _rejection_table(manifest),
        Text("\nTotals", style="bold"),
        _total_table(manifest),
    )


def schedule_strip(schedule: Sequence[StepMode]) -> Iterator[Text]:
    """One letter a step, `R` `C` `U` `F`, fifty steps a line, with the step number in front."""
    for start in range(0, len(schedule), _STEPS_A_LINE):
        line = Text(f"{start:4d}  ")
        for mode in schedule[start : start + _STEPS_A_LINE]:
            line.append(_LETTERS[mode], style=_STYLES[mode])
        yield line
    names = ", ".join(f"{_LETTERS[mode]} {mode.name.lower()}" for mode in StepMode)
    yield Text(f"      {names}", style="dim")


def format_count(value: float, unit: str = "") -> str:
    """1234567 as `1.23 M`."""
    for prefix in ("", "k", "M", "G"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}{unit}".rstrip()
        value /= 1000
    return f"{value:.3g} T{unit}"


def _heading(manifest: Manifest) -> Iterator[RenderableType]:
    size = sum(record.size for record in manifest.files)
    yield Text(f"calicache artifact, layout {manifest.layout}", style="bold")
    facts = [
        ("written by", f"calicache {manifest.calicache}"),
        ("weights", manifest.weights_hash[:16]),
        ("files", f"{len(manifest.files)} files, {format_count(size, 'B')}"),
        ("inputs", ", ".join(f"{spec.name} {spec}" for spec in manifest.inputs)),
        ("plan", f"rank {manifest.rank}, order {manifest.order}, weighting {manifest.weighting}"),
        ("output weights", manifest.correction),
    ]
    record = manifest.sampler
    if record is not None:
        given = ", ".join(f"{spec.name} {spec}" for spec in (record.noise, *record.inputs))
        scale = "" if record.guidance is None else f", guidance scale {record.guidance:g}"
        facts.append(("sampler", f"{given}{scale}"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(name, value)
    yield grid


def _target_table(manifest: Manifest) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("target", overflow="fold")
    for column in ("in", "out", "rank", "energy", "full", "calibrate", "cache"):
        table.add_column(column, justify="right")
    for target in manifest.targets:
        table.add_row(*_target_row(target))
    return table


def _target_row(target: TargetRecord) -> tuple[str, ...]:
    return (
        target.name,
        str(target.in_features),
        str(sum(target.out_features)),
        str(target.rank),
        "-" if target.energy is None else f"{target.energy:.3f}",
        format_count(target.full_macs),
        format_count(target.calibrate_macs),
        format_count(target.cache_bytes, "B"),
    )


def _rejection_table(manifest: Manifest) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("layer", overflow="fold")
    table.add_column("reason", overflow="fold")
    for rejection in manifest.rejections:
        table.add_row(rejection.name, rejection.reason)
    return table


def _total_table(manifest: Manifest) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for column in ("mode", "steps", "MACs a step", "of plain"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    table.add_row("plain model", "", format_count(manifest.plain_macs), "1.000")
    for mode in sorted(set(manifest.schedule)):
        macs = manifest.mode(mode).macs
        share = f"{macs / manifest.plain_macs:.3f}"
        table.add_row(mode.name, str(manifest.schedule.count(mode)), format_count(macs), share)
    table.add_row("whole run", str(len(manifest.schedule)), "", f"{manifest.run_share:.3f}")
    table.add_row("caches", str(manifest.history), format_count(manifest.cache_bytes, "B"), "")
    return table
