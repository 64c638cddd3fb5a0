"""Every error calicache raises on purpose: stage, place, what was expected, how to mend it."""

from __future__ import annotations

from functools import partial
from typing import ClassVar


class CalicacheError(Exception):
    """Base of all of them.

    Args:
        where: the node, field, file or argument that is wrong.
        expected: what would have been right.
        got: what was there.
        fix: what the user can do.
    """

    stage: ClassVar[str] = "calicache"

    def __init__(self, where: str, *, expected: str, got: str, fix: str) -> None:
        self.where, self.expected, self.got, self.fix = where, expected, got, fix
        super().__init__(f"{self.stage}: {where}: expected {expected}, got {got}. {fix}")

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are pickled by their message alone; this one is made from its parts.
        make = partial(type(self), expected=self.expected, got=self.got, fix=self.fix)
        return make, (self.where,)


class CalicacheWarning(UserWarning):
    """Something is served in another way than it was planned, and rightly."""


def reason_of(error: BaseException) -> str:
    """The kind of an error from elsewhere and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


class FileError(CalicacheError):
    """A file cannot be written."""

    stage = "file"


class RankError(CalicacheError):
    """The processes that share a piece of work do not go on together."""

    stage = "distributed"


class RecordError(CalicacheError):
    """A call of the model cannot be recorded, or a recording cannot be read."""

    stage = "record"


class CaptureError(CalicacheError):
    """The model cannot be captured as a functional graph."""

    stage = "capture"


class DependenceError(CalicacheError):
    """The recorded inputs do not tell what changes over the steps."""

    stage = "dependence"


class NoSampler(CalicacheError):  # noqa: N818 - named for what is missing
    """The sampler's update cannot be told from recorded runs.

    Args:
        reason: why not.
    """

    stage = "sampler"

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            "recording",
            expected="a sampler whose latents are fixed weighted sums of what came before",
            got=reason,
            fix="Record whole runs of such a sampler (DDIM without clip_sample, Euler, flow "
            "matching, DPM-Solver++ 2M).",
        )

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.reason,)


class SiteError(CalicacheError):
    """The graph has nothing to calibrate."""

    stage = "sites"


class ObserveError(CalicacheError):
    """Statistics cannot be collected, or are not finite."""

    stage = "observe"


class DecomposeError(CalicacheError):
    """Calibration factors cannot be made."""

    stage = "decompose"


class PlanError(CalicacheError):
    """A plan is inconsistent, damaged, or made for something else."""

    stage = "plan"


class VerifyError(CalicacheError):
    """A stage broke an invariant of the graph: a defect of calicache itself."""

    stage = "verify"


class RunError(CalicacheError):
    """An optimised model was called in a way that its plan does not cover."""

    stage = "run"


class ExportError(CalicacheError):
    """The optimised model cannot be exported as asked."""

    stage = "export"


class ArtifactError(CalicacheError):
    """An artifact directory is missing, damaged or of another version."""

    stage = "artifact"


class ModelError(CalicacheError):
    """The model that a command was given cannot be loaded."""

    stage = "model"


class BenchError(CalicacheError):
    """A measurement cannot be made as asked."""

    stage = "bench"


class SubjectError(CalicacheError):
    """What a tool was pointed at is none of the things that it can look at."""

    stage = "subject"


class CompareError(CalicacheError):
    """A recording and an artifact cannot be run side by side."""

    stage = "compare"


class EvaluateError(CalicacheError):
    """Images cannot be sampled or scored as asked, or a shard of them is another one."""

    stage = "evaluate"


class LibraryError(CalicacheError):
    """A library that only some commands need is not installed."""

    stage = "library"
