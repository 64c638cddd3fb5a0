"""Errors of schedules without running the model: the sampler rehearsed in a few coordinates.

Every latent and output of a recorded run is a weighted sum of the first latent and of the
recorded outputs, so in an orthonormal basis of their span a latent is a vector of at most 1 + T P
numbers, whatever its size; T more for runs of a reference, whose latents are no such sums. A
cached run is simulated there. At step k, with x_k and e_k recorded, E_j the kept outputs and p_j
the steps of the kept refreshes, newest first:

    o   = x^ - x_k                                         how far off the latent is
    e^  = e_k + g_k o + s_k |o| z_k                        the model's answer to it
          + c_mk prod_j(k - p_j) z'_{p_1}                  what a cheap mode m adds
    f   = (e^, E_1 .. E_K, x^)                             what is mixed
    v   = (1, 0 .. 0, 0), or (0, L_1 .. L_K, 0)            plain weights; the latter for FORECAST
    w   = v + the change that `correct` fits               towards the recorded x_{k+1}
    m   = sum_j w_j f_j
    x^' = a x^ + sum_p b_p m_p + the terms of the step before

How the model answers is so reduced to two measured numbers a step, g_k and s_k, with z_k a
direction of its own, whatever the mode. The error that a cheap step adds is reduced to one
measured number c_mk for each count of kept refreshes, times the product of the lags, as in the
remainder of Lagrange's formula; all steps between two refreshes share its direction z'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calicache.graph_passes.sampler.guidance import constant_shares, weighted_sum
from calicache.graph_passes.sampler.least_squares import NormalEquations
from calicache.graph_passes.sampler.recover import RecordedSampler
from calicache.graph_passes.sampler.replay import Answer
from calicache.graph_passes.sampler.update import recorded_next
from calicache.graph_passes.settings.choices import StepMode

ROWS = 1 << 16
LEAST_ENERGY = 1e-12  # share of it below which a direction does not count
ALIKE = 1e-4  # how far shares of parts may be apart: recovered weights are good to about 1e-6
KEEPING = [int(mode) for mode in StepMode if mode.keeps_output]
Scales = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Recorded runs in an orthonormal basis of what they span, float64.

    Attributes:
        latents: x_k by step, (T + 1, D), the result last.
        outputs: e_k by step and part, (T, P, D); where all steps weigh the parts alike, as with
            one guidance scale, their weighted sum is the only part.
        weights: of the sampler's update by step, see `SamplerSteps`.
    """

    latents: Tensor
    outputs: Tensor
    weights: tuple[tuple[float, ...], ...]

    @staticmethod
    def of(recorded: RecordedSampler) -> Span:
        """Coordinates of recorded runs that are known to their end; all runs count alike."""
        parts, weights = recorded.steps.parts, recorded.steps.weights
        guidance = constant_shares(weights, parts, ALIKE)
        if guidance is not None:
            weights = tuple(_guided(row, parts) for row in weights)
        steps, merged = len(weights), parts if guidance is None else 1
        given = steps if recorded.reference else 0  # latents that the update does not lead to
        size = 1 + steps * merged + given
        gram = torch.zeros(size, size, dtype=torch.float64)
        runs = zip(recorded.runs, recorded.outputs, recorded.ends, strict=True)
        for run, outputs, end in runs:
            first = run[0][recorded.steps.latent].chunk(parts)[0].flatten()
            latents = [
                recorded_next(run, end, step, recorded.steps.latent, parts).flatten()
                for step in range(given)
            ]
            shares = [[part.flatten() for part in value.chunk(parts)] for value in outputs]
            if guidance is not None:
                shares = [[weighted_sum(guidance, step)] for step in shares]
            gram += _gram([first, *(part for step in shares for part in step), *latents])
        # v in the span has the coordinates root v, with root^T root = gram.
        values, vectors = torch.linalg.eigh(gram)
        strong = values > LEAST_ENERGY * values[-1]
        root = (vectors * values.clamp(min=0.0).sqrt())[:, strong].T  # (D, 1 + T P), or T more
        first, outputs, latents = root.T.split([1, steps * merged, given])
        coordinates = outputs.reshape(steps, merged, len(root))
        if not given:
            return Span(_latents(first[0], coordinates, weights), coordinates, weights)
        return Span(torch.cat([first, latents]), coordinates, weights)


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """Recorded runs in coordinates, and how the model answers there.

    Attributes:
        span: the runs.
        answers: of every step (T,).
        scales: by cheap mode that has an output of its own: c, its error over the product of
            the lags of the refreshes that it looks at, by their number and step, (orders, T).
    """

    span: Span
    answers: tuple[Answer, ...]
    scales: Mapping[StepMode, Scales]

    def errors(self, schedules: Sequence[Sequence[StepMode]], order: int) -> list[float]:
        """Relative L2 error of the result under every schedule, output weights fitted.

        Args:
            schedules: of one length, each starting with REFRESH.
            order: of the anchors; order + 1 refreshes are kept.
        """
        modes = torch.tensor([[int(mode) for mode in schedule] for schedule in schedules])
        walk = _start(self, modes, order + 1)
        for step in range(modes.shape[1]):
            walk = _advance(self, walk, modes[:, step], step)
        result = self.span.latents[-1]
        errors: list[float] = (_off(walk, result).norm(dim=1) / result.norm()).tolist()
        return errors


