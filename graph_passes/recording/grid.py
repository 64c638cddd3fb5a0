"""The recorded timesteps, and how far the latents move between them: what the next step looks like.

A place is where a timestep lies among the recorded ones: 3.0 is that of the fourth step, 3.5 is
halfway to the fifth. Below 0 and above the last step it goes on at the pace of the nearest two.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, inf, log

import torch
from torch import Tensor

from calicache.graph_passes.common.disk.bounds import Number
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.timestep import Call, Run

ROUNDING = 1e-6  # of the largest timestep, which float32 holds to 6e-8
SLACK = 5.0  # other prompts, guidance and forecasts move latents at other paces
STILL = 0.05  # nobody's latents stand still to less than this
MAX_CHANGE = 1e6
FAR = 1.2  # two draws of noise are sqrt(2) apart


@dataclass(frozen=True, slots=True)
class Grid:
    """Steps of the recorded runs.

    Attributes:
        timesteps: of every step of the longest run; empty where nothing counts the steps, and for
            a plan that was given another number of them: steps are then counted.
        changes: by step, the largest relative L2 change of the latents since the step before;
            0 for the first.

    Raises:
        PlanError: the timesteps do not go one way, or numbers are missing.
    """

    timesteps: tuple[Number, ...]
    changes: tuple[Number, ...]

    def __post_init__(self) -> None:
        ways = [self._along(b) - self._along(a) for a, b in pairwise(self.timesteps)]
        lengths = {len(self.changes)} | ({len(self.timesteps)} if self.timesteps else set())
        if len(lengths) > 1 or not self.changes or any(way < 0 for way in ways):
            raise PlanError(
                "grid",
                expected="timesteps that go one way, and a change for each",
                got=f"{len(self.timesteps)} timesteps, {len(self.changes)} changes",
                fix="Make the plan again from the recording.",
            )

    @property
    def steps(self) -> int:
        """Steps of the longest recorded run."""
        return len(self.changes)

    def holds(self, timesteps: Sequence[float]) -> bool:
        """Whether these were recorded one after another, up to rounding."""
        near, count = self._rounding(), len(timesteps)
        if not self.timesteps:
            return count <= self.steps
        return any(
            all(abs(a - b) <= near for a, b in zip(self.timesteps[first:], timesteps, strict=False))
            for first in range(self.steps - count + 1)
        )

    def ends_with(self, timesteps: Sequence[float]) -> bool:
        """Whether the recorded runs ended with these, up to rounding."""
        near, last = self._rounding(), self.timesteps[-len(timesteps) :]
        alike = (abs(a - b) <= near for a, b in zip(last, timesteps, strict=False))
        return len(last) == len(timesteps) and all(alike)

    def spans(self, timestep: float) -> bool:
        """Whether a timestep lies between the first recorded one and the last."""
        times = self.timesteps
        return not times or min(times) <= timestep <= max(times)

    def place(self, timestep: float) -> float:
        """Where a timestep lies; a whole number, up to rounding, where it was recorded."""
        times = self.timesteps
        near = self._rounding()
        known = next((k for k, value in enumerate(times) if abs(value - timestep) <= near), None)
        if known is not None or self._along(times[-1]) == self._along(times[0]):
            return float(known or 0)
        now = self._along(timestep)
        line = [self._along(value) for value in times]
        after = bisect_left(line, now)
        if after == 0:
            after = next(k for k in range(1, len(line)) if line[k] > line[0])
        elif after == len(line):
            after = next(k for k in reversed(range(1, len(line))) if line[k] > line[k - 1])
        before = after - 1
        return before + (now - line[before]) / (line[after] - line[before])

    def following(
        self, place: float, before: float | None, now: float | None, ahead: int = 1
    ) -> float | None:
        """Place of a call that may follow one at `place`; None where it cannot.

        Args:
            place: of the call before.
            before: its timestep; None where nothing counts the steps.
            now: timestep of the call.
            ahead: steps between both, which count where no timesteps do.
        """
        if not self.timesteps or before is None or now is None:
            return place + ahead if place + ahead < self.steps else None
        after = int(place) + 1
        repeats = place == int(place) and 0 < after < self.steps
        if repeats and abs(self.timesteps[after] - now) <= self._rounding():
            return float(after)
        if self._along(now) - self._along(before) <= self._rounding():
            return None
        return self.place(now)

    def reach(self, before: float, place: float) -> float:
        """How far latents may have moved between two places, relative to where they were.

        Farther than in any recorded run by `SLACK` is another run: another image, other noise.
        Where the recorded steps are long themselves, that cannot be told.
        """
        change = self._change(before, place)
        return inf if change >= FAR else min(max(SLACK * change, STILL), FAR)

    def counted(self, steps: int) -> Grid:
        """The grid of a sampler with another number of steps: which timesteps, is not known."""
        pace = (self.steps - 1) / max(steps - 1, 1)
        changes = (self._change((step - 1) * pace, step * pace) for step in range(1, steps))
        return Grid((), (0.0, *changes))

    def _change(self, before: float, place: float) -> float:
        """How far latents moved between two places, in steps of even pace between the recorded."""
        last = self.steps - 1
        change = 0.0
        for step in range(floor(before) + 1, ceil(place) + 1):
            share = min(place, step) - max(before, step - 1)
            change += share * self.changes[min(max(step, min(1, last)), last)]
        return change

    def _along(self, timestep: float) -> float:
        """The timestep counted so that it rises along a run."""
        return -timestep if self.timesteps[0] > self.timesteps[-1] else timestep

    def _rounding(self) -> float:
        return ROUNDING * max(map(abs, self.timesteps), default=0.0)


def best_grid(grids: Sequence[Grid], timesteps: Sequence[float]) -> tuple[int, bool]:
    """Which grid a run is on.

    Args:
        grids: that may be it.
        timesteps: of the run, one after another; the first ones are enough.

    Returns:
        The first one that holds them, or else the one whose steps are nearest to these in length;
        and whether one more timestep may show that another one is it.
    """
    holding = [number for number, grid in enumerate(grids) if grid.holds(timesteps)]
    if holding:
        return holding[0], len(holding) > 1
    lengths = [_unlikeness(grid, timesteps) for grid in grids]
    return lengths.index(min(lengths)), len(timesteps) == 1 < len(grids)


def whole_grid(grids: Sequence[Grid], timesteps: Sequence[float]) -> tuple[int, bool]:
    """Which grid a run is on whose timesteps are all known, and whether it holds them.

    A run that begins mid-way has the last timesteps of its grid.
    """
    ending = next((n for n, grid in enumerate(grids) if grid.ends_with(timesteps)), None)
    number = best_grid(grids, timesteps)[0] if ending is None else ending
    return number, grids[number].holds(timesteps)


def _unlikeness(grid: Grid, timesteps: Sequence[float]) -> float:
    """How much longer or shorter steps are than those of a grid in the same stretch."""
    if len(timesteps) == 1 or not grid.timesteps:
        return 0.0
    places = grid.place(timesteps[-1]) - grid.place(timesteps[0])
    return abs(log(places / (len(timesteps) - 1))) if places > 0 else inf


def grid_of(recording: Recording) -> Grid:
    """The grid of a recording: timesteps of its longest run, changes over all runs."""
    timestep, longest = recording.timestep, max(recording.runs, key=len)
    latents = [name for name, kind in recording.dependence.items() if kind is Dependence.LATENT]
    changes = [0.0] * len(longest)
    for run in recording.runs:
        for step in range(1, len(run)):
            changes[step] = max(changes[step], _run_change(run, step, latents))
    return Grid(
        timesteps=tuple(timestep.value(call) for call in longest) if timestep else (),
        changes=tuple(changes),
    )


def _run_change(run: Run, step: int, names: Sequence[str]) -> float:
    before, now = run[step - 1], run[step]
    return relative_change(
        {name: before[name] for name in names}, {name: now[name] for name in names}
    )


def relative_change(before: Call, now: Call) -> float:
    """||now - before|| / ||before|| over all tensors; at most `MAX_CHANGE`."""
    moved = sum(_square(_real(now[name]) - _real(value)) for name, value in before.items())
    size = sum(_square(_real(value)) for value in before.values())
    ratio = torch.as_tensor(moved) / torch.as_tensor(size)
    return min(float(ratio.nan_to_num(0.0).sqrt()), MAX_CHANGE)


def _real(value: Tensor) -> Tensor:
    return (torch.view_as_real(value) if value.is_complex() else value).float()


def _square(value: Tensor) -> Tensor:
    return value.square().sum()
