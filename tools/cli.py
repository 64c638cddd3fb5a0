"""The `calicache` command."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from calicache.graph_passes.common.errors import CalicacheError
from calicache.tools.bench.command import bench
from calicache.tools.compare.command import compare_command
from calicache.tools.diff.command import diff
from calicache.tools.graph.command import graph
from calicache.tools.inspect.command import inspect
from calicache.tools.plan.latency import latency
from calicache.tools.plan.search import plan_app
from calicache.tools.report.command import report


class _Commands(TyperGroup):
    """Tells what calicache refuses on the error stream, with exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the command line names."""
        try:
            return super().invoke(ctx)
        except CalicacheError as error:
            Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="calicache",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _main() -> None:
    """Plan what calicache does to a diffusion transformer, look at it, and measure it."""


app.add_typer(plan_app)
app.command()(latency)
app.command()(inspect)
app.command()(diff)
app.command()(graph)
app.command()(report)
app.command("compare")(compare_command)
app.command()(bench)