@dataclass(frozen=True, slots=True)
class _Places:
    """The last steps of a kind under S schedules side by side.

    Attributes:
        steps: newest first, (S, K).
        counts: how many of the K there are, (S,).
    """

    steps: Tensor
    counts: Tensor

    @staticmethod
    def none(schedules: int, history: int) -> _Places:
        """Before the first step."""
        steps = torch.zeros(schedules, history, dtype=torch.float64)
        return _Places(steps, torch.zeros(schedules, dtype=torch.long))

    @property
    def is_kept(self) -> Tensor:
        """Which of the K places hold a step, (S, K)."""
        return torch.arange(self.steps.shape[1])[None] < self.counts[:, None]

    def pushed(self, is_new: Tensor, step: int) -> _Places:
        """After a step that is of the kind under some schedules (S,)."""
        newest = torch.full_like(self.steps[:, :1], float(step))
        steps = torch.cat([newest, self.steps], 1)[:, :-1]
        counts = (self.counts + 1).clamp(max=self.steps.shape[1])
        return _Places(
            torch.where(is_new[:, None], steps, self.steps),
            torch.where(is_new, counts, self.counts),
        )


@dataclass(frozen=True, slots=True)
class _Walk:
    """Cached runs under S schedules side by side, before one of their steps.

    Attributes:
        latent: x^, (S, D). The coordinates are those of the span, then every z_k, then, where
            there are modes that need them, every z'_k.
        terms: x^ and the parts of m of the step before, (S, D) each; none before the first.
        outputs: E, the kept outputs, newest first, (S, K, P, D); 0 where fewer are kept.
        answered: their steps.
        refreshed: p, the steps of the kept refreshes.
    """

    latent: Tensor
    terms: tuple[Tensor, ...]
    outputs: Tensor
    answered: _Places
    refreshed: _Places


def _start(rehearsal: Rehearsal, modes: Tensor, history: int) -> _Walk:
    """All schedules (S, T) at the recorded x_0, with nothing kept."""
    schedules, steps = modes.shape
    parts, inner = rehearsal.span.outputs.shape[1:]
    adds = any(bool((modes == mode).any()) for mode in rehearsal.scales)
    size = inner + steps + steps * adds
    first = _wide(rehearsal.span.latents[0], size).expand(schedules, -1)
    outputs = torch.zeros(schedules, history, parts, size, dtype=torch.float64)
    none = _Places.none(schedules, history)
    return _Walk(first, (), outputs, none, none)


def _advance(rehearsal: Rehearsal, walk: _Walk, mode: Tensor, step: int) -> _Walk:
    """One step in a mode for every schedule (S,), its output weights fitted."""
    own = _own(rehearsal, walk, mode, step)
    latent = walk.latent[:, None, None].expand_as(own[:, None])
    features = torch.cat([own[:, None], walk.outputs, latent], 1)  # (S, 2 + K, P, D)
    speaks = (mode != StepMode.FORECAST)[:, None]
    always, never = torch.ones_like(speaks), torch.zeros_like(speaks)
    is_mixed = torch.cat([speaks, walk.answered.is_kept, always], 1)
    plain = torch.cat([speaks.double(), _lagrange(walk.answered, step) * ~speaks, never], 1)
    features = features * is_mixed[..., None, None]
    weights = (plain + _change(rehearsal.span, walk, features, plain, step)) * is_mixed
    terms = (walk.latent, *_mixed(weights, features).unbind(1))
    answers = torch.isin(mode, torch.tensor(KEEPING))
    outputs = torch.cat([own[:, None], walk.outputs], 1)[:, :-1]
    return _Walk(
        _next(rehearsal.span, step, terms, walk.terms),
        terms,
        torch.where(answers[:, None, None, None], outputs, walk.outputs),
        walk.answered.pushed(answers, step),
        walk.refreshed.pushed(mode == StepMode.REFRESH, step),
    )


