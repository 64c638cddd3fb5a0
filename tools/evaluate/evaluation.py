"""The figures of an evaluation, with intervals, and how they are written and printed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Group, RenderableType

from calicache.graph_passes.common.disk.documents import DocumentKind
from calicache.graph_passes.common.disk.files import Target, atomic_path
from calicache.graph_passes.common.errors import EvaluateError
from calicache.graph_passes.settings.student import student_quantile
from calicache.tools.evaluate.shards import SampleSettings
from calicache.tools.terminal.text import fact_grid, plain_table

CONFIDENCE = 0.95
FIGURES = {
    "fid_full": "FID, full model",
    "fid_plan": "FID, plan",
    "fid_difference": "FID, plan - full",
    "fid_between": "FID of plan against full",
    "is_full": "IS, full model",
    "is_plan": "IS, plan",
    "is_difference": "IS, plan - full",
    "psnr": "PSNR of plan against full, dB",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure over all images, and what it is known to.

    Attributes:
        value: over all images.
        low, high: ends of the 95 % interval, Student's t around the value; None for one shard.
        error: the standard error by the jackknife that leaves out one shard at a time.
    """

    value: float
    low: float | None
    high: float | None
    error: float | None

    @staticmethod
    def of(value: float, left_out: Sequence[float]) -> Figure:
        """A figure.

        Args:
            value: over all images.
            left_out: the same without each shard in turn.
        """
        count = len(left_out)
        if count < 2 or not all(map(math.isfinite, left_out)):
            return Figure(value, None, None, None)
        error = math.sqrt((count - 1) * statistics.pvariance(left_out))
        reach = error * student_quantile((1 + CONFIDENCE) / 2, count - 1)
        return Figure(value, value - reach, value + reach, error)


@dataclass(frozen=True, slots=True)
class Reference:
    """The real images: how many, and the SHA-256 of their file."""

    images: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `calicache evaluate` measured.

    Attributes:
        name: of the model.
        samples: images of the full model, and as many under the plan; seeds 0 .. samples - 1.
        shard: images of a shard.
        settings: that the images under the plan were sampled with.
        networks: hash of the weights of each scoring network.
        reference: real images that FID is against; None without.
        equal_images: that the plan gives as the full model does, to the last bit of uint8; PSNR is
            the mean over the others.
        figures: by their names.
        environment: machine and versions that they were computed on.
    """

    name: str
    samples: int
    shard: int
    settings: SampleSettings
    networks: Mapping[str, str]
    reference: Reference | None
    equal_images: int
    figures: Mapping[str, Figure]
    environment: Mapping[str, Mapping[str, str | int]]

    def save(self, path: Path) -> None:
        """Write it as JSON.

        Raises:
            EvaluateError: something else is there, or it cannot be written.
        """
        with atomic_path(path, _TARGET) as file:
            file.write_text(EVALUATION.dumps(self))


EVALUATION = DocumentKind(
    "evaluation",
    1,
    TypeAdapter(Evaluation),
    EvaluateError,
    "a file written by calicache evaluate",
    "Evaluate again: images that are there are not sampled again.",
)
_TARGET = Target(
    "an evaluation", EvaluateError, lambda path: None if EVALUATION.head(path) else "something else"
)


def describe_evaluation(evaluation: Evaluation) -> RenderableType:
    """The figures as a table, and what they are of."""
    rows = [
        (FIGURES[name], f"{figure.value:.4f}", _interval(figure))
        for name, figure in evaluation.figures.items()
    ]
    real = evaluation.reference
    return Group(
        fact_grid(
            [
                ("model", evaluation.name),
                ("images", f"{evaluation.samples} of each run, in shards of {evaluation.shard}"),
                ("reference", f"{real.images} images" if real else "none: no FID against it"),
                ("equal", f"{evaluation.equal_images} images are the same in both runs"),
            ]
        ),
        plain_table(["figure"], ["value", "95 % interval"], rows),
    )


def _interval(figure: Figure) -> str:
    known = figure.low is not None and figure.high is not None
    return f"{figure.low:.4f} .. {figure.high:.4f}" if known else "unknown"
