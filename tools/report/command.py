"""What `calicache report` does: gather, draw, write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.common.errors import SubjectError
from calicache.graph_passes.recording.recording import Recording
from calicache.tools.report.data import gather_report
from calicache.tools.report.page import write_report
from calicache.tools.terminal.model_file import load_model


@dataclass(frozen=True, slots=True)
class ReportArguments:
    """The command line of `calicache report`; None for what was left out."""

    target: Path
    output: Path
    recording: Path | None = None
    plan: Path | None = None
    model: str | None = None
    runs: int | None = None


def run_report(arguments: ReportArguments, console: Console, progress: Console) -> None:
    """Write the report.

    Raises:
        CalicacheError: what the arguments name is refused.
    """
    _check_output(arguments.output)
    recording = Recording.load(arguments.recording) if arguments.recording else None
    plan = Plan.load(arguments.plan) if arguments.plan else None
    model = load_model(arguments.model) if arguments.model else None
    with progress.status("") as status:
        data = gather_report(
            arguments.target,
            recording=recording,
            plan=plan,
            model=model,
            runs=arguments.runs,
            on_stage=status.update,
        )
        status.update("draw")
        write_report(data, arguments.output)
    console.print(f"Written: {arguments.output}", markup=False, soft_wrap=True)


def _check_output(output: Path) -> None:
    # A mistyped -o must not cost anything else than a report.
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise SubjectError(
            f"-o {output}",
            expected="the name of an HTML file",
            got="a folder" if output.is_dir() else repr(str(output)),
            fix="Choose a name such as report.html.",
        )
