"""Candidate plans: proposed by rehearsal, fitted and measured by replay."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from statistics import fmean

from pydantic import TypeAdapter

from calicache.graph_passes.sampler.recover import RecordedSampler
from calicache.graph_passes.sampler.replay import Answer, Replay, replay
from calicache.graph_passes.search.cheap_errors import spread_over
from calicache.graph_passes.search.families import Family
from calicache.graph_passes.search.ground import Ground
from calicache.graph_passes.search.journal import EntryKind
from calicache.graph_passes.search.placement import Schedule, best_starts, improve, neighbours
from calicache.graph_passes.search.rehearse import Rehearsal
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.front import ErrorSummary, FrontPoint
from calicache.graph_passes.settings.schedule import MAX_ORDER, uniform_schedule

ANSWER_INTERVAL = 3
IMPROVED = 2  # starts of a family that are improved

FIT = EntryKind("fit", TypeAdapter(Replay))
CHOICE = EntryKind("choice", TypeAdapter(list[float]))
REPORT = EntryKind("report", TypeAdapter(list[float]))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that was fitted and run on the recorded runs for searching.

    Attributes:
        family: what its cheap steps do.
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

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return _key(self.family, self.order, self.schedule)

    def point(self, error: ErrorSummary) -> FrontPoint:
        """As a point of the front, with its error on other runs."""
        allocation = self.family.spec.allocation
        calibrates = allocation is not None and StepMode.CALIBRATE in self.schedule
        return FrontPoint(
            cost=self.cost,
            error=error,
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
        orders = family.spec.orders
        order = self.order if self.order in orders else max(orders)
        return replace(self, family=family, order=order)


@dataclass(frozen=True, slots=True)
class SearchState:
    """What a search knows so far.

    Attributes:
        answers: how the model answers at every step, measured once.
        trust: measured over rehearsed error by name of the family, as last seen.
        summaries: errors on the runs for choosing, by key of the candidate.
    """

    answers: tuple[Answer, ...]
    trust: Mapping[str, float] = field(default_factory=dict)
    summaries: Mapping[str, ErrorSummary] = field(default_factory=dict)

    def expected_error(self, proposal: Proposal) -> float:
        """Of a proposal, as far as its family's rehearsals are known to be trusted."""
        return proposal.error * self.trust.get(proposal.family.spec.name, 1.0)

    def summary(self, candidate: Candidate) -> ErrorSummary:
        """Error of a candidate on the runs for choosing, see `summarise`."""
        return self.summaries[candidate.key]

    def after(self, proposal: Proposal, candidate: Candidate) -> SearchState:
        """With what the measurement of a proposal tells of its family."""
        if proposal.error <= 0:
            return self
        ratio = candidate.error / proposal.error
        return replace(self, trust={**self.trust, proposal.family.spec.name: ratio})


def begin(ground: Ground, families: Sequence[Family]) -> SearchState:
    """Measure how the model answers to latents that are off, along one plan of forecasts."""
    schedule = uniform_schedule(ground.steps, ANSWER_INTERVAL, StepMode.FORECAST)
    ground.meter.stage("measure the model's answers")
    candidate = measure(ground, families[0], MAX_ORDER, schedule)
    return SearchState(step_answers(candidate.fit, ground.steps))


def find_candidates(
    ground: Ground, families: Sequence[Family], state: SearchState, budget: float, count: int
) -> tuple[list[Candidate], SearchState]:
    """Up to `count` candidates within the budget, the least error first.

    One of every family first that can be better than what is measured, then what the best
    of them becomes under its own answers.
    """
    candidates: dict[Schedule, Candidate] = {}
    propose = partial(find_proposals, ground, families, state, budget)
    for proposal in _agreed(ground, families, propose):
        least = min((candidate.error for candidate in candidates.values()), default=math.inf)
        is_new = len(candidates) < count and proposal.schedule not in candidates
        if is_new and state.expected_error(proposal) < least:
            candidates[proposal.schedule], state = _measure_proposal(ground, state, proposal)
    while 0 < len(candidates) < count:
        best = min(candidates.values(), key=lambda candidate: candidate.error)
        near = _agreed(ground, families, partial(_near, ground, best, budget, set(candidates)))
        if not near:
            break
        candidates[near[0].schedule], state = _measure_proposal(ground, state, near[0])
    return sorted(candidates.values(), key=lambda candidate: candidate.error), state


def find_proposals(
    ground: Ground, families: Sequence[Family], state: SearchState, budget: float
) -> list[Proposal]:
    """The improved schedule of every family, the most promising first.

    Every family has the modes of the one before, and starts from what that one came to, too.
    """
    proposals: list[Proposal] = []
    for family in families:
        rehearsal = Rehearsal(ground.span, state.answers, family.scales)
        starts = _starts(rehearsal, family, budget, proposals[-1] if proposals else None)
        improved = [_improved(rehearsal, family, s.order, s.schedule, budget) for s in starts]
        if improved:
            proposals.append(min(improved, key=lambda proposal: proposal.error))
    simple = [_simplified(proposal, families) for proposal in proposals]
    return sorted(simple, key=state.expected_error)


