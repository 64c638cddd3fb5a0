"""All that a running denoising changes, and which of its calls a new call goes on with.

Nothing tells a model which run a call belongs to, so the call itself does: it goes on with an
earlier one of its form, with the same values for the whole run, at a later timestep, whose latents
have moved no farther than in the recorded runs. Any other call begins anew, with a REFRESH.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from calicache.graph_passes.recording.binding import Binding
from calicache.graph_passes.recording.grid import relative_change
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.timestep import Timestep
from calicache.graph_passes.rewriting.compile import Compiled
from calicache.graph_passes.sampler.kept import Kept

WRITTEN = -1  # a version that no tensor has
MAX_GONE = 8
CLEARLY = 0.8  # two runs of one seed differ by less


@dataclass(frozen=True, slots=True)
class HeldInput:
    """A value that stays the same over a run, and how to tell that it has.

    Attributes:
        value: the caller's own tensor; a copy where it does not count its changes.
        version: how often it had been written to; None where it does not count.
    """

    value: Tensor
    version: int | None

    @staticmethod
    def of(value: Tensor) -> HeldInput:
        """A value as it is now."""
        if value.is_inference():
            return HeldInput(value.clone(), None)
        return HeldInput(value, value._version)

    def same(self, other: HeldInput) -> bool:
        """Whether another value is the same as this one was."""
        if self.value is other.value:
            return self.version == other.version
        return not self._written() and torch.equal(self.value, other.value)

    def _written(self) -> bool:
        return self.version is not None and self.value._version != self.version

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the tensor counts anew.
        return (
            (HeldInput, (self.value, WRITTEN)) if self._written() else (HeldInput.of, (self.value,))
        )


@dataclass(frozen=True, slots=True)
class Arrival:
    """What tells a call from others.

    Attributes:
        form: names, shapes and constants of its arguments.
        name: that the pipeline gave it, such as `cond`; None without one.
        timestep: None where nothing counts the steps.
        held: the arguments that stay the same over a run.
        latents: the arguments that change with the latent.
    """

    form: object
    name: str | None
    timestep: float | None
    held: Mapping[str, HeldInput]
    latents: Mapping[str, Tensor]

    @staticmethod
    def of(
        tensors: Mapping[str, Tensor],
        classes: Mapping[str, Dependence],
        timestep: Timestep | None,
        form: object,
        name: str | None,
    ) -> Arrival:
        """What tells a call from others.

        Raises:
            RunError: its rows are at different timesteps.
        """
        return Arrival(
            form,
            name,
            timestep.value(tensors) if timestep else None,
            {n: HeldInput.of(tensors[n]) for n, k in classes.items() if k <= Dependence.RUN},
            {n: tensors[n] for n, k in classes.items() if k is Dependence.LATENT},
        )

    def kept(self) -> Arrival:
        """The same with latents of its own: the sampler may write into the caller's."""
        return replace(self, latents={name: v.clone() for name, v in self.latents.items()})

    def beside(self, other: Arrival) -> bool:
        """Whether both are calls of one step: the same latents at one timestep, asked apart."""
        shapes = [{name: v.shape for name, v in a.latents.items()} for a in (self, other)]
        return (
            self.timestep == other.timestep
            and shapes[0] == shapes[1]
            and all(torch.equal(v, other.latents[name]) for name, v in self.latents.items())
        )


@dataclass(frozen=True, slots=True)
class CallState:
    """What one call of the steps leaves for the next one.

    Attributes:
        compiled: the graphs for its form.
        arrival: the newest call.
        place: of its step among the recorded ones; whole numbers are recorded steps.
        kept: values of the kept refreshes, newest first.
        refreshes: their places.
        start: place of the step that it began with.
    """

    compiled: Compiled
    arrival: Arrival
    place: float
    kept: Kept
    refreshes: tuple[float, ...]
    start: float


@dataclass(slots=True)
class RunState:
    """All that a running denoising changes.

    Attributes:
        calls: what each call of the steps has left, the one that ran last at the end.
        gone: what others had left whose place was needed, without the kept values.
        name: that the pipeline gives the calls now; None without one.
    """

    calls: list[CallState] = field(default_factory=list)
    gone: list[CallState] = field(default_factory=list)
    name: str | None = None

    def restart(self) -> None:
        """Forget the running denoising: the next call begins anew."""
        self.calls.clear()
        self.gone.clear()

    def before(self, arrival: Arrival, binding: Binding) -> tuple[CallState, float] | None:
        """What a call goes on with, and its place; None where it begins anew.

        Where it goes on with something that is gone, as calls of two runs in turn do, it begins
        anew.
        """
        options = sorted(_options(self.calls, arrival, binding), key=_nearness)
        gone = min(_options(self.gone, arrival, binding), key=_nearness, default=None)
        if gone and (not options or gone.change < CLEARLY * options[0].change):
            return None
        return (options[0].state, options[0].place) if options else None

    def make_room(self, arrival: Arrival, calls: int) -> None:
        """Let go of what a call that begins anew takes the place of.

        Args:
            arrival: the call.
            calls: of the model in a step, as recorded; more where a step is seen to have more.
        """
        beside = sum(state.arrival.beside(arrival) for state in self.calls)
        leaving = max(len(self.calls) - max(calls, beside + 1) + 1, 0)
        gone = [replace(state, kept=()) for state in self.calls[:leaving]]
        self.gone = [*self.gone, *gone][-MAX_GONE:]
        del self.calls[:leaving]

    def keep(self, before: CallState | None, state: CallState) -> None:
        """Put what a call has left in the place of what it went on with."""
        self.calls = [call for call in self.calls if call is not before]
        self.calls.append(state)


@dataclass(frozen=True, slots=True)
class _Option:
    """Something that a call may go on with: its place then, and how far its latents moved."""

    state: CallState
    place: float
    change: float


def _nearness(option: _Option) -> tuple[float, float]:
    # Of two alike the first one, which has waited longest: calls of a step keep their order.
    return option.place - option.state.place, option.change


def _options(states: Sequence[CallState], arrival: Arrival, binding: Binding) -> Iterator[_Option]:
    grid, timestep = binding.grid, binding.timestep
    for state in states:
        last = state.arrival
        if timestep and timestep.turns_back(last.timestep or 0.0, arrival.timestep or 0.0):
            continue
        place = grid.following(state.place, last.timestep, arrival.timestep)
        if place is None or not _may_follow(last, arrival):
            continue
        change = relative_change(last.latents, arrival.latents)
        if change <= grid.reach(state.place, place):
            yield _Option(state, place, change)


def _may_follow(last: Arrival, arrival: Arrival) -> bool:
    same = (last.form, last.name) == (arrival.form, arrival.name)
    return same and all(last.held[name].same(value) for name, value in arrival.held.items())


def start_place(arrival: Arrival, binding: Binding) -> float:
    """Place of a call that begins anew."""
    counted = arrival.timestep is None or not binding.grid.timesteps
    return 0.0 if counted else binding.grid.place(arrival.timestep or 0.0)
