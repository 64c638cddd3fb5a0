"""Score all shards, shared by processes, and make figures of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calicache.graph_passes.common.errors import EvaluateError
from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.common.ranks import Ranks
from calicache.tools.evaluate.evaluation import Figure
from calicache.tools.evaluate.networks import Networks, apply
from calicache.tools.evaluate.npz import NpzImages
from calicache.tools.evaluate.scores import (
    Moments,
    frechet_distance,
    image_psnr,
    inception_score,
)
from calicache.tools.evaluate.shards import RUNS, Run, Shard, read_shard

_REFERENCE_BATCH = 50
Pair = Mapping[Run, Shard]


@dataclass(frozen=True, slots=True)
class _Small:
    """What every process has of every shard: logits (N, K) by run, PSNR (N,), (H, W, C)."""

    logits: Mapping[Run, Tensor]
    psnr: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Totals:
    """Of all images."""

    moments: Mapping[Run, Moments]
    real: Moments | None
    small: Sequence[_Small]

    def without(self, number: int, features: Mapping[Run, Tensor]) -> _Totals:
        """Of all images but those of a shard, whose features are given."""
        return replace(
            self,
            moments={run: self.moments[run] - Moments.of(features[run]) for run in RUNS},
            small=[small for k, small in enumerate(self.small) if k != number],
        )


def measure(
    pairs: Sequence[Pair],
    networks: Networks,
    reference: NpzImages | None,
    ranks: Ranks,
    meter: Meter,
) -> tuple[dict[str, Figure], int]:
    """The figures of all shards, and how many images are equal in both runs.

    Every process scores its share of shards and keeps their features (N, D); images are in memory
    for one shard at a time.

    Args:
        pairs: shards of both runs, by number.
        networks: that score the images.
        reference: real images for FID.
        ranks: of the processes.
        meter: counts shards.

    Raises:
        EvaluateError: a shard is damaged, or images and networks do not fit.
        RankError: a process is gone.
    """
    features: dict[int, Mapping[Run, Tensor]] = {}

    def score(number: int) -> _Small:
        features[number], small = _score(pairs[number], networks, reference)
        meter.add(ranks.size)
        return small

    meter.stage("score")
    small = ranks.map(score, range(len(pairs)))
    for pair, one in zip(pairs, small, strict=True):
        _check_shape(pair["full"], one.shape, small[0].shape, "of the first shard")
    totals = _totals(features, small, networks, reference, ranks)
    values = _values(totals)
    left_out: list[dict[str, float]] = []
    if sum(pair["full"].count for pair in pairs[1:]) > 1:  # one image has no covariance
        left_out = ranks.map(lambda k: _values(totals.without(k, features[k])), range(len(pairs)))
    figures = {
        name: Figure.of(value, [one.get(name, math.nan) for one in left_out])
        for name, value in values.items()
    }
    return figures, sum(int(one.psnr.isinf().sum()) for one in small)


def _score(
    pair: Pair, networks: Networks, reference: NpzImages | None
) -> tuple[Mapping[Run, Tensor], _Small]:
    images = {run: read_shard(pair[run]) for run in RUNS}
    for run in RUNS:
        shape = images[run].shape[1:]
        _check_shape(pair[run], shape, images["full"].shape[1:], "of the full model")
        if reference is not None:
            _check_shape(pair[run], shape, reference.shape[1:], f"in {reference.path}")
    size = pair["full"].settings.batch
    logits = {
        run: _apply(networks.logits, images[run], "logits", size)
        for run in RUNS
        if networks.logits is not None
    }
    features = {run: _apply(networks.features, images[run], "features", size) for run in RUNS}
    psnr = image_psnr(images["plan"], images["full"])
    return features, _Small(logits, psnr, tuple(images["full"].shape[1:]))


def _apply(network: torch.nn.Module, images: Tensor, name: str, size: int) -> Tensor:
    # float64 made of float32: half the memory holds the same values.
    return torch.cat([apply(network, part, name) for part in torch.split(images, size)]).float()


def _check_shape(shard: Shard, shape: Sequence[int], others: Sequence[int], of: str) -> None:
    if tuple(shape) != tuple(others):
        raise EvaluateError(
            str(shard.path),
            expected=f"images {tuple(others)}, like those {of}",
            got=f"images {tuple(shape)}",
            fix="Sample images of one size, and give a reference of it.",
        )


def _totals(
    features: Mapping[int, Mapping[Run, Tensor]],
    small: Sequence[_Small],
    networks: Networks,
    reference: NpzImages | None,
    ranks: Ranks,
) -> _Totals:
    own = next(iter(features.values()), None)
    width = max(ranks.gather(0 if own is None else own["full"].shape[1]))
    moments = {}
    for run in RUNS:
        total = sum((Moments.of(one[run]) for one in features.values()), Moments.none(width))
        moments[run] = total.everywhere(ranks)
    if reference is None:
        return _Totals(moments, None, small)
    return _Totals(moments, _real(networks, reference, width, ranks), small)


def _real(networks: Networks, reference: NpzImages, width: int, ranks: Ranks) -> Moments:
    """Of the reference's images: batch k is scored by rank k modulo their number."""
    total = Moments.none(width)
    for number, part in enumerate(reference.batches(_REFERENCE_BATCH)):
        if number % ranks.size == ranks.rank:
            total += Moments.of(apply(networks.features, part, "features"))
    return total.everywhere(ranks)


def _values(totals: _Totals) -> dict[str, float]:
    """The figures that there are, by name."""
    values: dict[str, float] = {}
    moments = totals.moments
    if totals.real is not None:
        for run in RUNS:
            values[f"fid_{run}"] = frechet_distance(totals.real, moments[run])
        values["fid_difference"] = values["fid_plan"] - values["fid_full"]
    values["fid_between"] = frechet_distance(moments["full"], moments["plan"])
    if totals.small[0].logits:
        for run in RUNS:
            values[f"is_{run}"] = inception_score([small.logits[run] for small in totals.small])
        values["is_difference"] = values["is_plan"] - values["is_full"]
    psnr = torch.cat([small.psnr for small in totals.small])
    psnr = psnr[psnr.isfinite()]
    if len(psnr):
        values["psnr"] = float(psnr.mean())
    return values
