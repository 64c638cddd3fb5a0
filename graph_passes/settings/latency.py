"""What steps cost in seconds on one runtime and machine: measured there, by group of branches."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from pydantic import TypeAdapter

from calicache.graph_passes.common.arguments import number, of_kind, path_of, whole_number
from calicache.graph_passes.common.disk.bounds import Count
from calicache.graph_passes.common.disk.documents import DocumentKind
from calicache.graph_passes.common.disk.files import Target, atomic_path
from calicache.graph_passes.common.errors import PlanError

EVERY = "*"  # the group of the row in which no branch is treated


class BranchChoice(StrEnum):
    """What a CALIBRATE step does with a whole residual branch.

    FULL computes it, LINEAR calibrates its layers at a rank, INT8 in integers, BRANCH calibrates
    it as one map, REUSE returns its anchor.
    """

    FULL = "full"
    LINEAR = "linear"
    INT8 = "int8"
    BRANCH = "branch"
    REUSE = "reuse"


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """Seconds of one call where the branches of one group, and no others, are not computed in full.

    Attributes:
        group: name pattern of the branches, such as `blocks.*.attn`, from `group_of`; `EVERY` in
            a row with FULL.
        choice: what a CALIBRATE step does with them.
        macs: multiply-accumulates of all their calibration branches in one call; 0 for REUSE.
        refresh: seconds of a REFRESH step, which writes their caches.
        step: seconds of a CALIBRATE step.
    """

    group: str
    choice: BranchChoice
    macs: Count
    refresh: float
    step: float


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Measured seconds of one call; a plan search adds them up over the groups.

    Attributes:
        weights_hash: of the checkpoint that was measured.
        runtime: what ran it, such as `ONNX Runtime 1.32.0, CPUExecutionProvider`.
        order: of the anchors; more kept refreshes take longer to read.
        plain: of a step of the plain model.
        forecast: of a FORECAST step.
        rows: for every group and choice one row, or several at different ranks; and one with
            FULL, of steps that calibrate nothing, for a model that has values of a run to keep.
        environment: machine and versions.

    Raises:
        PlanError: seconds that are not above 0 and finite, or another value of a wrong kind.
    """

    weights_hash: str
    runtime: str
    order: int
    plain: float
    forecast: float
    rows: tuple[LatencyRow, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows:
            of_kind("row", row, LatencyRow, PlanError)
        whole_number("order", self.order, PlanError, 0)
        seconds = [self.plain, self.forecast]
        seconds += [value for row in self.rows for value in (row.refresh, row.step)]
        wrong = [
            value for value in seconds if not 0 < number("seconds", value, PlanError) < math.inf
        ]
        if wrong:
            raise PlanError(
                "seconds", expected="above 0 and finite", got=str(wrong[0]), fix="Measure again."
            )

    @property
    def full_step(self) -> float:
        """Seconds of a CALIBRATE step that calibrates nothing; `step_change` is against it.

        It is below `plain` where text projections and the like are kept over a run.
        """
        return next((row.step for row in self.rows if row.choice is BranchChoice.FULL), self.plain)

    @property
    def full_refresh(self) -> float:
        """Seconds of a REFRESH step beside it; `refresh_change` is against it."""
        full = (row.refresh for row in self.rows if row.choice is BranchChoice.FULL)
        return next(full, self.plain)

    @property
    def least_step(self) -> float:
        """Seconds of a CALIBRATE step with every group treated in the fastest way measured."""
        gains: dict[str, float] = {}
        for row in self.rows:
            if row.choice is not BranchChoice.FULL:
                gain = row.step - self.full_step
                gains[row.group] = min(gain, gains.get(row.group, 0.0))
        return self.full_step + sum(gains.values())

    def step_shares(self, choice: BranchChoice) -> tuple[float, float] | None:
        """A CALIBRATE step with every group so treated, against a plain step.

        Groups that were not measured so are computed in full.

        Returns:
            At the ranks that take the least and the most time; None where no group was measured.
        """
        seconds: dict[str, list[float]] = {}
        for row in self.rows:
            if row.choice is choice:
                seconds.setdefault(row.group, []).append(row.step - self.full_step)
        if not seconds:
            return None
        least, most = (sum(map(pick, seconds.values())) for pick in (min, max))
        return (self.full_step + least) / self.plain, (self.full_step + most) / self.plain

    def step_change(self, group: str, choice: BranchChoice, macs: int) -> float | None:
        """Seconds that a CALIBRATE step gains (below 0) or loses with a group so treated.

        Args:
            group: pattern of the branches.
            choice: what is done with all of them.
            macs: of their calibration branches together; on the straight line through the
                smallest and the largest that were measured.

        Returns:
            The change against `full_step`; None where the group was not measured so.
        """
        return self._change(group, choice, macs, refresh=False)

    def refresh_change(self, group: str, choice: BranchChoice, macs: int) -> float | None:
        """Seconds that a REFRESH step loses by writing the caches for it; see `step_change`."""
        return self._change(group, choice, macs, refresh=True)

    def _change(
        self, group: str, choice: BranchChoice, macs: int, *, refresh: bool
    ) -> float | None:
        if choice is BranchChoice.FULL:
            return 0.0
        full = self.full_refresh if refresh else self.full_step
        points = sorted(
            (row.macs, (row.refresh if refresh else row.step) - full)
            for row in self.rows
            if row.group == group and row.choice is choice
        )
        if not points:
            return None
        (low, first), (high, last) = points[0], points[-1]
        if high == low:
            return first
        return first + (last - first) * (macs - low) / (high - low)

    def save(self, path: Path | str) -> None:
        """Write it as JSON.

        Raises:
            PlanError: something else than a latency table is there, or it cannot be written.
        """
        with atomic_path(path_of(path, PlanError), _TARGET) as temporary:
            temporary.write_text(_DOCUMENT.dumps(self))

    @staticmethod
    def load(path: Path | str) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            PlanError: the file is missing, damaged, of another version, or something else.
        """
        return _DOCUMENT.read(path_of(path, PlanError))


_DOCUMENT = DocumentKind(
    "latency table",
    2,
    TypeAdapter(LatencyTable),
    PlanError,
    "a latency table written by LatencyTable.save",
    "Measure it again.",
)


def _foreign(path: Path) -> str | None:
    return None if _DOCUMENT.head(path) else "something else"


_TARGET = Target("a latency table", PlanError, _foreign)


def group_of(branch: str) -> str:
    """The pattern of a branch's group: its name with `*` for every index.

    `blocks.3.attn` gives `blocks.*.attn`. A number that is part of a name stays: `attn1` and
    `attn2`, self-attention and attention to the text, take different times.
    """
    return re.sub(r"(?<![^.@])\d+(?![^.@])", "*", branch)
