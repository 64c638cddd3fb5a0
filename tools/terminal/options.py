"""What several commands have on their command lines, and what they have in common."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console, RenderableType

from calicache.graph_passes.common.errors import LibraryError, SubjectError, reason_of
from calicache.tools.terminal.text import json_text

T = TypeVar("T")

_MODEL = (
    "FILE.py:FUNCTION that returns the model, or a folder that diffusers' save_pretrained wrote."
)

Model = Annotated[str, typer.Argument(help=_MODEL)]
AlsoModel = Annotated[str | None, typer.Option("--model", help=_MODEL)]
Output = Annotated[Path, typer.Option("-o", "--output", help="What to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")]
Provider = Annotated[str, typer.Option(help="Of ONNX Runtime.")]
Runs = Annotated[int | None, typer.Option(help="Recorded runs to compare; all if left out.")]

CPU = "CPUExecutionProvider"


def check_output(output: Path, fits: bool, expected: str) -> None:
    """Refuse to replace what lies there: a mistyped -o must not cost a folder of pictures.

    Raises:
        SubjectError: the output does not fit.
    """
    if not fits:
        got = "a folder with other files" if output.is_dir() else repr(str(output))
        fix = "Choose another name."
        raise SubjectError(f"-o {output}", expected=expected, got=got, fix=fix)


def show(shown: RenderableType) -> None:
    """Print what rich lays out; into a file without colours."""
    Console(highlight=False).print(shown)


def show_value(value: T, describe: Callable[[T], RenderableType], *, json: bool) -> None:
    """Print a dataclass as JSON, or as it is described."""
    if json:
        typer.echo(json_text(value))
    else:
        show(describe(value))


def import_library(name: str, package: str, purpose: str, extra: str = "report") -> Any:
    """A library that only some commands need.

    Args:
        name: of the module.
        package: that has it.
        purpose: what it does here, such as `draws the charts`.
        extra: of calicache's own package that brings it.

    Raises:
        LibraryError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LibraryError(
            package,
            expected=f"the package that {purpose}",
            got=reason_of(error),
            fix=f"Install it: pip install 'calicache[{extra}]'",
        ) from error
