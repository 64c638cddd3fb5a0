"""The `calicache` command."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from calicache.graph_passes.common.errors import CalicacheError
from calicache.tools import commands

# Where the work of a command is done, loaded when it is called: it stands on torch, which takes
# seconds that nobody should wait for a page of help or a typing error.
WORK: dict[Callable[..., None], str] = {
    commands.speed_up: "calicache.tools.make.speed_up",
    commands.search: "calicache.tools.make.search",
    commands.take: "calicache.tools.make.take",
    commands.export: "calicache.tools.make.export",
    commands.latency: "calicache.tools.make.latency",
    commands.cost: "calicache.tools.make.cost",
    commands.inspect: "calicache.tools.inspect.command",
    commands.diff: "calicache.tools.diff.command",
    commands.graph: "calicache.tools.graph.command",
    commands.report: "calicache.tools.report.command",
    commands.compare: "calicache.tools.compare.command",
    commands.evaluate: "calicache.tools.evaluate.command",
    commands.bench: "calicache.tools.bench.command",
}
TORCHRUN = "calicache.graph_passes.common.torchrun"


class _FlagsHaveNoType:
    """Help says nothing after an option that takes no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Arguments and options."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class _Command(_FlagsHaveNoType, TyperCommand):
    """One of the commands."""


class _Commands(_FlagsHaveNoType, TyperGroup):
    """Tells what calicache refuses on the error stream, with exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the command line names."""
        try:
            return super().invoke(ctx)
        except CalicacheError as error:
            _tell(str(error))
            raise typer.Exit(1) from error


def _tell(text: str) -> None:
    """Show an error; once, where torchrun has started several processes that may all have it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        importlib.import_module(TORCHRUN).tell_once(text, _show)
    else:
        _show(text)


def _show(text: str) -> None:
    Console(stderr=True).print(text, style="red", markup=False, highlight=False)


def _later(command: Callable[..., None], module: str) -> Callable[..., None]:
    """A command whose work is loaded when it is called."""

    @wraps(command)
    def call(**arguments: Any) -> None:
        # When it is loaded, ONNX Runtime would write a database of what it counts below HOME.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        getattr(importlib.import_module(module), command.__name__)(**arguments)

    return call


app = typer.Typer(
    name="calicache",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"calicache {importlib.import_module('calicache').__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Plan what calicache does to a diffusion transformer, look at it, and measure it."""


for _command, _module in WORK.items():
    app.command(cls=_Command)(_later(_command, _module))
