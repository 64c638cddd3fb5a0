"""The files of a plan: `plan.json`, its statistics, and the tables of its sampler."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.common.files import atomic_path
from calicache.graph_passes.common.hashing import sha256_of
from calicache.graph_passes.factors.statistics import Statistics, named_statistics, named_tensors
from calicache.graph_passes.recording.binding import Binding
from calicache.graph_passes.sampler.tables import SamplerTables
from calicache.graph_passes.settings.front import Front
from calicache.graph_passes.settings.recipe import Recipe

FORMAT = 6
NOT_ASKED = "planned with correct=False: the recorded calls were not run"
PLAN_FILE, STATISTICS_FILE, SAMPLER_FILE = (
    "plan.json",
    "statistics.safetensors",
    "sampler.safetensors",
)


@dataclass(frozen=True, slots=True)
class PlanContent:
    """What the files of a plan hold; see `Plan`."""

    binding: Binding
    recipe: Recipe
    statistics: Mapping[str, Statistics]
    sampler: SamplerTables | None
    no_sampler: str
    front: Front | None


@dataclass(frozen=True, slots=True)
class _SamplerNumbers:
    """What `plan.json` holds of a sampler; its inputs are tensors of a file of their own."""

    latent: str
    parts: int
    conditional: int | None
    guidance: float | None
    mix: tuple[tuple[float, ...], ...]
    scales: tuple[float, ...]
    updates: tuple[tuple[float, ...], ...]

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

    format: int
    files: dict[str, str]
    binding: Binding
    recipe: Recipe
    sampler: _SamplerNumbers | None
    no_sampler: str
    front: Front | None = None


_PLAN_JSON = TypeAdapter(_PlanJson)


def write_plan(content: PlanContent, path: Path | str) -> None:
    """Write the files of a plan into a new or replaced folder."""
    tensors = {STATISTICS_FILE: named_tensors(content.statistics)}
    if content.sampler is not None:
        tensors[SAMPLER_FILE] = dict(content.sampler.inputs)
    with atomic_path(Path(path)) as folder:
        folder.mkdir()
        for name, values in tensors.items():
            save_file({key: v.contiguous() for key, v in values.items()}, folder / name)
        written = _PlanJson(
            FORMAT,
            {name: sha256_of(folder / name) for name in tensors},
            content.binding,
            content.recipe,
            None if content.sampler is None else _SamplerNumbers.of(content.sampler),
            content.no_sampler,
            content.front,
        )
        (folder / PLAN_FILE).write_text(
            json.dumps(_PLAN_JSON.dump_python(written, mode="json"), indent=2) + "\n"
        )


def read_plan(path: Path | str) -> PlanContent:
    """Read what `write_plan` wrote.

    Raises:
        PlanError: a file is missing, damaged, of another version, or not a plan.
    """
    folder = Path(path)
    try:
        text = (folder / PLAN_FILE).read_bytes()
        number = json.loads(text)["format"]  # first: another format has other fields
        if number != FORMAT:
            raise ValueError(f"format {number}, this version reads {FORMAT}")
        written = _PLAN_JSON.validate_json(text)
        names = {STATISTICS_FILE} | ({SAMPLER_FILE} if written.sampler else set())
        if set(written.files) != names:
            raise ValueError(f"{PLAN_FILE} lists other files than {', '.join(sorted(names))}")
        for name, digest in written.files.items():
            if sha256_of(folder / name) != digest:
                raise ValueError(f"{name} is not the file the plan was saved with")
        statistics = named_statistics(load_file(folder / STATISTICS_FILE))
        sampler = None
        if written.sampler is not None:
            sampler = written.sampler.with_inputs(load_file(folder / SAMPLER_FILE))
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, PlanError) as error:
        raise PlanError(
            str(path),
            expected="a folder written by Plan.save",
            got=f"{type(error).__name__}: {error}",
            fix="Make the plan again from the recording.",
        ) from error
    return PlanContent(
        written.binding, written.recipe, statistics, sampler, written.no_sampler, written.front
    )
