"""The input that counts a denoising down, and what it says about runs and steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise

from torch import Tensor

from calicache.graph_passes.common.disk.bounds import Calls
from calicache.graph_passes.common.errors import RunError

Call = Mapping[str, Tensor]
Run = Sequence[Call]


@dataclass(frozen=True, slots=True)
class Timestep:
    """Which input counts the denoising down, and which way.

    Attributes:
        name: the input, such as `timestep`.
        descends: True where it falls from step to step, as in DDIM.
        repeats: True where it stayed the same from one recorded call to the next.
        calls: of the model in a step; 2 for guidance by a conditional and an unconditional call.
    """

    name: str
    descends: bool
    repeats: bool = field(default=False, compare=False)
    calls: Calls = 1

    def value(self, tensors: Call) -> float:
        """The timestep of a call; of all its rows, where every row has one.

        Raises:
            RunError: rows at different timesteps.
        """
        values = set(tensors[self.name].flatten().tolist())
        if len(values) != 1:
            raise RunError(
                f"argument {self.name}",
                expected="one timestep in a call",
                got=f"{len(values)} different ones",
                fix="Call the model once for every timestep, each run inside its own start_run().",
            )
        return float(values.pop())

    def turns_back(self, before: float, now: float) -> bool:
        """Whether a new run starts between two values."""
        if now == before:
            return not self.repeats
        return now > before if self.descends else now < before


def calls_of(timestep: Timestep | None) -> int:
    """Calls of the model in a step; one where nothing counts the steps."""
    return timestep.calls if timestep else 1


def find_timestep(
    names: Sequence[str], calls: Sequence[Call], ends: Collection[int]
) -> Timestep | None:
    """The input that is one number in every call and moves most often one way; None without one.

    A timestep moves one way within a run. A class label that alternates between the calls of a
    step changes more often, and as often up as down; where ends of runs are known, what always
    moves one way comes first, before labels such as 0, 1, 2 of three calls.

    Args:
        names: of the tensors of every call.
        calls: oldest first.
        ends: numbers of calls after which a run is known to have ended.
    """
    best: Timestep | None = None
    most = (False, 0, 0)
    for name in names:
        values = [one_number(call[name]) for call in calls]
        if None in values:
            continue
        pairs = [p for number, p in enumerate(pairwise(values), start=1) if number not in ends]
        changes = [b - a for a, b in pairs if a != b]  # type: ignore[operator]
        falls = sum(change < 0 for change in changes)
        one_way = abs(2 * falls - len(changes))
        always = bool(ends) and one_way == len(changes)
        if changes and (best is None or (always, one_way, -len(changes)) > most):
            most = always, one_way, -len(changes)
            best = Timestep(name, 2 * falls >= len(changes), repeats=len(changes) < len(pairs))
    if best is None:
        return None
    return replace(best, calls=_calls_per_step(best.name, cut_runs(best, calls, ends)))


def cut_runs(
    timestep: Timestep | None, calls: Sequence[Call], ends: Collection[int]
) -> list[list[Call]]:
    """The calls, cut where the timestep turns back and where a run is known to have ended."""
    runs: list[list[Call]] = [[]]
    before: float | None = None
    for number, call in enumerate(calls):
        now = None if timestep is None else timestep.value(call)
        ended = number in ends
        if timestep is not None and before is not None and now is not None:
            ended |= timestep.turns_back(before, now)
        if ended:
            runs.append([])
        runs[-1].append(call)
        before = now
    return runs


def one_number(value: Tensor) -> float | None:
    """The number that all elements are; None where they differ."""
    if value.numel() == 0 or value.is_complex():
        return None
    first = value.flatten()[0]
    return float(first) if bool((value == first).all()) else None


def _calls_per_step(name: str, runs: Sequence[Run]) -> int:
    """How many calls in a row have one timestep, throughout; 1 where that varies."""
    lengths: list[int] = []
    for run in runs:
        values = (float(call[name].flatten()[0]) for call in run)
        lengths.extend(len(list(group)) for _, group in groupby(values))
    least = min(lengths)
    return least if all(length % least == 0 for length in lengths) else 1