def _own(rehearsal: Rehearsal, walk: _Walk, mode: Tensor, step: int) -> Tensor:
    """e^, (S, P, D)."""
    span, answer = rehearsal.span, rehearsal.answers[step]
    steps, inner = len(span.outputs), span.latents.shape[1]
    off = _off(walk, span.latents[step])
    change = answer.gain * off
    change[:, inner + step] += answer.spread * off.norm(dim=1)
    for cheap, scales in rehearsal.scales.items():
        rows = (mode == cheap).nonzero()[:, 0]
        if len(rows):
            directions = inner + steps + walk.refreshed.steps[rows, 0].long()
            change[rows, directions] += _added(walk, scales, step)[rows]
    return _wide(span.outputs[step], walk.latent.shape[1]) + change[:, None]


def _added(walk: _Walk, scales: Scales, step: int) -> Tensor:
    """C prod_j(k - p_j), (S,)."""
    places = walk.refreshed
    lags = torch.where(places.is_kept, step - places.steps, 1.0)[:, : len(scales)].prod(dim=1)
    by_count = torch.tensor([row[step] for row in scales], dtype=torch.float64)
    return by_count[places.counts.clamp(max=len(scales)) - 1] * lags


def _lagrange(places: _Places, step: int) -> Tensor:
    """L, Lagrange's weights of what is kept, 0 where less is kept, (S, K)."""
    apart = places.steps[:, :, None] - places.steps[:, None]  # (S, K, K)
    others = places.is_kept[:, None] & ~torch.eye(apart.shape[1], dtype=torch.bool)
    ratios = (step - places.steps)[:, None] / torch.where(apart == 0, 1.0, apart)
    return places.is_kept * torch.where(others, ratios, 1.0).prod(dim=2)


def _change(span: Span, walk: _Walk, features: Tensor, plain: Tensor, step: int) -> Tensor:
    """Change of the weights by the least squares of `correct.fit_step`, (S, 2 + K)."""
    recorded = span.latents[step + 1]
    scales = torch.tensor(span.weights[step][1 : 1 + features.shape[2]], dtype=torch.float64)
    columns = torch.einsum("skpd,p->skd", features, scales)
    terms = (walk.latent, *_mixed(plain, features).unbind(1))
    residual = _wide(recorded, walk.latent.shape[1]) - _next(span, step, terms, walk.terms)
    return NormalEquations.of(columns, residual).solution(recorded.square().sum())


def _mixed(weights: Tensor, features: Tensor) -> Tensor:
    """M = sum_j w_j f_j, (S, P, D)."""
    return torch.einsum("sk,skpd->spd", weights, features)


def _next(span: Span, step: int, terms: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """x^', from x^ and m now, and x^ and m of the step before."""
    return _sum(span.weights[step], [*terms, *before])


def _off(walk: _Walk, recorded: Tensor) -> Tensor:
    """o, (S, D)."""
    return walk.latent - _wide(recorded, walk.latent.shape[1])


def _wide(value: Tensor, size: int) -> Tensor:
    """Coordinates of the span (..., D') in as many as a walk has, 0 along every z."""
    return torch.nn.functional.pad(value, (0, size - value.shape[-1]))


def _guided(row: Sequence[float], parts: int) -> tuple[float, ...]:
    """Weights of x and of the guided output, now and, where the sampler looks back, before."""
    terms = (row[at : at + 1 + parts] for at in range(0, len(row), 1 + parts))
    return tuple(value for x, *shares in terms for value in (x, sum(shares)))


def _gram(vectors: Sequence[Tensor]) -> Tensor:
    """Inner products in float64, some rows at a time."""
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for start in range(0, vectors[0].numel(), ROWS):
        rows = torch.stack([vector[start : start + ROWS] for vector in vectors]).double()
        total += (rows @ rows.T).cpu()
    return total


def _latents(first: Tensor, outputs: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """x_0 and what the sampler's update makes of it, (T + 1, D)."""
    latents, before = [first], list[Tensor]()
    for row, output in zip(weights, outputs, strict=True):
        terms = [latents[-1], *output]
        latents.append(_sum(row, [*terms, *before]))
        before = terms
    return torch.stack(latents)


def _sum(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    """The weighted sum of the first terms, one for every weight."""
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=False):
        total = total + weight * term
    return total
