"""The `calicache` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter
from rich.console import Console

from calicache.export.manifest import Manifest, load_artifact
from calicache.graph_passes.errors import CalicacheError
from calicache.tools.inspect_artifact import describe_artifact

app = typer.Typer(
    name="calicache",
    help="Look at what calicache did to a diffusion transformer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _main() -> None:
    """Look at what calicache did to a diffusion transformer."""


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="An artifact written by export_onnx.")],
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Print the sites, rejections, schedule and costs of an artifact.

    Example: calicache inspect out/dit.onnx.d
    """
    try:
        manifest = load_artifact(directory)
    except CalicacheError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    if json:
        typer.echo(TypeAdapter(Manifest).dump_json(manifest, indent=2).decode())
    else:
        Console(highlight=False).print(describe_artifact(manifest))
