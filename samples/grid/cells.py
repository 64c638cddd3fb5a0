"""The cases of the grid: a trained model, a sampler with its steps, and a guidance scale."""

from __future__ import annotations

from dataclasses import dataclass

SAMPLERS = {
    "fashion": (("DDIM", 35), ("DPM-Solver++ 2M", 20), ("DPM-Solver++ 2M", 8)),
    "scenes": (("Euler", 20), ("DPM-Solver++ 2M, flow", 20), ("Euler", 8)),
}
SCALES = (1.0, 1.5, 4.0)
BUDGETS = (0.2, 0.35, 0.5, 0.7)  # of the full run's measured time


def file_name(text: str) -> str:
    """Words in small letters, joined by hyphens."""
    letters = (c if c.isalnum() or c == "." else " " for c in text.lower())
    return "-".join("".join(letters).split())


@dataclass(frozen=True, slots=True)
class Cell:
    """One case.

    Attributes:
        subject: the model, a key of `SAMPLERS`.
        sampler: a key of `schedulers.SCHEDULERS`.
        steps: of the full run.
        scale: of the guidance; 1 computes the conditional half alone.
    """

    subject: str
    sampler: str
    steps: int
    scale: float

    @property
    def key(self) -> str:
        """A file name."""
        return file_name(f"{self.subject} {self.sampler} {self.steps} {self.scale:g}")

    @property
    def title(self) -> str:
        """What a chart says above it."""
        return f"{self.sampler}, {self.steps} steps, guidance {self.scale:g}"


CELLS = tuple(
    Cell(subject, sampler, steps, scale)
    for subject, samplers in SAMPLERS.items()
    for sampler, steps in samplers
    for scale in SCALES
)
