"""The cached sampler run again along recorded runs: with given output weights, or fitting them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from torch import Tensor

from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.common.ranks import ALONE, Ranks
from calicache.graph_passes.recording.timestep import Run
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.sampler.correct import fit_step, mix
from calicache.graph_passes.sampler.kept import Kept, run_step
from calicache.graph_passes.sampler.recover import RecordedSampler
from calicache.graph_passes.sampler.update import (
    SamplerSteps,
    latent_channels,
    recorded_next,
    relative_errors,
)
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.schedule import Table, anchor_table, output_table

ROUNDING = 3e-5  # how far a latent must be off, to tell the model's answer from rounding


@dataclass(frozen=True, slots=True)
class Answer:
    """How REFRESH outputs of one step answered to latents that were off the recorded ones.

    Attributes:
        gain: g, the least-squares e^ - e = g (x^ - x).
        spread: |e^ - e - g (x^ - x)| / |x^ - x|, what no number explains.
    """

    gain: float
    spread: float


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of one replay.

    Attributes:
        weights: of own and kept outputs, then of the latent, by step (T, order + 3), the given
            ones or the fitted.
        errors: relative L2 error of every sample's last known latent.
        answers: by REFRESH step whose latent was off; none where the recorded outputs are not
            known.
    """

    weights: Table
    errors: tuple[float, ...]
    answers: dict[int, Answer]


def replay(
    variant_set: VariantSet,
    recorded: RecordedSampler,
    schedule: Sequence[StepMode],
    order: int,
    weights: Table | None = None,
    meter: Meter | None = None,
    ranks: Ranks = ALONE,
) -> Replay:
    """Run the cached sampler from the recorded noise, all runs step by step.

    Args:
        variant_set: the variants, without output weights of their own; they keep order + 1
            refreshes or more. FORECAST needs no variant.
        recorded: runs as long as the schedule, and the sampler's update.
        schedule: mode of every step.
        order: of the anchors; order + 1 refreshes are used.
        weights: as in `Replay`; None fits them on the way, so that every next latent comes as
            near as it can to the recorded one.
        meter: counts the steps of every run of this process.
        ranks: the processes that share the runs.
    """
    plain = plain_weights(schedule, order)
    anchors = anchor_table(schedule, order)
    variants = variant_set.scheduled(anchors)
    sweep = _Sweep(variants, recorded, schedule, weights or plain, order + 1, ranks)
    runs = [
        _CachedRun(
            recorded.runs[k], recorded.ends[k], recorded.outputs[k] if recorded.outputs else None
        )
        for k in ranks.share(range(len(recorded.runs)))
    ]
    rows: list[tuple[float, ...]] = []
    answers: dict[int, Answer] = {}
    for step, mode in enumerate(schedule):
        features = [sweep.features(run, step) for run in runs]
        if mode is StepMode.REFRESH and recorded.outputs:
            answer = sweep.answer(runs, step)
            answers |= {} if answer is None else {step: answer}
        rows.append(sweep.advance(runs, features, step, fits=weights is None))
        if meter:
            meter.add(len(runs))
    errors = ranks.in_order([_errors(run, recorded.steps) for run in runs])
    return Replay(tuple(rows), tuple(chain.from_iterable(errors)), answers)


def plain_weights(schedule: Sequence[StepMode], order: int) -> Table:
    """The weights of a plan without fitted ones, as in `Replay`: none of the latent."""
    return tuple((*row, 0.0) for row in output_table(schedule, order))


@dataclass(slots=True)
class _CachedRun:
    """One run of the cached sampler along the recorded one."""

    recorded: Run
    end: Tensor | None
    exact: Sequence[Tensor] | None
    x: Tensor | None = None
    before: Sequence[Tensor] = ()
    kept: Kept = field(default_factory=dict)
    outputs: tuple[Tensor, ...] = ()


Features = tuple[list[Tensor], list[Tensor | None]]


@dataclass(frozen=True, slots=True)
class _Sweep:
    variant_set: VariantSet
    recorded: RecordedSampler
    schedule: Sequence[StepMode]
    weights: Table
    history: int
    ranks: Ranks

    @property
    def sampler(self) -> SamplerSteps:
        return self.recorded.steps

    def features(self, run: _CachedRun, step: int) -> Features:
        """Terms of x, and what is mixed: own output (None on FORECAST), kept ones, the latent."""
        call = dict(run.recorded[step])
        latent = self.sampler.latent
        run.x = call[latent] if run.x is None else run.x.to(call[latent].dtype)
        call[latent] = run.x
        mode = self.schedule[step]
        own: Tensor | None = None
        kept: list[Tensor | None] = [*run.outputs, *(self.history - len(run.outputs)) * [None]]
        if mode is not StepMode.FORECAST:
            raw = self._run_variant(run, mode, step, list(call.values()))
            own = latent_channels(raw, run.x)
            if mode.keeps_output:
                run.outputs = (own, *run.outputs)[: self.history]
        return [run.x.chunk(self.sampler.parts)[0]], [own, *kept, run.x]

    def advance(
        self, runs: Sequence[_CachedRun], features: Sequence[Features], step: int, *, fits: bool
    ) -> tuple[float, ...]:
        """Fit the weights of a step, unless they are given, and go on to the next latent."""
        weights = self.weights[step]
        if step == len(self.sampler.weights):  # what the last output becomes was not recorded
            return weights
        latent, parts = self.sampler.latent, self.sampler.parts
        if fits:
            wanted = [recorded_next(run.recorded, run.end, step, latent, parts) for run in runs]
            before = [run.before for run in runs]
            weights = fit_step(self.sampler, step, features, before, wanted, weights, self.ranks)
        for run, (terms, outputs) in zip(runs, features, strict=True):
            now = [terms[0], *self.sampler.output_terms(mix(weights, outputs))]
            run.x = self.sampler.next_latent(step, now, run.before)
            run.before = now
        return weights

    def answer(self, runs: Sequence[_CachedRun], step: int) -> Answer | None:
        """How the outputs of a REFRESH step answered to the latents; None where these are right."""
        latent = self.sampler.latent
        changes = self.ranks.in_order([_change(run, step, latent) for run in runs])
        product, moved, total, size = (sum(sums) for sums in zip(*changes, strict=True))
        if moved <= ROUNDING**2 * size:  # the first step, or one after nothing but REFRESH steps
            return None
        gain = product / moved
        return Answer(gain, max(0.0, total / moved - gain**2) ** 0.5)

    def _run_variant(
        self, run: _CachedRun, mode: StepMode, step: int, tensors: Sequence[Tensor]
    ) -> Tensor:
        first, run.kept = run_step(self.variant_set, mode, run.kept, step, tensors)
        return first


def _change(run: _CachedRun, step: int, latent: str) -> tuple[float, float, float, float]:
    """(e^ - e) . (x^ - x), |x^ - x|^2, |e^ - e|^2 and |x^|^2 of a run."""
    assert run.x is not None
    assert run.exact is not None
    dx = (run.x - run.recorded[step][latent]).double().flatten()
    de = (run.outputs[0] - run.exact[step]).double().flatten()
    return float(de @ dx), float(dx @ dx), float(de @ de), float(run.x.double().square().sum())


def _errors(run: _CachedRun, sampler: SamplerSteps) -> tuple[float, ...]:
    last = len(sampler.weights) - 1
    wanted = recorded_next(run.recorded, run.end, last, sampler.latent, sampler.parts)
    assert run.x is not None
    return relative_errors(run.x.chunk(sampler.parts)[0], wanted)
