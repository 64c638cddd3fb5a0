"""What a CALIBRATE step does with every branch, and at which ranks, under a cost.

The additive model: the error of a step's output is the sum over targets of sensitivity times the
energy that the target's map leaves out, and every further rank removes a known part of it at a
known cost. For one price of an error unit every branch then chooses by itself (water-filling);
the price is raised until the step costs what it may.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from calicache.graph_passes.settings.choices import BranchKind, Granularity, SiteMode, SiteRule
from calicache.graph_passes.settings.latency import BranchChoice
from calicache.graph_passes.sites.targets import CalibrationTarget

MULTIPLE = 8  # of ranks: what GEMM kernels are written for
BISECTIONS = 60
ROUNDING = 1e-7  # of the energy: less in one direction may be the rounding of float32 moments


@dataclass(frozen=True, slots=True)
class RankCurve:
    """What every rank of one target leaves out.

    Attributes:
        target: at any rank.
        errors: by rank 0, 8, 16, ...: sensitivity times the energy that is left out, (R,).
    """

    target: CalibrationTarget
    errors: tuple[float, ...]

    @staticmethod
    def of(
        target: CalibrationTarget, spectrum: Tensor, sensitivity: float, unexplained: float = 0.0
    ) -> RankCurve:
        """From the energies of all directions, largest first, and what no rank can explain."""
        most = min(len(spectrum), target.in_features, sum(target.out_features))
        energies = spectrum.double()
        energies = energies.where(energies > ROUNDING * energies.sum(), 0.0)
        total = energies.sum()
        tails = [float(total), *(total - energies.cumsum(0)).clamp(min=0.0).tolist()]
        left = [tails[rank] + unexplained for rank in range(0, most + 1, MULTIPLE)]
        return RankCurve(target, tuple(sensitivity * energy for energy in left))

    @property
    def macs_per_place(self) -> int:
        """Of one more entry of `errors`."""
        target = self.target
        return MULTIPLE * target.tokens * (target.in_features + sum(target.out_features))

    def cheapest(self, price: float, per_mac: float) -> int:
        """The place with the least error + price * cost."""
        cost = price * per_mac * self.macs_per_place
        return min(range(len(self.errors)), key=lambda place: self.errors[place] + cost * place)


@dataclass(frozen=True, slots=True)
class BranchOption:
    """One way to treat a branch.

    Attributes:
        choice: FULL, LINEAR, INT8, BRANCH or REUSE.
        cost: change of the step's cost against computing it in full, at rank 0.
        per_mac: cost of one multiply-accumulate of a calibration branch.
        curves: of its targets; none for FULL and INT8.
        patterns: of the branch, or of the sites that FULL leaves alone.
    """

    choice: BranchChoice
    cost: float
    per_mac: float = 0.0
    curves: tuple[RankCurve, ...] = ()
    patterns: tuple[str, ...] = ()

    def at(self, price: float) -> tuple[float, float, tuple[int, ...]]:
        """Error, cost, and the place on every curve, at a price of cost in units of error."""
        places = tuple(
            0 if self.choice is BranchChoice.REUSE else curve.cheapest(price, self.per_mac)
            for curve in self.curves
        )
        pairs = list(zip(self.curves, places, strict=True))
        error = sum(curve.errors[place] for curve, place in pairs)
        macs = sum(curve.macs_per_place * place for curve, place in pairs)
        return error, self.cost + self.per_mac * macs, places


@dataclass(frozen=True, slots=True)
class Allocation:
    """What every CALIBRATE step does.

    Attributes:
        rules: one for every branch that is not calibrated layer by layer.
        ranks: by target name.
        choices: by branch.
        cost: of a CALIBRATE step in the options' unit, the full step being 1.
        error: of its output, by the additive model: |e^ - e|^2.
    """

    rules: tuple[SiteRule, ...]
    ranks: Mapping[str, int]
    choices: Mapping[str, BranchChoice]
    cost: float
    error: float


def allocate(
    options: Mapping[str, Sequence[BranchOption]], target: float, full: float = 1.0
) -> Allocation:
    """The least error for the cost of a CALIBRATE step.

    Args:
        options: by branch; the first is FULL.
        target: share of a full step that it may cost. Where even the cheapest choices cost
            more, they are taken.
        full: cost of a CALIBRATE step that computes every branch in full.

    Returns:
        An allocation that costs at most the target, if there is one.
    """
    low, high = 1e-12, 1e12
    for _ in range(BISECTIONS):
        price = (low * high) ** 0.5
        if _at(options, price, full).cost > target:
            low = price
        else:
            high = price
    return _at(options, high, full)


def _at(options: Mapping[str, Sequence[BranchOption]], price: float, full: float) -> Allocation:
    rules: list[SiteRule] = []
    ranks: dict[str, int] = {}
    choices: dict[str, BranchChoice] = {}
    cost, error = full, 0.0
    for name, of_branch in options.items():
        entries = [(option, *option.at(price)) for option in of_branch]
        best, off, change, places = min(entries, key=lambda entry: entry[1] + price * entry[2])
        cost, error, choices[name] = cost + change, error + off, best.choice
        rules.extend(_rules(best))
        if best.choice in (BranchChoice.LINEAR, BranchChoice.BRANCH):
            for curve, place in zip(best.curves, places, strict=True):
                ranks[curve.target.name] = MULTIPLE * place
    return Allocation(tuple(rules), ranks, choices, cost, error)


def _rules(option: BranchOption) -> Iterator[SiteRule]:
    for pattern in option.patterns:
        if option.choice is BranchChoice.REUSE:
            yield SiteRule(pattern, SiteMode.REUSE)
        elif option.choice is BranchChoice.BRANCH:
            yield SiteRule(pattern, SiteMode.CALIBRATE, granularity=Granularity.BRANCH)
        elif option.choice is BranchChoice.INT8:
            yield SiteRule(pattern, SiteMode.CALIBRATE, branch=BranchKind.INT8)
        elif option.choice is BranchChoice.FULL:
            yield SiteRule(pattern, SiteMode.FULL)