def measure(ground: Ground, family: Family, order: int, schedule: Schedule) -> Candidate:
    """Fit a candidate on the runs for searching."""
    cost = family.shares.run_share(schedule, order)
    fit = ground.journal.result(
        FIT,
        _key(family, order, schedule),
        lambda: replay(family.variant_set, ground.recorded, schedule, order, ranks=ground.ranks),
    )
    ground.meter.add(cost * ground.steps * len(ground.recorded.runs) / ground.ranks.size)
    return Candidate(family, order, schedule, cost, fit)


def sample_errors(
    ground: Ground, candidate: Candidate, recorded: RecordedSampler, kind: EntryKind[list[float]]
) -> list[float]:
    """Errors of samples that the weights of a candidate were not fitted to."""
    variant_set, weights = candidate.family.variant_set, candidate.fit.weights
    schedule, order, ranks = candidate.schedule, candidate.order, ground.ranks
    errors = ground.journal.result(
        kind,
        candidate.key,
        lambda: list(replay(variant_set, recorded, schedule, order, weights, ranks=ranks).errors),
    )
    ground.meter.add(candidate.cost * ground.steps * len(recorded.runs) / ranks.size)
    return errors


def summarise(ground: Ground, state: SearchState, candidates: Sequence[Candidate]) -> SearchState:
    """With the errors of the candidates on the runs for choosing."""
    summaries = dict(state.summaries)
    for candidate in candidates:
        if candidate.key not in summaries:
            errors = sample_errors(ground, candidate, ground.choice, CHOICE)
            summaries[candidate.key] = ErrorSummary.of(errors)
    return replace(state, summaries=summaries)


def step_answers(fit: Replay, steps: int) -> tuple[Answer, ...]:
    """How the model answers at every step, from the steps where it was measured."""
    if not fit.answers:
        return (Answer(1.0, 0.0),) * steps
    gains = spread_over({k: answer.gain for k, answer in fit.answers.items()}, steps)
    spreads = spread_over({k: answer.spread for k, answer in fit.answers.items()}, steps)
    return tuple(Answer(*pair) for pair in zip(gains, spreads, strict=True))


def _agreed(
    ground: Ground, families: Sequence[Family], propose: Callable[[], Sequence[Proposal]]
) -> list[Proposal]:
    """What the first process proposes: rehearsals of others may differ in rounding."""
    by_name = {family.spec.name: family for family in families}
    told = ground.ranks.first(
        lambda: [(p.family.spec.name, p.order, p.schedule, p.error) for p in propose()]
    )
    return [
        Proposal(by_name[name], order, schedule, error) for name, order, schedule, error in told
    ]


def _measure_proposal(
    ground: Ground, state: SearchState, proposal: Proposal
) -> tuple[Candidate, SearchState]:
    candidate = measure(ground, proposal.family, proposal.order, proposal.schedule)
    return candidate, state.after(proposal, candidate)


def _starts(
    rehearsal: Rehearsal, family: Family, budget: float, before: Proposal | None
) -> list[Proposal]:
    """To improve: the best with a mode that the family before has not, and what that came to."""
    old_modes: set[StepMode] = set(before.family.modes) if before else set()
    starts = [
        Proposal(family, order, schedule, error)
        for order in family.spec.orders
        for schedule, error in best_starts(rehearsal, order, family.limits(order, budget))
        if not set(schedule) <= old_modes
    ]
    starts.sort(key=lambda proposal: proposal.error)
    if before is None:
        return starts[:IMPROVED]
    again = before.moved_to(family)
    fits = family.shares.run_share(again.schedule, again.order) <= budget
    return [*starts[:1], again] if fits else starts[:1]


def _improved(
    rehearsal: Rehearsal, family: Family, order: int, start: Schedule, budget: float
) -> Proposal:
    schedule, error = improve(rehearsal, start, order, family.limits(order, budget))
    return Proposal(family, order, schedule, error)


def _near(
    ground: Ground, best: Candidate, budget: float, measured: Collection[Schedule]
) -> list[Proposal]:
    """The improved best candidate under its own answers, or its best neighbour."""
    family, order = best.family, best.order
    answers = step_answers(best.fit, ground.steps)
    rehearsal = Rehearsal(ground.span, answers, family.scales)
    better = _improved(rehearsal, family, order, best.schedule, budget)
    if better.schedule not in measured:
        return [better]
    ranked = neighbours(rehearsal, best.schedule, order, family.limits(order, budget))
    proposals = (Proposal(family, order, s, error) for s, error in ranked if s not in measured)
    return list(islice(proposals, 1))


def _simplified(proposal: Proposal, families: Sequence[Family]) -> Proposal:
    """The same in the first family that has all its modes: fewer caches to write.

    CALIBRATE steps stay those of their own family: others cost and do something else.
    """
    modes = set(proposal.schedule)
    if StepMode.CALIBRATE in modes:
        return proposal
    return proposal.moved_to(next(f for f in families if modes <= set(f.modes)))


def _key(family: Family, order: int, schedule: Schedule) -> str:
    letters = "".join(mode.name[0] if mode is not StepMode.REUSE else "U" for mode in schedule)
    digest = hashlib.sha256(f"{family.spec.name} {order} {letters}".encode()).hexdigest()
    return digest[:16]
