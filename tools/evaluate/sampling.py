"""Sample what is missing: shards of two runs, shared by processes in rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.common.ranks import Ranks
from calicache.tools.evaluate.shards import Run, Shard, is_sampled, write_shard
from calicache.tools.evaluate.subject import EvaluationModel, sample_images


def missing_shards(shards: Sequence[Shard], ranks: Ranks) -> list[Shard]:
    """Those that are not there; the others are read and checked, each by one process.

    Raises:
        EvaluateError: one is damaged, or was sampled with other settings.
        RankError: a process is gone.
    """
    sampled = ranks.map(is_sampled, shards)
    return [shard for shard, there in zip(shards, sampled, strict=True) if not there]


def sample_shards(
    subject: EvaluationModel,
    denoisers: Mapping[Run, nn.Module],
    missing: Sequence[Shard],
    ranks: Ranks,
    meter: Meter,
) -> None:
    """Sample shards, one for every process at a time, and write each as soon as it is whole.

    Args:
        subject: with the sampler.
        denoisers: of the two runs.
        missing: what to sample.
        ranks: of the processes.
        meter: counts images.

    Raises:
        CalicacheError: what the sampler or the plan refuses; every process raises the same.
        RankError: a process is gone.
    """
    order = sorted(missing, key=lambda s: (s.number // ranks.size, s.run, s.number))
    # The processes meet after every round: none waits for another longer than a shard takes,
    # however many there are.
    for start in range(0, len(order), ranks.size):
        work = order[start : start + ranks.size]

        def sample(shard: Shard, together: int = len(work)) -> None:
            meter.stage(f"sample {shard.path.stem}", together)
            write_shard(shard, _images(subject, denoisers[shard.run], shard, meter))

        ranks.map(sample, work)


def _images(
    subject: EvaluationModel, denoiser: nn.Module, shard: Shard, meter: Meter
) -> torch.Tensor:
    """All images of a shard, uint8 (N, H, W, C)."""
    parts = []
    for start in range(0, shard.count, shard.settings.batch):
        seeds = shard.seeds[start : start + shard.settings.batch]
        parts.append(sample_images(subject, denoiser, seeds))
        meter.add(len(seeds))
    return torch.cat(parts)
