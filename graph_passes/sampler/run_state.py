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
from calicache.graph_passes.recording.grid import Grid, relative_change
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.signature import FlatCall
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
class CallContext:
    """What a pipeline says of its next calls.

    Attributes:
        name: such as `cond`; None without one.
        index: of the step, from 0; None where it is not said.
        sigma: of the noise that is left; None where it is not said.
    """

    name: str | None = None
    index: int | None = None
    sigma: float | None = None

    def may_follow(self, last: CallContext) -> bool:
        """Whether a call with this context may go on with one that had another."""
        back = None not in (self.index, last.index) and (self.index or 0) <= (last.index or 0)
        noisier = None not in (self.sigma, last.sigma) and (self.sigma or 0) > (last.sigma or 0)
        return self.name == last.name and not back and not noisier


SILENT = CallContext()


@dataclass(frozen=True, slots=True)
class Arrival:
    """What tells a call from others.

    Attributes:
        form: names, shapes and constants of its arguments.
        context: what the pipeline said of it.
        timestep: None where nothing counts the steps.
        held: the arguments that stay the same over a run.
        latents: the arguments that change with the latent.
    """

    form: object
    context: CallContext
    timestep: float | None
    held: Mapping[str, HeldInput]
    latents: Mapping[str, Tensor]

    @staticmethod
    def of(
        tensors: Mapping[str, Tensor],
        classes: Mapping[str, Dependence],
        timestep: Timestep | None,
        form: object,
        context: CallContext = SILENT,
    ) -> Arrival:
        """What tells a call from others.

        Raises:
            RunError: its rows are at different timesteps.
        """
        return Arrival(
            form,
            context,
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
class PastCall:
    """A call that may have to be computed anew under another recipe.

    Attributes:
        arrival: what tells it from others.
        call: its arguments, as they were.
    """

    arrival: Arrival
    call: FlatCall

    @staticmethod
    def of(arrival: Arrival, call: FlatCall) -> PastCall:
        """A call, with tensors that nobody else writes into.

        Args:
            arrival: with latents of its own.
            call: the caller's.
        """
        own = {name: held.value for name, held in arrival.held.items()} | dict(arrival.latents)
        tensors = {
            name: own[name] if name in own else v.clone() for name, v in call.tensors.items()
        }
        return PastCall(arrival, replace(call, tensors=tensors))


@dataclass(frozen=True, slots=True)
class CallState:
    """What one call of the steps leaves for the next one.

    Attributes:
        compiled: the graphs for its form.
        arrival: the newest call.
        place: of its step among the recorded ones; whole numbers are recorded steps.
        kept: values by cache.
        refreshes: places of the kept refreshes, newest first.
        outputs: places of the steps whose outputs are kept, newest first.
        start: place of the step that it began with.
        recipe: number of the recipe that it runs under, in a plan of several.
        opening: all calls so far, where their timesteps are those of several recipes.
        derived: whether there was a timestep that was not recorded.
    """

    compiled: Compiled
    arrival: Arrival
    place: float
    kept: Kept
    refreshes: tuple[float, ...]
    outputs: tuple[float, ...]
    start: float
    recipe: int = 0
    opening: tuple[PastCall, ...] = ()
    derived: bool = False


@dataclass(slots=True)
class RunState:
    """All that a running denoising changes.

    Attributes:
        calls: what each call of the steps has left, the one that ran last at the end.
        gone: what others had left whose place was needed, without the kept values.
        context: what the pipeline says of the calls now.
        recipe: number of the one that was chosen for this run; None where timesteps choose.
    """

    calls: list[CallState] = field(default_factory=list)
    gone: list[CallState] = field(default_factory=list)
    context: CallContext = SILENT
    recipe: int | None = None

    def restart(self) -> None:
        """Forget the running denoising: the next call begins anew."""
        self.calls.clear()
        self.gone.clear()

    def before(
        self, arrival: Arrival, bindings: Sequence[Binding]
    ) -> tuple[CallState, float] | None:
        """What a call goes on with, and its place; None where it begins anew.

        Where it goes on with something that is gone, as calls of two runs in turn do, it begins
        anew.

        Args:
            arrival: the call.
            bindings: of every recipe of the plan.
        """
        options = sorted(_options(self.calls, arrival, bindings), key=_nearness)
        gone = min(_options(self.gone, arrival, bindings), key=_nearness, default=None)
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
        gone = [replace(state, kept={}, opening=()) for state in self.calls[:leaving]]
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


def _options(
    states: Sequence[CallState], arrival: Arrival, bindings: Sequence[Binding]
) -> Iterator[_Option]:
    for state in states:
        last = state.arrival
        grid, timestep = bindings[state.recipe].grid, bindings[state.recipe].timestep
        if timestep and timestep.turns_back(last.timestep or 0.0, arrival.timestep or 0.0):
            continue
        place = next_place(state, arrival, grid)
        if place is None or not _may_follow(last, arrival):
            continue
        change = relative_change(last.latents, arrival.latents)
        if change <= grid.reach(state.place, place):
            yield _Option(state, place, change)


def _may_follow(last: Arrival, arrival: Arrival) -> bool:
    same = last.form == arrival.form and arrival.context.may_follow(last.context)
    return same and all(last.held[name].same(value) for name, value in arrival.held.items())


def next_place(state: CallState, arrival: Arrival, grid: Grid) -> float | None:
    """Place of a call that goes on with another one; None where it cannot."""
    last, now = state.arrival.context.index, arrival.context.index
    ahead = 1 if last is None or now is None else now - last
    return grid.following(state.place, state.arrival.timestep, arrival.timestep, ahead)


def start_place(arrival: Arrival, grid: Grid) -> float:
    """Place of a call that begins anew."""
    if arrival.timestep is None or not grid.timesteps:
        return float(arrival.context.index or 0)
    return grid.place(arrival.timestep)
