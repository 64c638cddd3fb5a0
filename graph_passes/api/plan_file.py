"""The files of a plan: `plan.json`, statistics, and tables: of its sampler, and of its steps.

A plan of several recipes is a folder with such a folder for each, and `plans.json`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from calicache.graph_passes.api.plan_table import TABLE_FILE, plan_table
from calicache.graph_passes.common.arguments import path_of
from calicache.graph_passes.common.disk.bounds import MAX_GRIDS, Calls, Digest, FileName, Number
from calicache.graph_passes.common.disk.documents import DAMAGES, DocumentKind
from calicache.graph_passes.common.disk.files import (
    Target,
    atomic_path,
    check_regular,
    foreign_folder,
)
from calicache.graph_passes.common.disk.hashing import sha256_of
from calicache.graph_passes.common.disk.replacing import standing
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.factors.statistics import Statistics, named_statistics, named_tensors
from calicache.graph_passes.recording.binding import Binding
from calicache.graph_passes.sampler.tables import ROW, SamplerTables
from calicache.graph_passes.settings.front import ErrorSummary, Front
from calicache.graph_passes.settings.recipe import Recipe

NOT_ASKED = "planned with correct=False: the recorded calls were not run"
PLANS_FILE, PLAN_FILE, STATISTICS_FILE, SAMPLER_FILE = (
    "plans.json",
    "plan.json",
    "statistics.safetensors",
    "sampler.safetensors",
)


@dataclass(frozen=True, slots=True, repr=False)
class PlanContent:
    """What the files of a plan hold: a recipe and its statistics, and what they are bound to.

    Attributes:
        binding: the checkpoint and the calls that the plan is tied to.
        recipe: what is done at every step, and the weights that were fitted.
        statistics: by name of the calibration target; empty where none are needed.
        sampler: what the sampler does between two calls of the model, as it was recorded; None
            where that is not known.
        no_sampler: why it is not known.
        front: what a search found beside this plan; None for a plan that was not searched.
        in_sample: error of the recorded samples that the plan was made from; None where that was
            not measured, or where the plan was changed since.
    """

    binding: Binding
    recipe: Recipe
    statistics: Mapping[str, Statistics]
    sampler: SamplerTables | None = None
    no_sampler: str = NOT_ASKED
    front: Front | None = None
    in_sample: ErrorSummary | None = None


@dataclass(frozen=True, slots=True)
class _SamplerNumbers:
    """What `plan.json` holds of a sampler; its inputs are tensors of a file of their own."""

    latent: str
    parts: Calls
    conditional: int | None
    guidance: Number | None
    mix: tuple[tuple[Number, ...], ...]
    scales: tuple[Number, ...]
    updates: tuple[tuple[Number, ...], ...]

    @staticmethod
    def of(sampler: SamplerTables) -> _SamplerNumbers:
        """The numbers of a sampler."""
        return _SamplerNumbers(
            **{field.name: getattr(sampler, field.name) for field in fields(_SamplerNumbers)}
        )

    def with_inputs(self, inputs: Mapping[str, Tensor]) -> SamplerTables:
        """The sampler of these numbers and inputs."""
        numbers = {field.name: getattr(self, field.name) for field in fields(self)}
        return SamplerTables(**numbers, inputs=dict(inputs))


@dataclass(frozen=True, slots=True)
class _PlanJson:
    """What `plan.json` holds."""

    files: dict[str, Digest]
    binding: Binding
    recipe: Recipe
    sampler: _SamplerNumbers | None
    no_sampler: str
    front: Front | None = None
    in_sample: ErrorSummary | None = None


_DOCUMENT = DocumentKind(
    "plan",
    10,
    TypeAdapter(_PlanJson),
    PlanError,
    "a folder written by Plan.save",
    "Make the plan again from the recording.",
)


@dataclass(frozen=True, slots=True)
class _PlansJson:
    """What `plans.json` holds.

    Attributes:
        plans: digest of the `plan.json` in every folder, by the folder's name.
    """

    plans: Annotated[dict[FileName, Digest], Field(min_length=2, max_length=MAX_GRIDS)]


_PLANS = DocumentKind(
    "plans",
    1,
    TypeAdapter(_PlansJson),
    PlanError,
    "a folder written by Plan.save",
    "Make the plan again from the recordings.",
)


def _own_files(folder: Path) -> set[str]:
    """Names of the files of a plan; none where the folder is not one, of whatever format."""
    content = _DOCUMENT.head(folder / PLAN_FILE)
    return {PLAN_FILE, STATISTICS_FILE, SAMPLER_FILE, TABLE_FILE} if content else set()


def _foreign(path: Path) -> str | None:
    """What is in the place of a plan; None where it is one, or empty."""
    content = _PLANS.head(path / PLANS_FILE)
    if content is None:
        return foreign_folder(path, _own_files)
    others = (foreign_folder(one, _own_files) for one in path.iterdir() if one.name != PLANS_FILE)
    return next((other for other in others if other is not None), None)


_TARGET = Target("a plan", PlanError, _foreign)


def write_plans(contents: Mapping[str, PlanContent], path: Path | str) -> None:
    """Write the files of a plan into a new folder, or in the place of another plan.

    Args:
        contents: of every recipe, by the name of its folder; of one the files alone are written.
        path: of the folder.

    Raises:
        PlanError: something else is there, or it cannot be written.
    """
    with atomic_path(path_of(path, PlanError), _TARGET) as folder:
        folder.mkdir()
        if len(contents) == 1:
            for content in contents.values():
                _write_files(content, folder)
            return
        for name, content in contents.items():
            (folder / name).mkdir()
            _write_files(content, folder / name)
        sums = {name: sha256_of(folder / name / PLAN_FILE) for name in contents}
        (folder / PLANS_FILE).write_text(_PLANS.dumps(_PlansJson(sums)))


def _write_files(content: PlanContent, folder: Path) -> None:
    tensors = {STATISTICS_FILE: named_tensors(content.statistics)}
    if content.sampler is not None:
        tensors[SAMPLER_FILE] = dict(content.sampler.inputs)
    for name, values in tensors.items():
        save_file({key: v.contiguous() for key, v in values.items()}, folder / name)
    written = _PlanJson(
        {name: sha256_of(folder / name) for name in tensors},
        content.binding,
        content.recipe,
        None if content.sampler is None else _SamplerNumbers.of(content.sampler),
        content.no_sampler,
        content.front,
        content.in_sample,
    )
    (folder / PLAN_FILE).write_text(_DOCUMENT.dumps(written))
    table = plan_table(content.binding, content.recipe)
    if table is not None:  # for others: nothing here reads it
        (folder / TABLE_FILE).write_text(table.dumps())


def read_plans(path: Path | str) -> tuple[PlanContent, ...]:
    """Read what `write_plans` wrote: the content of every recipe.

    Raises:
        PlanError: a file is missing, damaged, of another version, or not a plan.
    """
    path = path_of(path, PlanError)
    folder = standing(path)
    if not os.path.lexists(folder / PLANS_FILE):
        return (_read_plan(path, folder),)
    written = _PLANS.read(folder / PLANS_FILE, path)
    for name, digest in written.plans.items():
        try:
            check_regular(folder / name / PLAN_FILE)
            if sha256_of(folder / name / PLAN_FILE) != digest:
                raise ValueError(f"{name}/{PLAN_FILE} is not the file the plan was saved with")
        except DAMAGES as error:
            raise _PLANS.refused(path, error) from error
    return tuple(_read_plan(path / name, folder / name) for name in written.plans)


def _read_plan(path: Path, folder: Path) -> PlanContent:
    written = _DOCUMENT.read(folder / PLAN_FILE, path)
    try:
        if written.front and not 0 <= written.front.choice < len(written.front.points):
            raise ValueError("a front whose choice is none of its points")
        _ = [spec.torch_dtype for spec in written.binding.signature.tensors]
        names = {STATISTICS_FILE} | ({SAMPLER_FILE} if written.sampler else set())
        if set(written.files) != names:
            raise ValueError(f"{PLAN_FILE} lists other files than {', '.join(sorted(names))}")
        for name, digest in written.files.items():
            check_regular(folder / name)
            if sha256_of(folder / name) != digest:
                raise ValueError(f"{name} is not the file the plan was saved with")
        statistics = named_statistics(load_file(folder / STATISTICS_FILE))
        sampler = None
        if written.sampler is not None:
            sampler = written.sampler.with_inputs(load_file(folder / SAMPLER_FILE))
            _check_sampler(sampler, written.binding)
    except (*DAMAGES, TypeError) as error:
        raise _DOCUMENT.refused(path, error) from error
    return PlanContent(
        written.binding,
        written.recipe,
        statistics,
        sampler,
        written.no_sampler,
        written.front,
        written.in_sample,
    )


def _check_sampler(sampler: SamplerTables, binding: Binding) -> None:
    """Refuse tables whose sizes do not belong together, or that name no tensor of the calls."""
    steps = len(sampler.updates)
    widths = {len(row) for row in sampler.updates} | {ROW}
    counts = {steps, len(sampler.mix), len(sampler.scales)}
    counts |= {len(table) for table in sampler.inputs.values()}
    parts = {len(row) for row in sampler.mix} | {sampler.parts}
    names = {spec.name for spec in binding.signature.tensors}
    conditional = sampler.conditional in (None, *range(sampler.parts))
    fits = len(widths) == len(counts) == len(parts) == 1 and steps > 0 and conditional
    if not fits or not {sampler.latent, *sampler.inputs} <= names:
        raise ValueError("tables of the sampler that do not belong together")
