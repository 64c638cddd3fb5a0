"""A report as one HTML file that needs no network."""

from __future__ import annotations

import base64
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from calicache.graph_passes.common.disk.files import atomic_path
from calicache.graph_passes.describe.blocks import fold_blocks, view_block
from calicache.graph_passes.describe.graphs import ModelGraphs
from calicache.graph_passes.settings.choices import BranchKind, StepMode
from calicache.graph_passes.settings.front import CONFIDENCE
from calicache.graph_passes.settings.schedule import count_modes
from calicache.tools.compare.comparison import Comparison
from calicache.tools.compare.pictures import PictureKind, save_grid
from calicache.tools.compare.view import STEP_COLUMNS, step_rows
from calicache.tools.graph.draw import COLOURS as MARK_COLOURS
from calicache.tools.graph.draw import svg_text
from calicache.tools.graph.drawing import LEGEND
from calicache.tools.inspect.artifact import COST_COLUMNS, ArtifactFacts, cost_rows
from calicache.tools.report.charts import COLOURS, report_charts
from calicache.tools.report.data import ReportData
from calicache.tools.terminal.options import import_library
from calicache.tools.terminal.text import format_count

WHOLE = "whole model"
_FAINTEST = 1e-5  # error without colour
_MOST_DRAWN = 100  # blocks; each takes the layout a tenth of a second or two


@dataclass(frozen=True, slots=True)
class DrawnGraph:
    """One graph of the viewer: of a part in a mode, `plain` for the graph as it was."""

    part: str
    mode: str
    svg: str


def write_report(data: ReportData, path: Path | str) -> None:
    """Write the page; a file of that name is replaced.

    Raises:
        LibraryError: a library of the extra `report` is missing.
    """
    page = render_report(data)
    with atomic_path(Path(path)) as place:
        place.write_text(page, encoding="utf-8")


def render_report(data: ReportData) -> str:
    """The page as text.

    Raises:
        LibraryError: a library of the extra `report` is missing.
    """
    facts, graphs, curves = data.facts, data.graphs, data.curves or ()
    parts = () if graphs is None else graphs.parts
    charts, images = report_charts(data), _images(data.comparison)
    return str(
        _template().render(
            title=Path(facts.path).name,
            data=data,
            facts=facts,
            manifest=facts.manifest if isinstance(facts, ArtifactFacts) else None,
            missing=data.missing,
            heat=heat,
            counts=count_modes(facts.schedule.modes),
            ranks=sorted({2**k for k in range(20)} & {r for curve in curves for r in curve.kept}),
            cost=(COST_COLUMNS, cost_rows(facts) if isinstance(facts, ArtifactFacts) else ()),
            steps=(STEP_COLUMNS, step_rows(data.comparison) if data.comparison else ()),
            bound=f"{100 * CONFIDENCE:g} % bound",
            size=lambda count: format_count(count, "B"),
            charts={f"chart-{n}-{k}": c for n, own in charts.items() for k, c in enumerate(own)},
            chart_counts={name: len(own) for name, own in charts.items()},
            graphs=() if graphs is None else tuple(_drawn(graphs, parts[:_MOST_DRAWN])),
            parts=(WHOLE, *parts[:_MOST_DRAWN]),
            drawn=min(len(parts), _MOST_DRAWN),
            known=len(parts),
            modes=() if graphs is None else tuple(mode.name for mode in sorted(graphs.modes)),
            layers=_layers(data),
            marks=tuple((MARK_COLOURS[node.mark], node.about) for node in LEGEND),
            images=images,
            colours={mode.name: colour for mode, colour in COLOURS.items()},
            plotly=_asset("plotly-basic.min.js"),
            pan_zoom=_asset("svg-pan-zoom.min.js"),
            style=_asset("report.css"),
            script=_asset("report.js"),
        )
    )


def heat(error: float) -> int:
    """How much colour the cell of an error has: per cent, by its logarithm, from 1e-5 to 1."""
    return round(100 * (1 + math.log10(min(max(error, _FAINTEST), 1.0)) / -math.log10(_FAINTEST)))


def _layers(data: ReportData) -> dict[str, str]:
    """Names that a layer can be looked for with, and what became of it in a few words."""
    nodes = () if data.graphs is None else data.graphs.plain.nodes
    layers = {node.module: "" for node in nodes if node.module}
    targets = data.facts.manifest.targets if isinstance(data.facts, ArtifactFacts) else ()
    for target in targets:
        of = "" if len(target.sites) == 1 else f" of {target.name}"
        how = f"at rank {target.rank}" if target.branch is BranchKind.LOW_RANK else "in int8"
        layers |= dict.fromkeys(target.sites, f"calibrated {how}{of}")
    return layers


def _template() -> Any:
    jinja = import_library("jinja2", "jinja2", "fills the page in")
    environment = jinja.Environment(
        autoescape=True, undefined=jinja.StrictUndefined, trim_blocks=True
    )
    return environment.from_string(_asset("report.html"))


def _asset(name: str) -> str:
    return (files("calicache.tools.report") / "assets" / name).read_text(encoding="utf-8")


def _drawn(graphs: ModelGraphs, parts: Sequence[str]) -> Iterator[DrawnGraph]:
    modes: list[StepMode | None] = [None, *sorted(graphs.modes)]
    for number, part in enumerate((WHOLE, *parts)):
        for place, mode in enumerate(modes):
            view = fold_blocks(graphs, mode) if part == WHOLE else view_block(graphs, part, mode)
            name = "plain" if mode is None else mode.name
            yield DrawnGraph(part, name, svg_text(view, f"g{number}-{place}-", legend=()))


def _images(comparison: Comparison | None) -> str:
    """Pictures of the full and the optimised run as a PNG, base64; empty where there are none."""
    pictures = None if comparison is None else comparison.pictures
    if pictures is None or pictures.kind is PictureKind.LATENTS:
        return ""
    with tempfile.TemporaryDirectory() as scratch:
        grid = save_grid(pictures, Path(scratch) / "grid.png")
        return base64.b64encode(grid.path.read_bytes()).decode()
