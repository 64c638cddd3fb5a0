"""Every calibration target decomposed once, and factors of any rank cut from that."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from calicache.graph_passes.common.errors import DecomposeError
from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.common.shards import COLUMNS
from calicache.graph_passes.factors.covariance import decompose_branch, decompose_increments
from calicache.graph_passes.factors.decompose import (
    CalibrationFactors,
    Decomposition,
    decompose_weight,
)
from calicache.graph_passes.factors.quantise import QuantisedWeight, quantise_weight
from calicache.graph_passes.factors.statistics import SecondMoments, Statistics
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.settings.choices import BranchKind, Granularity
from calicache.graph_passes.sites.targets import CalibrationTarget

Factors = CalibrationFactors | QuantisedWeight
MOST_BYTES = 256 << 20  # of decompositions held at once
MOST_FACTOR_BYTES = 512 << 20  # of factors, where the decomposition is not held


@dataclass(slots=True)
class Decompositions:
    """The decompositions of one checkpoint, in memory alone, as far as they are small.

    Of one that is not held, the factors that were cut from it last are: they are far smaller, and
    a plan that is optimised after it was made asks for the same ones. What is held in neither form
    is decomposed again when it is asked for.

    Attributes:
        held: by name of the calibration target, with the statistics that it was made from.
        cuts: factors, likewise; a target is in one of the two.
        nbytes: memory of the decompositions.
        count: decompositions that were made.
        lock: for the threads of `make_factors`.
    """

    held: dict[str, tuple[Statistics | None, Decomposition]] = field(default_factory=dict)
    cuts: dict[str, tuple[Statistics | None, CalibrationFactors]] = field(default_factory=dict)
    nbytes: int = 0
    count: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, compare=False)

    def of(
        self, captured: CapturedGraph, target: CalibrationTarget, statistics: Statistics | None
    ) -> Decomposition:
        """The decomposition of a calibration target, made at the first request.

        Args:
            captured: where the weights are.
            target: of any rank.
            statistics: of the target; None for weighting `none`.

        Raises:
            DecomposeError: weight or statistics are not finite; with the target's name.
        """
        # First of all: parts are gathered in all processes or in none, whatever each of them holds.
        weights = [captured.whole_attribute(name) for name in target.weights]
        source, known = self.held.get(target.name, (None, None))
        if known is not None and source is statistics:
            return known
        with _naming(target):
            fresh = _decompose(captured, target, statistics, weights)
        with self.lock:
            self._hold(target.name, statistics, fresh)
        return fresh

    def factors(
        self, captured: CapturedGraph, target: CalibrationTarget, statistics: Statistics | None
    ) -> CalibrationFactors:
        """The factors of a calibration target at its rank.

        Args:
            captured: where the weights are.
            target: of a rank above 0.
            statistics: of the target; None for weighting `none`.

        Raises:
            DecomposeError: weight or statistics are not finite, or the rank is too large; with the
                target's name.
        """
        source, known = self.cuts.get(target.name, (None, None))
        alike = known is not None and source is statistics and known.rank == target.rank
        # Where parts of weights are gathered, no process may skip that.
        if known is not None and alike and not captured.shards:
            return known
        decomposition = self.of(captured, target, statistics)
        with _naming(target):
            factors = decomposition.at(target.rank)
        with self.lock:
            self.cuts.pop(target.name, None)
            held = sum(cut.nbytes for _, cut in self.cuts.values())
            if target.name not in self.held and held + factors.nbytes <= MOST_FACTOR_BYTES:
                self.cuts[target.name] = (statistics, factors)
        return factors

    def _hold(self, name: str, statistics: Statistics | None, fresh: Decomposition) -> None:
        self.count += 1
        if name in self.held:
            _, stale = self.held.pop(name)
            self.nbytes -= stale.nbytes()
        if self.nbytes + fresh.nbytes() <= MOST_BYTES:
            self.held[name] = (statistics, fresh)
            self.nbytes += fresh.nbytes()


def make_factors(
    captured: CapturedGraph,
    targets: Sequence[CalibrationTarget],
    statistics: Mapping[str, Statistics],
    decompositions: Decompositions,
    meter: Meter | None = None,
) -> dict[str, Factors]:
    """What calibration branches multiply by, by target name; a target without one gets none.

    Args:
        captured: where the weights are.
        targets: from `assign`.
        statistics: by target name; empty for weighting `none`.
        decompositions: what has been decomposed of this checkpoint before.
        meter: counts the targets.

    Raises:
        DecomposeError: weight or statistics are not finite, or a rank is too large; with the
            target's name.
    """
    corrected = [target for target in targets if target.corrects]

    def factors_of(target: CalibrationTarget) -> Factors:
        return _factors(captured, target, statistics.get(target.name), decompositions)

    if meter and len(corrected) < len(targets):
        meter.add(len(targets) - len(corrected))
    factors: dict[str, Factors] = {}
    with single_threads() as workers:
        # Parts of weights are gathered in one order in all processes.
        results = (map if captured.shards else workers.map)(factors_of, corrected)
        for target, result in zip(corrected, results, strict=True):
            factors[target.name] = result
            if meter:
                meter.add()
    return factors


@contextmanager
def single_threads() -> Iterator[ThreadPoolExecutor]:
    """As many workers as torch has threads, in which an operation takes one.

    An eigendecomposition gains little from a second thread, and next to a busy process its threads
    spin: two of 1,152 columns side by side take as long as one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as workers:
            yield workers
    finally:
        torch.set_num_threads(threads)


