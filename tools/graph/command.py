"""What `calicache graph` does: read the graphs of an artifact, take a view of them, write it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pydantic import TypeAdapter

from calicache.export.artifact.graph_file import read_graphs
from calicache.export.artifact.manifest import read_manifest
from calicache.graph_passes.common.errors import SubjectError
from calicache.graph_passes.common.files import atomic_path
from calicache.graph_passes.describe.blocks import BlockView, FoldedView, fold_blocks, view_block
from calicache.graph_passes.describe.graphs import PLAIN, ModelGraphs
from calicache.graph_passes.settings.choices import StepMode
from calicache.tools.graph.draw import mermaid_text, svg_text
from calicache.tools.graph.text import block_text, folded_text


class GraphFormat(StrEnum):
    """How a view is written."""

    TEXT = "text"
    SVG = "svg"
    MERMAID = "mermaid"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class GraphArguments:
    """The command line of `calicache graph`; None for what was left out.

    Attributes:
        target: folder of an artifact.
        block: name or number of a block; without one the whole model is folded by block.
        mode: `plain`, or a mode in any case; the cheap mode that the schedule uses first.
        format: of the result.
        output: file to write.
    """

    target: Path
    block: str | None = None
    mode: str | None = None
    format: GraphFormat = GraphFormat.TEXT
    output: Path | None = None


def run_graph(arguments: GraphArguments) -> str:
    """The view that the arguments ask for, written into `output` where there is one.

    Returns:
        What to print.

    Raises:
        CalicacheError: no artifact, one without graphs, or no such block or mode.
    """
    graphs = read_graphs(arguments.target)
    mode = find_mode(graphs, arguments.mode or first_cheap_mode(arguments.target))
    view: BlockView | FoldedView
    if arguments.block is None:
        view = fold_blocks(graphs, mode)
    else:
        view = view_block(graphs, arguments.block, mode)
    text = write_view(view, arguments.format)
    if arguments.output is None:
        return text
    if arguments.output.is_dir():
        raise SubjectError(
            "output", expected="a file", got=f"the folder {arguments.output}", fix="Name a file."
        )
    with atomic_path(arguments.output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return f"Written: {arguments.output}\n"


def write_view(view: BlockView | FoldedView, form: GraphFormat) -> str:
    """A view as text, as SVG, as a Mermaid flowchart or as JSON.

    Raises:
        SubjectError: pygraphviz is missing, for SVG.
    """
    if form is GraphFormat.SVG:
        return svg_text(view)
    if form is GraphFormat.MERMAID:
        return mermaid_text(view)
    if form is GraphFormat.JSON:
        return TypeAdapter(type(view)).dump_json(view, indent=2).decode() + "\n"
    return block_text(view) if isinstance(view, BlockView) else folded_text(view)


def first_cheap_mode(directory: Path) -> str:
    """The first mode of an artifact's schedule that is not REFRESH, or REFRESH, in lower case.

    Raises:
        ArtifactError: it is no artifact.
    """
    schedule = read_manifest(directory).schedule
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
