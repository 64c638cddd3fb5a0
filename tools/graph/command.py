"""`calicache graph`: read the graphs of an artifact, take a view of them, write it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer

from calicache.export.artifact.folder import read_manifest
from calicache.export.artifact.graph_file import read_graphs
from calicache.graph_passes.common.disk.files import atomic_path
from calicache.graph_passes.common.errors import SubjectError
from calicache.graph_passes.describe.blocks import BlockView, FoldedView, fold_blocks, view_block
from calicache.graph_passes.describe.graphs import PLAIN, ModelGraphs
from calicache.graph_passes.settings.choices import StepMode
from calicache.tools.graph.draw import mermaid_text, svg_text
from calicache.tools.graph.text import block_text, folded_text
from calicache.tools.terminal.options import check_output
from calicache.tools.terminal.text import json_text


class GraphFormat(StrEnum):
    """How a view is written."""

    TEXT = "text"
    SVG = "svg"
    MERMAID = "mermaid"
    JSON = "json"


def graph(
    artifact: Path, block: str | None, mode: str | None, form: str, output: Path | None
) -> None:
    """Print a view, or write it."""
    text = view_text(artifact, block, mode, GraphFormat(form))
    if output is None:
        typer.echo(text, nl=False)
        return
    check_output(output, not output.is_dir(), "the name of a file")
    with atomic_path(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    typer.echo(f"Written: {output}")


def view_text(
    path: Path,
    block: str | None = None,
    mode: str | None = None,
    form: GraphFormat = GraphFormat.TEXT,
) -> str:
    """One view of an artifact's graphs, as text, SVG, a Mermaid flowchart or JSON.

    Args:
        path: folder of the artifact.
        block: name or number of a block; without one the whole model is folded by block.
        mode: `plain`, or a mode in any case; without one the cheap mode that comes first.
        form: of the result.

    Raises:
        CalicacheError: no artifact, no such block or mode, or no pygraphviz for SVG.
    """
    graphs = read_graphs(path)
    step_mode = find_mode(graphs, mode or first_cheap_mode(path))
    view: BlockView | FoldedView
    view = view_block(graphs, block, step_mode) if block else fold_blocks(graphs, step_mode)
    if form is GraphFormat.SVG:
        return svg_text(view)
    if form is GraphFormat.MERMAID:
        return mermaid_text(view)
    if form is GraphFormat.JSON:
        return json_text(view) + "\n"
    return block_text(view) if isinstance(view, BlockView) else folded_text(view)


def first_cheap_mode(path: Path) -> str:
    """The first mode of an artifact's schedule that is not REFRESH, or REFRESH, in lower case.

    Raises:
        ArtifactError: it is no artifact.
    """
    schedule = read_manifest(path).schedule
    cheap = (mode for mode in schedule if mode is not StepMode.REFRESH)
    return next(cheap, StepMode.REFRESH).name.lower()


def find_mode(graphs: ModelGraphs, name: str) -> StepMode | None:
    """The mode of that name in any case; None for `plain`.

    Raises:
        SubjectError: the model has no graph of that mode.
    """
    modes = {PLAIN: None, **{mode.name.lower(): mode for mode in graphs.modes}}
    if name.lower() not in modes:
        raise SubjectError(
            "mode", expected=" | ".join(modes), got=repr(name), fix="Choose one of these."
        )
    return modes[name.lower()]
