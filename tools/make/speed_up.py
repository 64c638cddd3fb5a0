"""`calicache speed-up`: plans for the pipeline in a folder, by seconds measured on this machine."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.api.speed.speed_up import speed_up as speed_up_pipeline
from calicache.graph_passes.common.errors import ModelError, SubjectError, reason_of
from calicache.tools.make.plans import check_plan_output
from calicache.tools.terminal.model_file import saved_dtype
from calicache.tools.terminal.options import import_library
from calicache.tools.terminal.progress import progress_shown


def speed_up(
    pipeline: Path,
    output: Path,
    prompt: list[str],
    set_: list[str],
    budget: float | None,
    max_error: float | None,
    effort: int,
) -> None:
    """Search, tell what was measured, and save a plan for every model of the pipeline."""
    folder = pipeline if pipeline.is_dir() else pipeline.parent
    given = _values(set_)
    pipe = _load(folder)
    _check_names(pipe, {**given, **({"prompt": ""} if prompt else {})})
    for name in ("transformer", "transformer_2"):
        check_plan_output(output / name)
    calls = [{"prompt": text, **given} for text in prompt] or [given]
    with progress_shown() as on_progress:
        summary = speed_up_pipeline(
            pipe,
            calls,
            budget=budget,
            max_error=max_error,
            effort=effort,
            on_progress=on_progress,
        )
    typer.echo(str(summary))
    for name, model in summary.models.items():
        if isinstance(model, OptimizedModel):
            model.plan.save(output / name)
            typer.echo(f"wrote {output / name}, for {folder / name}")


def _values(texts: Sequence[str]) -> dict[str, Any]:
    """Arguments of a call from NAME=VALUE; a value that is no JSON is a text."""
    values: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not (separator and name.isidentifier()):
            raise SubjectError(
                f"--set {text}",
                expected="NAME=VALUE",
                got=repr(text),
                fix="Write it as num_inference_steps=28.",
            )
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def _check_names(pipe: Any, given: Mapping[str, Any]) -> None:
    """Refuse arguments that the pipeline's call does not have, before anything runs."""
    known = inspect.signature(pipe.__call__).parameters
    odd = [name for name in given if name not in known]
    if odd:
        raise SubjectError(
            f"--{odd[0]}" if odd[0] == "prompt" else f"--set {odd[0]}",
            expected=f"an argument of {type(pipe).__name__}",
            got=f"none of {', '.join(known)}",
            fix="Name one of these.",
        )


def _load(folder: Path) -> Any:
    """The pipeline that diffusers saved in a folder, in the dtype of its transformer."""
    diffusers = import_library("diffusers", "diffusers", "has the pipeline's class", "evaluate")
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(folder), torch_dtype=saved_dtype(folder / "transformer"), local_files_only=True
        )
    except Exception as error:  # whatever the loaders of its parts raise
        raise ModelError(
            str(folder),
            expected="the folder of a pipeline that diffusers saved",
            got=reason_of(error),
            fix="Name the folder with model_index.json in it.",
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe
