"""What a plan can choose: modes of steps and sites, weightings, granularities, rules."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TypeVar

from calicache.graph_passes.common.arguments import of_kind, whole_number
from calicache.graph_passes.common.errors import PlanError


class StepMode(IntEnum):
    """What a step of the sampler does.

    REFRESH computes everything and overwrites the caches. CALIBRATE corrects the anchors of
    linear layers, or of whole residual branches, with calibration branches. REUSE returns the
    anchors of whole residual branches. FORECAST returns a sum of kept outputs: nothing inside
    runs. REFRESH and CALIBRATE steps keep theirs.
    """

    REFRESH = 0
    CALIBRATE = 1
    REUSE = 2
    FORECAST = 3

    @property
    def keeps_output(self) -> bool:
        """Whether later steps may read the output of such a step."""
        return self in (StepMode.REFRESH, StepMode.CALIBRATE)

    @staticmethod
    def of(mode: StepMode | str) -> StepMode:
        """A mode by its name in any case, or by its letter: R, C, U (REUSE), F.

        Raises:
            PlanError: there is no such mode.
        """
        if isinstance(mode, StepMode):
            return mode
        names = dict(StepMode.__members__)
        names |= {letter: value for value, letter in STEP_LETTERS.items()}
        if not isinstance(mode, str) or mode.upper() not in names:
            raise PlanError(
                "step mode",
                expected=" | ".join(names),
                got=repr(mode),
                fix="Choose one of these.",
            )
        return names[mode.upper()]


STEP_LETTERS = {
    StepMode.REFRESH: "R",
    StepMode.CALIBRATE: "C",
    StepMode.REUSE: "U",
    StepMode.FORECAST: "F",
}

Member = TypeVar("Member", bound=StrEnum)


def member(kind: type[Member], value: Member | str) -> Member:
    """A member of an enumeration by its value.

    Raises:
        PlanError: there is none of that value.
    """
    try:
        return kind(value)
    except ValueError:
        raise PlanError(
            kind.__name__.lower(),
            expected=" | ".join(kind),
            got=repr(value),
            fix="Choose one of these.",
        ) from None


class Granularity(StrEnum):
    """Where a calibration branch sits: at a linear layer, or at a whole residual branch."""

    LINEAR = "linear"
    BRANCH = "branch"


class SiteMode(StrEnum):
    """What a CALIBRATE step does with one site: correct its anchor, return it, or compute all."""

    CALIBRATE = "calibrate"
    REUSE = "reuse"
    FULL = "full"


class BranchKind(StrEnum):
    """What a calibration branch maps the increment of x by.

    LOW_RANK is the paper's: B A, of few directions, in floating point. INT8 is ours: all of W, in
    integers. It sits at linear layers alone, and needs no statistics and no rank.
    """

    LOW_RANK = "low_rank"
    INT8 = "int8"


@dataclass(frozen=True, slots=True)
class SiteRule:
    """What to do with the sites that a shell pattern names; the first rule that fits counts.

    A pattern that names a residual branch acts on it as a whole: REUSE returns its anchor,
    FULL leaves all of it alone, CALIBRATE follows the granularity; at `linear` its rank is that
    of the layers inside. Where a branch is taken as a whole, rules for its layers have no effect.

    Attributes:
        pattern: over site and branch names, such as `blocks.*.attn`.
        mode: what a CALIBRATE step does there.
        rank: r for CALIBRATE; the plan's where None.
        granularity: for CALIBRATE; the plan's where None.
        branch: kind of the calibration branches, for CALIBRATE; the plan's where None.

    Raises:
        PlanError: a value of another kind, or INT8 for whole residual branches.
    """

    pattern: str
    mode: SiteMode
    rank: int | None = None
    granularity: Granularity | None = None
    branch: BranchKind | None = None

    def __post_init__(self) -> None:
        of_kind("pattern", self.pattern, str, PlanError)
        # Strings are taken for the enumerations' members; frozen fields are set in this way alone.
        object.__setattr__(self, "mode", member(SiteMode, self.mode))
        if self.granularity is not None:
            object.__setattr__(self, "granularity", member(Granularity, self.granularity))
        if self.branch is not None:
            object.__setattr__(self, "branch", member(BranchKind, self.branch))
        check_branch(self.branch, self.granularity)
        if self.rank is not None:
            object.__setattr__(self, "rank", whole_number("rank", self.rank, PlanError, 0))


def check_branch(branch: BranchKind | None, granularity: Granularity | None) -> None:
    """Refuse a kind of calibration branch at a place that it cannot have.

    Raises:
        PlanError: INT8 at whole residual branches, which have no weight of their own.
    """
    if branch is BranchKind.INT8 and granularity is Granularity.BRANCH:
        raise PlanError(
            "branch",
            expected="low_rank where whole residual branches are calibrated",
            got="int8, which needs the weight of a linear layer",
            fix="Choose granularity='linear', or branch='low_rank'.",
        )


class Weighting(StrEnum):
    """What is decomposed, from the plainest to the best.

    NONE is the paper's SVD, ACTIVATION its CA-SVD, INCREMENT its CD-SVD. COVARIANCE is the
    least-squares optimum over the increments against the plan's own anchors, see covariance.py.
    """

    NONE = "none"
    ACTIVATION = "activation"
    INCREMENT = "increment"
    COVARIANCE = "covariance"
