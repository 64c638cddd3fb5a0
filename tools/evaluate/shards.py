"""Shards: the images of some seeds in a file, which says what they were sampled with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter
from torch import Tensor

from calicache.graph_passes.common.disk.documents import DAMAGES, DocumentKind, sum_of
from calicache.graph_passes.common.disk.files import Target, atomic_path
from calicache.graph_passes.common.disk.replacing import settle
from calicache.graph_passes.common.disk.tensor_files import (
    digests,
    owner_of,
    read_tensors,
    write_tensors,
)
from calicache.graph_passes.common.errors import EvaluateError

SHARDS = "shards"  # the folder of them
Run = Literal["full", "plan"]
RUNS: tuple[Run, Run] = ("full", "plan")


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """What decides the image of a seed.

    Attributes:
        weights: hash of the model's.
        plan: SHA-256 of the plan's document; None for the full model.
        batch: images that are sampled together: another batch may round differently.
        sampler: what the user's function tells of itself.
    """

    weights: str
    plan: str | None
    batch: int
    sampler: Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class _ShardJson:
    """The head of a shard.

    Attributes:
        run: of the full model or under the plan.
        first, count: its seeds are first .. first + count - 1.
        settings: it was sampled with.
        hash: SHA-256 over all of these.
        tensors: digests of `images` and `seeds`.
    """

    run: Run
    first: int
    count: int
    settings: SampleSettings
    hash: str
    tensors: Mapping[str, str]


_SHARD = DocumentKind(
    "evaluation shard",
    1,
    TypeAdapter(_ShardJson),
    EvaluateError,
    "a whole shard written by calicache evaluate",
    "Delete it: the same command samples it again.",
)


@dataclass(frozen=True, slots=True)
class Shard:
    """Which images a shard has.

    Attributes:
        folder: of the evaluation.
        run: of the full model or under the plan.
        number: from 0.
        count: how many images.
        settings: they are sampled with.
    """

    folder: Path
    run: Run
    number: int
    count: int
    settings: SampleSettings

    @property
    def path(self) -> Path:
        """Of its file."""
        return self.folder / SHARDS / f"{self.run}-{self.number:05d}.safetensors"

    @property
    def seeds(self) -> range:
        """Of its images, in their order."""
        return range(self.number * self.count, (self.number + 1) * self.count)

    @property
    def hash(self) -> str:
        """SHA-256 over the run, the seeds and the settings."""
        seeds = {"run": self.run, "first": self.seeds.start, "count": self.count}
        return sum_of({**seeds, **asdict(self.settings)})


def write_shard(shard: Shard, images: Tensor) -> None:
    """Write the images of a shard, uint8 (N, H, W, C); a kill leaves all of the file or none.

    Raises:
        EvaluateError: something else is in its place, or it cannot be written.
    """
    tensors = {"images": images, "seeds": torch.tensor(shard.seeds)}
    head = _ShardJson(
        shard.run, shard.seeds.start, shard.count, shard.settings, shard.hash, digests(tensors)
    )
    with atomic_path(shard.path, _TARGET) as file:
        write_tensors(_SHARD, head, tensors, file)


def read_shard(shard: Shard) -> Tensor:
    """The images of a shard, uint8 (N, H, W, C).

    Raises:
        EvaluateError: its file is missing or damaged, or was sampled with other settings.
    """
    head, tensors = read_tensors(_SHARD, shard.path)
    if head.hash != shard.hash:
        raise _sampled_otherwise(head, shard)
    images, seeds = tensors.get("images"), tensors.get("seeds")
    if (
        images is None
        or seeds is None
        or seeds.tolist() != list(shard.seeds)
        or images.dtype != torch.uint8
        or images.ndim != 4
        or len(images) != shard.count
    ):
        raise _SHARD.refused(shard.path, "other tensors than the images of its seeds")
    return images


def is_sampled(shard: Shard) -> bool:
    """Whether a shard is there; what is in its place is read whole.

    Raises:
        EvaluateError: it is damaged, or was sampled with other settings.
    """
    if not shard.path.exists():
        return False
    settle(shard.path)  # a save that was killed when it was as good as done left its folder
    read_shard(shard)
    return True


def _sampled_otherwise(head: _ShardJson, shard: Shard) -> EvaluateError:
    """What of a shard's seeds and settings is another one."""
    own = {"run": head.run, "first": head.first, "count": head.count, **asdict(head.settings)}
    seeds = {"run": shard.run, "first": shard.seeds.start, "count": shard.count}
    wanted = {**seeds, **asdict(shard.settings)}
    names = [name for name in wanted if own[name] != wanted[name]]
    return EvaluateError(
        str(shard.path),
        expected=", ".join(f"{name} {wanted[name]}" for name in names) or f"hash {shard.hash}",
        got=", ".join(f"{name} {own[name]}" for name in names) or f"hash {head.hash}",
        fix="Choose another output folder, or delete the shards that are not wanted.",
    )


def _foreign(path: Path) -> str | None:
    try:
        return None if owner_of(path) == _SHARD.name else "another safetensors file"
    except DAMAGES:
        return "something else"


_TARGET = Target("a shard", EvaluateError, _foreign)
