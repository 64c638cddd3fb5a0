"""The difference of two plans or of two artifacts, as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, TypeVar

from pydantic import computed_field

from calicache.graph_passes.settings.choices import BranchKind, StepMode
from calicache.tools.inspect.facts import Mode, ScheduleFacts
from calicache.tools.inspect.layers import LayerFacts, LayerWork

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Change:
    """Something that is one thing in A and another in B.

    Attributes:
        name: of the setting, file or field.
        a: its values in words, empty where it has none; of a list, those that B lacks.
        b: the other way round.
    """

    name: str
    a: tuple[str, ...]
    b: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NumberChange:
    """A number that differs; None where there is none.

    Attributes:
        name: of what is counted.
        unit: `MACs`, `bytes`, `share` or `error`.
        a, b: the numbers.
    """

    name: str
    unit: str
    a: float | None
    b: float | None


@dataclass(frozen=True, slots=True)
class StepChange:
    """A step, from 0, that has another mode; None after the end of the shorter schedule."""

    step: int
    a: Mode | None
    b: Mode | None


@dataclass(frozen=True, slots=True)
class ScheduleDifference:
    """Both schedules, and the steps that differ."""

    a: ScheduleFacts
    b: ScheduleFacts
    steps: tuple[StepChange, ...]


@dataclass(frozen=True, slots=True)
class TargetState:
    """A calibration target on one side; a plan knows no energy, and not every rank."""

    rank: int | None
    energy: float | None
    branch: BranchKind = BranchKind.LOW_RANK


@dataclass(frozen=True, slots=True)
class TargetChange:
    """A calibration target that is on one side alone, or of another rank or energy."""

    name: str
    a: TargetState | None
    b: TargetState | None


@dataclass(frozen=True, slots=True)
class LayerChange:
    """A linear layer with which the steps of a mode do something else."""

    name: str
    mode: Mode
    a: LayerWork
    b: LayerWork


@dataclass(frozen=True, slots=True)
class Difference:
    """Everything that differs between A and B; empty where nothing does.

    Attributes:
        kind: of both.
        a, b: their paths, which do not count.
        belonging: weights, files, the version that wrote them.
        schedule: both, with the steps that differ.
        settings: of the plan, or what the manifest repeats of them.
        targets: calibration targets.
        layers: of artifacts, what the steps do with them.
        costs: MACs, shares of the plain model, cache bytes, errors.
        structure: of artifacts: layout, form of the call, caches, branches, rejections.
    """

    kind: Literal["plan", "artifact"]
    a: str
    b: str
    belonging: tuple[Change, ...]
    schedule: ScheduleDifference
    settings: tuple[Change, ...]
    targets: tuple[TargetChange, ...]
    layers: tuple[LayerChange, ...]
    costs: tuple[NumberChange, ...]
    structure: tuple[Change, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        changes = (self.belonging, self.schedule.steps, self.settings, self.targets)
        return not any((*changes, self.layers, self.costs, self.structure))


def diff_schedules(a: ScheduleFacts, b: ScheduleFacts) -> ScheduleDifference:
    """The steps that have another mode."""
    pairs: Iterator[tuple[StepMode | None, StepMode | None]] = zip_longest(a.modes, b.modes)
    steps = (StepChange(k, x, y) for k, (x, y) in enumerate(pairs) if x != y)
    return ScheduleDifference(a, b, tuple(steps))


def diff_states(
    a: Mapping[str, TargetState], b: Mapping[str, TargetState]
) -> tuple[TargetChange, ...]:
    """Calibration targets that are not the same on both sides."""
    return tuple(TargetChange(*change) for change in _differing(a, b))


def diff_numbers(
    unit: str, a: Mapping[str, float], b: Mapping[str, float]
) -> tuple[NumberChange, ...]:
    """Numbers that differ."""
    return tuple(NumberChange(name, unit, *values) for name, *values in _differing(a, b))


def _differing(a: Mapping[str, T], b: Mapping[str, T]) -> Iterator[tuple[str, T | None, T | None]]:
    """Names whose values are not the same on both sides, in A's order, then B's own."""
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) != b.get(name):
            yield name, a.get(name), b.get(name)


def diff_layers(a: Sequence[LayerFacts], b: Sequence[LayerFacts]) -> tuple[LayerChange, ...]:
    """Layers of both that are treated in another way in a mode of both."""
    others = {layer.name: layer.work for layer in b}
    return tuple(
        LayerChange(layer.name, StepMode[mode], work, others[layer.name][mode])
        for layer in a
        if layer.name in others
        for mode, work in layer.work.items()
        if others[layer.name].get(mode, work) != work
    )
