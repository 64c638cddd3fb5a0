"""What `calicache plan` does: search for a plan, show what was found, take another point."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console

from calicache.graph_passes.api.plan import PLAN_FILE, Plan
from calicache.graph_passes.common.errors import CalicacheError, PlanError
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.settings.front import Front
from calicache.graph_passes.settings.latency import LatencyTable
from calicache.tools.terminal.front import describe_front, describe_point
from calicache.tools.terminal.model_file import load_model
from calicache.tools.terminal.progress import progress_shown

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


@dataclass(frozen=True, slots=True)
class PlanArguments:
    """The command line of `calicache plan`; None or False for what was left out.

    Attributes:
        target: the model, or the plan where `show` or `take` is given.
        recording: recorded runs of the model.
        output: folder of the new plan.
        budget, max_error, latency, effort: of `Plan.search`; latency is a file.
        show: print the front of the plan.
        take: place on the front of the plan.
        json: print the front as JSON.
    """

    target: str
    recording: Path | None = None
    output: Path | None = None
    budget: float | None = None
    max_error: float | None = None
    latency: Path | None = None
    effort: int | None = None
    show: bool = False
    take: int | None = None
    json: bool = False

    @property
    def given(self) -> set[str]:
        """Names of the optional ones that are there."""
        names = {field.name for field in fields(self)} - {"target"}
        absent = (None, False)  # compared by identity: 0 is a place on the front
        return {name for name in names if all(getattr(self, name) is not no for no in absent)}


def run_plan(arguments: PlanArguments, console: Console, progress: Console) -> int:
    """Do what the arguments ask for.

    Args:
        arguments: as given; they need not fit together.
        console: for the result.
        progress: for everything else.

    Returns:
        The exit code.

    Raises:
        CalicacheError: the arguments do not fit together, or what they name is refused.
    """
    form = _form_of(arguments)
    _check_form(arguments, form)
    if form is _SHOW:
        _show(arguments, console)
        return 0
    _check_output(_path(arguments.output))
    if form is _TAKE:
        _take(arguments, console)
        return 0
    return _search(arguments, console, progress)


def _show(arguments: PlanArguments, console: Console) -> None:
    front = _front_of(_load_plan(arguments.target), arguments.target)
    if arguments.json:
        # Not through rich, which breaks long lines.
        console.file.write(TypeAdapter(Front).dump_json(front, indent=2).decode() + "\n")
    else:
        console.print(describe_front(front))


def _take(arguments: PlanArguments, console: Console) -> None:
    assert arguments.take is not None
    output = _path(arguments.output)
    plan = _load_plan(arguments.target)
    _front_of(plan, arguments.target)
    taken = plan.take(arguments.take)
    taken.save(output)
    _print_saved(taken, output, console, searched=False)


def _search(arguments: PlanArguments, console: Console, progress: Console) -> int:
    output = _path(arguments.output)
    place = output.resolve()  # `.` has no name of its own
    folder = place.with_name(f"{place.name}.search")
    # The small files first: a typing error in them shows before a large model is read.
    latency = LatencyTable.load(arguments.latency) if arguments.latency else None
    recording = Recording.load(_path(arguments.recording))
    begun_before = folder.exists()
    try:
        with progress_shown(progress) as on_progress:
            plan = Plan.search(
                load_model(arguments.target),
                recording,
                budget=arguments.budget,
                max_error=arguments.max_error,
                latency=latency,
                effort=1 if arguments.effort is None else arguments.effort,
                folder=folder,
                on_progress=on_progress,
            )
        plan.save(output)
    except KeyboardInterrupt:
        kept = f"What is done lies in {folder}; the same command goes on from there."
        progress.print(
            f"Stopped. {kept if folder.exists() else 'Nothing was done yet.'}",
            markup=False,
            soft_wrap=True,
        )
        return INTERRUPTED
    except CalicacheError:
        # What is refused once is refused again; kept, it would stand in the way of other requests.
        if not begun_before:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    _print_saved(plan, output, console, searched=True)
    return 0


def _print_saved(plan: Plan, output: Path, console: Console, *, searched: bool) -> None:
    named = shlex.quote(str(output))
    lines = (
        f"Plan written: {output}",
        f"The whole front: calicache plan {named} --show",
        f"Another point of it: calicache plan {named} --take NUMBER -o OTHER",
    )
    console.print(describe_point(_front_of(plan, str(output)), searched=searched))
    console.print()
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _load_plan(target: str) -> Plan:
    if not (Path(target) / PLAN_FILE).is_file():
        raise PlanError(
            target,
            expected="the folder of a plan: --show and --take look at one that is there",
            got=f"no {PLAN_FILE} in it" if Path(target).is_dir() else "no such folder",
            fix=f"Make one: {_SEARCH.usage}",
        )
    return Plan.load(target)


def _front_of(plan: Plan, target: str) -> Front:
    if plan.front is None:
        raise PlanError(
            target,
            expected="a plan that a search made, with its front",
            got="a plan without a front",
            fix=f"Search for one: {_SEARCH.usage}",
        )
    return plan.front


@dataclass(frozen=True, slots=True)
class _Form:
    """One of the ways to call the command: what it looks like, must have, may have."""

    usage: str
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()


_SHOW = _Form("calicache plan PLAN --show [--json]", ("show",), ("json",))
_TAKE = _Form("calicache plan PLAN --take NUMBER -o OTHER", ("take", "output"))
_SEARCH = _Form(
    "calicache plan MODEL RECORDING -o PLAN (--budget SHARE | --max-error ERROR)",
    ("recording", "output"),
    ("budget", "max_error", "latency", "effort"),
)


def _form_of(arguments: PlanArguments) -> _Form:
    return _SHOW if arguments.show else _SEARCH if arguments.take is None else _TAKE


def _check_form(arguments: PlanArguments, form: _Form) -> None:
    given = arguments.given
    missing = [_shown(name) for name in form.needed if name not in given]
    extra = [_shown(name) for name in sorted(given.difference(form.needed, form.optional))]
    got = [f"no {name}" for name in missing] + [f"{name} too" for name in extra]
    if form is _SEARCH and len(given & {"budget", "max_error"}) != 1:
        got.append(
            "both --budget and --max-error"
            if "budget" in given
            else "neither --budget nor --max-error"
        )
    if got:
        raise PlanError(
            "arguments",
            expected=form.usage,
            got=", ".join(got),
            fix="See calicache plan --help for the other ways to call it.",
        )


def _shown(name: str) -> str:
    return {"recording": "RECORDING", "output": "-o"}.get(name, f"--{name.replace('_', '-')}")


def _check_output(output: Path) -> None:
    # Plan.save replaces whatever lies there; a mistyped -o must not cost a folder of pictures.
    is_plan = (output / PLAN_FILE).is_file()
    empty = output.is_dir() and not any(output.iterdir())
    if output.exists() and not is_plan and not empty:
        raise PlanError(
            f"-o {output}",
            expected="a new folder, or a plan to replace",
            got="a folder with other files in it" if output.is_dir() else "a file",
            fix="Choose another name.",
        )


def _path(path: Path | None) -> Path:
    assert path is not None  # `_check_form` has seen to it
    return path