def _factors(
    captured: CapturedGraph,
    target: CalibrationTarget,
    statistics: Statistics | None,
    decompositions: Decompositions,
) -> Factors:
    if target.branch is BranchKind.INT8:
        _check_integers(target)
        with _naming(target):
            return quantise_weight(captured.attribute(target.weights[0]))
    if any(parameter.is_meta for parameter in captured.module.parameters()):
        return blank_factors(captured, target)
    factors = own_factors(decompositions.factors(captured, target, statistics), target)
    return factors.to(factors.up.to(captured.device))


def own_factors(factors: CalibrationFactors, target: CalibrationTarget) -> CalibrationFactors:
    """What a process multiplies by: all, or its part where the layer is split.

    A layer with own rows of W has those of B, one with own columns those of A: the sums of all
    processes are then B A (x - x*). No A x can be read off a part of y.
    """
    shard = target.shard
    if shard is None:
        return factors
    if shard.dim == COLUMNS:
        return replace(factors, down=shard.part(factors.down, 1), read=None)
    ups = [shard.part(up, 0) for up in torch.split(factors.up, list(target.out_features))]
    return replace(factors, up=torch.cat(ups), read=None)


def _check_integers(target: CalibrationTarget) -> None:
    """Refuse integers for a part of every sum: each part would have scales of its own."""
    if target.shard and target.shard.dim == COLUMNS:
        raise DecomposeError(
            target.name,
            expected="a layer with whole rows of W, for a calibration branch of int8",
            got=f"one split by columns over {target.shard.count} processes",
            fix="Leave it to branch='low_rank' with a SiteRule.",
        )


@contextmanager
def _naming(target: CalibrationTarget) -> Iterator[None]:
    """Errors say which calibration target they are about."""
    try:
        yield
    except DecomposeError as error:
        raise DecomposeError(
            f"{target.name}: {error.where}",
            expected=error.expected,
            got=error.got,
            fix=error.fix,
        ) from error


def blank_factors(captured: CapturedGraph, target: CalibrationTarget) -> CalibrationFactors:
    """Factors of the right shapes that hold nothing, for costs and for timing steps."""
    value = captured.node(target.nodes[0]).meta["val"]
    blank = torch.zeros(0, dtype=value.dtype, device=captured.device)
    inputs, outputs = target.own_features
    down = blank.new_zeros(target.rank, inputs)
    up = blank.new_zeros(outputs, target.rank)
    read = None if target.granularity is Granularity.BRANCH else up.T
    return CalibrationFactors(down, up, 0.0, read)


def _decompose(
    captured: CapturedGraph,
    target: CalibrationTarget,
    statistics: Statistics | None,
    weights: Sequence[Tensor],
) -> Decomposition:
    if target.granularity is Granularity.BRANCH:
        assert isinstance(statistics, SecondMoments)
        value = captured.node(target.nodes[0]).meta["val"]
        return decompose_branch(statistics, value.dtype)
    if isinstance(statistics, SecondMoments):
        return decompose_increments(weights, statistics)
    (weight,) = weights
    return decompose_weight(weight, statistics)
