"""What several commands have on their command lines; light, as help and typing errors need it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from calicache.graph_passes.common.disk.replacing import standing
from calicache.graph_passes.common.errors import LibraryError, ModelError, SubjectError, reason_of

PIPELINE = "a pipeline (the folder of diffusers' save_pretrained)"
PLAN = "a plan (the folder of Plan.save)"
ARTIFACT = "an artifact (the folder of export_onnx)"
RECORDING = "a recording (the file of Recording.save)"
TABLE = "a latency table (the file of calicache latency)"
NPZ = "images in an npz file"
KINDS = f"{PLAN}, {ARTIFACT} or {RECORDING}"
CPU = "CPUExecutionProvider"
_MODEL = (
    "FILE.py:FUNCTION that returns the model, or a folder that diffusers' save_pretrained wrote."
)


def there(expected: str) -> Callable[[Path | None], Path | None]:
    """A check, before anything is loaded, that what an argument names is there.

    Args:
        expected: to be there, in words.
    """

    def check(path: Path | None) -> Path | None:
        if path is not None and not _exists(path):
            fix = "Give the path of one."
            raise SubjectError(str(path), expected=expected, got="no such path", fix=fix)
        return path

    return check


def each_there(expected: str) -> Callable[[list[Path]], list[Path]]:
    """A check that all of several paths are there, as `there` has it for one."""
    check = there(expected)

    def check_all(paths: list[Path]) -> list[Path]:
        for path in paths:
            check(path)
        return paths

    return check_all


def _exists(path: Path) -> bool:
    try:
        return standing(path).exists()
    except OSError:  # a name that is too long
        return False


def file_and_function(spec: str) -> tuple[Path, str]:
    """The parts of `FILE.py:FUNCTION`.

    Raises:
        ModelError: it is no such text, or there is no such file.
    """
    file, separator, name = spec.rpartition(":")
    path = Path(file)
    if not separator or path.suffix != ".py" or not path.is_file():
        raise ModelError(
            spec,
            expected="FILE.py:FUNCTION, or the folder of a model that diffusers saved",
            got=f"no Python file {file!r}" if separator else "neither of them",
            fix="Name a file that is there and the function in it that makes the model.",
        )
    return path, name


def _model_there(spec: str | None) -> str | None:
    if spec is not None and not Path(spec).is_dir():
        file_and_function(spec)
    return spec


def function_there(spec: str) -> str:
    """A check, before anything is loaded, that a text is `FILE.py:FUNCTION` of a file."""
    file_and_function(spec)
    return spec


Model = Annotated[str, typer.Argument(help=_MODEL, callback=_model_there)]
AlsoModel = Annotated[str | None, typer.Option("--model", help=_MODEL, callback=_model_there)]
Output = Annotated[Path, typer.Option("-o", "--output", help="What to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")]
Provider = Annotated[str, typer.Option(help="Of ONNX Runtime.")]
Runs = Annotated[int | None, typer.Option(help="Recorded runs to compare; all if left out.")]
Order = Annotated[int, typer.Option(help="Of the anchors.", min=0, max=2)]
PlanFolder = Annotated[Path, typer.Argument(help="The folder of a plan.", callback=there(PLAN))]
Artifact = Annotated[
    Path, typer.Argument(help="An artifact written by export_onnx.", callback=there(ARTIFACT))
]


def check_output(output: Path, fits: bool, expected: str) -> None:
    """Refuse to replace what lies there: a mistyped -o must not cost a folder of pictures.

    Raises:
        SubjectError: the output does not fit.
    """
    if not fits:
        got = "a folder with other files" if output.is_dir() else repr(str(output))
        fix = "Choose another name."
        raise SubjectError(f"-o {output}", expected=expected, got=got, fix=fix)


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
