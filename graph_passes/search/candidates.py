"""Candidate plans: proposed by rehearsal, fitted and measured by replay."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from pydantic import TypeAdapter

from calicache.graph_passes.sampler.recover import RecordedSampler
from calicache.graph_passes.sampler.replay import Answer, Replay, replay
from calicache.graph_passes.search.cheap_errors import spread_over
from calicache.graph_passes.search.families import Family
from calicache.graph_passes.search.ground import Ground
from calicache.graph_passes.search.placement import Schedule, best_starts, improve, neighbours
from calicache.graph_passes.search.rehearse import Rehearsal, Span
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.front import ErrorSummary, FrontPoint
from calicache.graph_passes.settings.schedule import MAX_ORDER, uniform_schedule

ANSWER_INTERVAL = 3
IMPROVED = 2  # starts of a family that are improved

_REPLAY, _ERRORS = TypeAdapter(Replay), TypeAdapter(list[float])


@dataclass(frozen=True, slots=True)
class Measured:
    """A candidate that was fitted and run on the recorded runs.

    Attributes:
        family: what its CALIBRATE steps do.
        order: of the anchors.
        schedule: mode of every step.
        cost: share of the full run.
        fit: weights, errors and answers of the runs for searching.
    """

    family: Family
    order: int
    schedule: Schedule
    cost: float
    fit: Replay

    @property
    def error(self) -> float:
        """Mean over the samples that it was fitted to."""
        return fmean(self.fit.errors)

    def point(self, summary: ErrorSummary) -> FrontPoint:
        """As a point of the front."""
        allocation = self.family.allocation
        calibrates = allocation is not None and StepMode.CALIBRATE in self.schedule
        return FrontPoint(
            cost=self.cost,
            error=summary,
            schedule=self.schedule,
            order=self.order,
            rules=allocation.rules if allocation and calibrates else (),
            ranks=dict(allocation.ranks) if allocation and calibrates else {},
            output_weights=self.fit.weights,
        )


@dataclass(frozen=True, slots=True)
class Proposal:
    """A candidate to measure, with its rehearsed error."""

    family: Family
    order: int
    schedule: Schedule
    error: float

    def moved_to(self, family: Family) -> Proposal:
        """The same schedule in a family that has all its modes."""
        order = self.order if self.order in family.orders else max(family.orders)
        return replace(self, family=family, order=order)


class Explorer:
    """Finds candidates at a budget.

    Attributes:
        answers: of the model, measured once.
        trust: measured over rehearsed error by family, as last seen.
        summaries: of candidates that were run on the runs for choosing.
    """

    def __init__(self, ground: Ground, families: Sequence[Family]) -> None:
        self.ground, self.families = ground, families
        self.span = Span.of(ground.recorded)
        self.trust: dict[str, float] = {}
        self.summaries: dict[str, ErrorSummary] = {}
        start = uniform_schedule(ground.steps, ANSWER_INTERVAL, StepMode.FORECAST)
        ground.meter.stage("measure the model's answers")
        self.answers = step_answers(self.measure(families[0], MAX_ORDER, start).fit, ground.steps)

    def candidates(self, budget: float, count: int) -> list[Measured]:
        """Up to `count` candidates within the budget, the least error first.

        One of every family first that can be better than what is measured, then what the best
        of them becomes under its own answers.
        """
        measured: dict[Schedule, Measured] = {}
        for proposal in self.proposals(budget):
            least = min((m.error for m in measured.values()), default=math.inf)
            fresh = len(measured) < count and proposal.schedule not in measured
            if fresh and self._expected(proposal) < least:
                measured[proposal.schedule] = self._tried(proposal)
        while 0 < len(measured) < count:
            best = min(measured.values(), key=lambda m: m.error)
            near = self._near(best, budget, measured)
            if near is None:
                break
            measured[near.schedule] = self._tried(near)
        return sorted(measured.values(), key=lambda m: m.error)

    def measure(self, family: Family, order: int, schedule: Schedule) -> Measured:
        """Fit a candidate on the runs for searching."""
        ground, name = self.ground, _name("fit", family, order, schedule)
        cost = family.shares.run_share(schedule, order)

        def run() -> object:
            made = replay(family.variant_set, ground.recorded, schedule, order)
            return _REPLAY.dump_python(made, mode="json")

        fit = _REPLAY.validate_python(ground.journal.numbers(name, run))
        ground.meter.add(cost * ground.steps * len(ground.recorded.runs))
        return Measured(family, order, schedule, cost, fit)

    def errors(self, measured: Measured, recorded: RecordedSampler, name: str) -> list[float]:
        """Errors of samples that the weights were not fitted to."""
        family, order, schedule = measured.family, measured.order, measured.schedule

        def run() -> list[float]:
            weights = measured.fit.weights
            return list(replay(family.variant_set, recorded, schedule, order, weights).errors)

        found = self.ground.journal.numbers(_name(name, family, order, schedule), run)
        self.ground.meter.add(measured.cost * self.ground.steps * len(recorded.runs))
        return _ERRORS.validate_python(found)

    def summary(self, measured: Measured) -> ErrorSummary:
        """Errors on the runs for choosing."""
        name = _name("choice", measured.family, measured.order, measured.schedule)
        if name not in self.summaries:
            errors = self.errors(measured, self.ground.choice, "choice")
            self.summaries[name] = ErrorSummary.of(errors)
        return self.summaries[name]

    def _tried(self, proposal: Proposal) -> Measured:
        found = self.measure(proposal.family, proposal.order, proposal.schedule)
        if proposal.error > 0:
            self.trust[proposal.family.name] = found.error / proposal.error
        return found

    def _expected(self, proposal: Proposal) -> float:
        """Its error, as far as its family's rehearsals are known to be trusted."""
        return proposal.error * self.trust.get(proposal.family.name, 1.0)

    def proposals(self, budget: float) -> list[Proposal]:
        """The improved schedule of every family, the most promising first.

        Every family has the modes of the one before, and starts from what that one found, too.
        """
        found: list[Proposal] = []
        for family in self.families:
            starts = self._starts(family, budget, found[-1] if found else None)
            improved = [self._improved(start, budget) for start in starts]
            if improved:
                found.append(min(improved, key=lambda proposal: proposal.error))
        proposals = [self._simplest(proposal) for proposal in found]
        return sorted(proposals, key=self._expected)

    def _starts(self, family: Family, budget: float, before: Proposal | None) -> list[Proposal]:
        """To improve: the best with a mode that the family before has not, and what that found."""
        known: set[StepMode] = set(before.family.modes) if before else set()
        rehearsal = self._rehearsal(family)
        starts = [
            Proposal(family, order, start, error)
            for order in family.orders
            for start, error in best_starts(
                rehearsal, order, family.modes, family.cost(order), budget
            )
            if not set(start) <= known
        ]
        starts.sort(key=lambda proposal: proposal.error)
        if before is None:
            return starts[:IMPROVED]
        again = before.moved_to(family)
        fits = family.cost(again.order)(again.schedule) <= budget
        return [*starts[:1], again] if fits else starts[:1]

    def _improved(self, start: Proposal, budget: float) -> Proposal:
        family, order = start.family, start.order
        rehearsal, cost = self._rehearsal(family), family.cost(order)
        schedule, error = improve(rehearsal, start.schedule, order, family.modes, cost, budget)
        return Proposal(family, order, schedule, error)

    def _rehearsal(self, family: Family) -> Rehearsal:
        return Rehearsal(self.span, self.answers, family.scales)

    def _near(
        self, best: Measured, budget: float, done: Mapping[Schedule, Measured]
    ) -> Proposal | None:
        """The improved best candidate under its own answers, or its best neighbour."""
        family, order = best.family, best.order
        answers = step_answers(best.fit, self.ground.steps)
        rehearsal = Rehearsal(self.span, answers, family.scales)
        cost = family.cost(order)
        better, error = improve(rehearsal, best.schedule, order, family.modes, cost, budget)
        ranked = [(better, error)]
        if better in done:
            ranked = neighbours(rehearsal, best.schedule, order, family.modes, cost, budget)
        fresh = (Proposal(family, order, s, error) for s, error in ranked if s not in done)
        return next(fresh, None)

    def _simplest(self, proposal: Proposal) -> Proposal:
        """The same in the first family that has all its modes: fewer caches to write.

        CALIBRATE steps stay those of their own family: others cost and do something else.
        """
        used = set(proposal.schedule)
        if StepMode.CALIBRATE in used:
            return proposal
        return proposal.moved_to(next(f for f in self.families if used <= set(f.modes)))


def step_answers(fit: Replay, steps: int) -> tuple[Answer, ...]:
    """How the model answers at every step, from the steps where it was measured."""
    if not fit.answers:
        return (Answer(1.0, 0.0),) * steps
    gains = spread_over({k: answer.gain for k, answer in fit.answers.items()}, steps)
    spreads = spread_over({k: answer.spread for k, answer in fit.answers.items()}, steps)
    return tuple(Answer(*pair) for pair in zip(gains, spreads, strict=True))


def _name(kind: str, family: Family, order: int, schedule: Schedule) -> str:
    letters = "".join(mode.name[0] if mode is not StepMode.REUSE else "U" for mode in schedule)
    digest = hashlib.sha256(f"{family.name} {order} {letters}".encode()).hexdigest()
    return f"{kind}-{digest[:16]}"
