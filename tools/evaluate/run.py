"""An evaluation from beginning to end, in one process or several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from calicache.graph_passes.api.optimize import optimize
from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.plan_file import PLAN_FILE, PLANS_FILE
from calicache.graph_passes.common.disk.hashing import hash_weights, sha256_of
from calicache.graph_passes.common.disk.replacing import standing
from calicache.graph_passes.common.environment import environment
from calicache.graph_passes.common.errors import EvaluateError
from calicache.graph_passes.common.progress import Meter, OnProgress
from calicache.graph_passes.common.ranks import ALONE, Ranks
from calicache.tools.evaluate.evaluation import Evaluation, Reference
from calicache.tools.evaluate.measure import Pair, measure
from calicache.tools.evaluate.networks import Networks, networks_of
from calicache.tools.evaluate.npz import NpzImages, write_npz
from calicache.tools.evaluate.sampling import missing_shards, sample_shards
from calicache.tools.evaluate.shards import RUNS, Run, SampleSettings, Shard, read_shard
from calicache.tools.evaluate.subject import EvaluationModel

EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True, slots=True)
class EvaluateSettings:
    """How much to evaluate, and where.

    Attributes:
        output: folder of the shards, the npz files and the figures.
        samples: images of each run, a multiple of the shard.
        shard: images of a shard.
        batch: images that are sampled together.
        reference: npz file of real images; None without.
    """

    output: Path
    samples: int = 50_000
    shard: int = 500
    batch: int = 50
    reference: Path | None = None


def run_evaluation(
    subject: EvaluationModel,
    plan: Path,
    settings: EvaluateSettings,
    ranks: Ranks = ALONE,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Sample the shards that are missing, score all, write `evaluation.json` and two npz files.

    Args:
        subject: what to evaluate.
        plan: folder of a plan.
        settings: how much, and where.
        ranks: processes that share the work, all of which call this with the same arguments.
        on_progress: told what is being done.

    Raises:
        CalicacheError: settings, shards, plan and model do not fit, or a network is missing.
        RankError: a process is gone.
    """
    _check(settings)
    networks = networks_of(subject)
    reference = NpzImages.open(settings.reference) if settings.reference else None
    denoisers: Mapping[Run, nn.Module] = {
        "full": subject.model,
        "plan": optimize(subject.model, Plan.load(plan)),
    }
    pairs = _pairs(subject, plan, settings)
    hashes = [pairs[0][run].hash for run in RUNS]
    ranks.check_alike("model, plan and settings", hashes, "Give every process the same.")
    missing = missing_shards([pair[run] for run in RUNS for pair in pairs], ranks)
    meter = Meter(settings.shard * len(missing) + len(pairs), on_progress)
    sample_shards(subject, denoisers, missing, ranks, meter)
    figures, equal = measure(pairs, networks, reference, ranks, meter)
    evaluation = Evaluation(
        name=subject.name,
        samples=settings.samples,
        shard=settings.shard,
        settings=pairs[0]["plan"].settings,
        networks=_hashes(networks),
        reference=ranks.first(partial(_facts, reference)),
        equal_images=equal,
        figures=figures,
        environment=environment(),
    )
    ranks.first(partial(_write, settings, pairs, evaluation))
    return evaluation


def _check(settings: EvaluateSettings) -> None:
    if settings.samples % settings.shard:
        raise EvaluateError(
            "--samples",
            expected=f"a multiple of {settings.shard}, the images of a shard",
            got=str(settings.samples),
            fix="Choose another number, or another --shard.",
        )


def _pairs(subject: EvaluationModel, plan: Path, settings: EvaluateSettings) -> Sequence[Pair]:
    """All shards, by number and run; those of the full model do not depend on the plan."""
    weights, sampler = hash_weights(subject.model), dict(subject.settings)
    sampled_with: Mapping[Run, SampleSettings] = {
        "full": SampleSettings(weights, None, settings.batch, sampler),
        "plan": SampleSettings(weights, _plan_hash(plan), settings.batch, sampler),
    }
    return [
        {
            run: Shard(settings.output, run, number, settings.shard, sampled_with[run])
            for run in RUNS
        }
        for number in range(settings.samples // settings.shard)
    ]


def _plan_hash(plan: Path) -> str:
    """SHA-256 of the document that has the digests of all other files of a plan."""
    folder = standing(plan)
    files = (folder / name for name in (PLANS_FILE, PLAN_FILE))
    return sha256_of(next(file for file in files if file.is_file()))


def _facts(reference: NpzImages | None) -> Reference | None:
    if reference is None:
        return None
    return Reference(reference.shape[0], sha256_of(reference.path))


def _hashes(networks: Networks) -> dict[str, str]:
    hashes = {"features": hash_weights(networks.features)}
    return hashes | ({"logits": hash_weights(networks.logits)} if networks.logits else {})


def _write(settings: EvaluateSettings, pairs: Sequence[Pair], evaluation: Evaluation) -> None:
    for run in RUNS:
        _, *one = read_shard(pairs[0][run]).shape
        shape = (settings.samples, *one)
        write_npz(settings.output / f"{run}.npz", shape, _images(pairs, run))
    evaluation.save(settings.output / EVALUATION_FILE)


def _images(pairs: Sequence[Pair], run: Run) -> Iterator[Tensor]:
    return (read_shard(pair[run]) for pair in pairs)
