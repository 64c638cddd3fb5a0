"""Errors of schedules without running the model: the sampler rehearsed in a few coordinates.

Every latent and output of a recorded run is a weighted sum of the first latent and of the
recorded outputs, so in an orthonormal basis of their span a latent is a vector of at most 1 + T P
numbers, whatever its size. A cached run is simulated there, with the fit of output weights that
`correct` makes. How the model answers to a latent that is off the recorded one is reduced to two
measured numbers a step,

    e^ = e + g_k (x^ - x) + s_k |x^ - x| z_k,

with z_k a direction of its own, whatever the step's mode. The error that a cheap step adds is
reduced to one measured number for each count of kept refreshes, times the product of the lags,
as in the remainder of Lagrange's formula; all steps between two refreshes share its direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calicache.graph_passes.sampler.correct import FAINT, RIDGE
from calicache.graph_passes.sampler.guidance import constant_shares, weighted_sum
from calicache.graph_passes.sampler.recover import RecordedSampler
from calicache.graph_passes.sampler.replay import Answer
from calicache.graph_passes.settings.choices import StepMode

ROWS = 1 << 16
LEAST_ENERGY = 1e-12  # share of it below which a direction does not count
ALIKE = 1e-4  # how far shares of parts may be apart: recovered weights are good to about 1e-6
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
        steps, guidance = len(weights), constant_shares(weights, parts, ALIKE)
        if guidance is not None:
            weights = tuple(_guided(row, parts) for row in weights)
        size = 1 + steps * (parts if guidance is None else 1)
        gram = torch.zeros(size, size, dtype=torch.float64)
        for run, outputs in zip(recorded.runs, recorded.outputs, strict=True):
            first = run[0][recorded.steps.latent].chunk(parts)[0].flatten()
            shares = [[part.flatten() for part in value.chunk(parts)] for value in outputs]
            if guidance is not None:
                shares = [[weighted_sum(guidance, step)] for step in shares]
            gram += _gram([first, *(part for step in shares for part in step)])
        # v in the span has the coordinates root v, with root^T root = gram.
        values, vectors = torch.linalg.eigh(gram)
        seen = values > LEAST_ENERGY * values[-1]
        root = (vectors * values.clamp(min=0.0).sqrt())[:, seen].T  # (D, 1 + T P)
        outputs_ = root.T[1:].reshape(steps, -1, len(root))
        return Span(_latents(root[:, 0], outputs_, weights), outputs_, weights)


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """Recorded runs in coordinates, and how the model answers there.

    Attributes:
        span: the runs.
        answers: of every step (T,).
        scales: by cheap mode that has an output of its own: its error over the product of lags,
            by number of kept refreshes and step, (orders, T).
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
        walk = _Walk(self, modes, order + 1)
        for step in range(modes.shape[1]):
            walk.advance(step)
        wanted = self.span.latents[-1]
        off = walk.x.clone()
        off[:, : len(wanted)] -= wanted
        found: list[float] = (off.norm(dim=1) / wanted.norm()).tolist()
        return found


class _Walk:
    """Cached runs under S schedules side by side; the last coordinates are the z's."""

    def __init__(self, rehearsal: Rehearsal, modes: Tensor, history: int) -> None:
        self.rehearsal, self.modes, self.history = rehearsal, modes, history
        count, steps = modes.shape
        span = rehearsal.span
        parts, inner = span.outputs.shape[1:]
        cheap = any(bool((modes == mode).any()) for mode in rehearsal.scales)
        self.size = inner + steps + steps * cheap
        self.inner, self.steps = inner, steps
        self.x = torch.zeros(count, self.size, dtype=torch.float64)
        self.x[:, :inner] = span.latents[0]
        self.before: list[Tensor] = []
        self.kept = torch.zeros(count, history, parts, self.size, dtype=torch.float64)
        self.places = torch.zeros(count, history, dtype=torch.float64)
        self.there = torch.zeros(count, dtype=torch.long)  # how many refreshes are kept

    def advance(self, step: int) -> None:
        """Fit and apply the weights of one step under every schedule."""
        mode = self.modes[:, step]
        anchors = self._anchors(step)
        own = self._own(step, mode)  # (S, P, D)
        latent = self.x[:, None, None].expand_as(own[:, None])
        features = torch.cat([own[:, None], self.kept, latent], 1)  # (S, 2 + K, P, D)
        usable = torch.arange(self.history)[None] < self.there[:, None]
        speaks = (mode != StepMode.FORECAST)[:, None]
        mask = torch.cat([speaks, usable, torch.ones_like(speaks)], 1)
        plain = torch.cat([speaks.double(), anchors * ~speaks, torch.zeros_like(speaks)], 1)
        weights = self._fit(step, features * mask[..., None, None], mask, plain)
        mixed = torch.einsum("sk,skpd->spd", weights, features)
        self.x, self.before = self._next(step, mixed)
        fresh = mode == StepMode.REFRESH
        place = torch.full((len(mode),), float(step), dtype=torch.float64)
        for kept, newest in ((self.kept, own), (self.places, place)):
            kept[fresh] = torch.cat([newest[fresh][:, None], kept[fresh]], 1)[:, :-1]
        self.there[fresh] = (self.there[fresh] + 1).clamp(max=self.history)

    def _own(self, step: int, mode: Tensor) -> Tensor:
        """Outputs of the model on latents that are off, with what a cheap mode adds."""
        span, answer = self.rehearsal.span, self.rehearsal.answers[step]
        off = self.x.clone()
        off[:, : self.inner] -= span.latents[step]
        own = answer.gain * off  # (S, D)
        own[:, self.inner + step] += answer.spread * off.norm(dim=1)
        for cheap, scales in self.rehearsal.scales.items():
            chosen = mode == cheap
            if bool(chosen.any()):
                rows = chosen.nonzero()[:, 0]
                directions = self.inner + self.steps + self.places[rows, 0].long()
                own[rows, directions] += self._anchor_errors(step, rows, scales)
        outputs = torch.zeros(len(mode), span.outputs.shape[1], self.size, dtype=torch.float64)
        outputs[:, :, : self.inner] = span.outputs[step]
        return outputs + own[:, None]

    def _anchor_errors(self, step: int, rows: Tensor, scales: Scales) -> Tensor:
        kept = self.there[rows]
        usable = torch.arange(self.history)[None] < kept[:, None]
        lags = torch.where(usable, step - self.places[rows], 1.0).prod(dim=1)
        table = torch.tensor([row[step] for row in scales], dtype=torch.float64)
        return table[kept - 1] * lags

    def _anchors(self, step: int) -> Tensor:
        """Lagrange's weights of the kept refreshes (S, K), 0 where there is none."""
        usable = torch.arange(self.history)[None] < self.there[:, None]
        apart = self.places[:, :, None] - self.places[:, None]  # (S, K, K)
        counts = usable[:, None] & ~torch.eye(self.history, dtype=torch.bool)
        ratios = (step - self.places)[:, None] / torch.where(apart == 0, 1.0, apart)
        return usable * torch.where(counts, ratios, 1.0).prod(dim=2)

    def _fit(self, step: int, features: Tensor, mask: Tensor, plain: Tensor) -> Tensor:
        """The same least squares as `correct.fit_step`, (S, 2 + K)."""
        scales = self.rehearsal.span.weights[step][1 : 1 + features.shape[2]]
        moves = torch.einsum("skpd,p->skd", features, torch.tensor(scales, dtype=torch.float64))
        reached, _ = self._next(step, torch.einsum("sk,skpd->spd", plain, features))
        missed = -reached
        missed[:, : self.inner] += self.rehearsal.span.latents[step + 1]
        gram = moves @ moves.transpose(1, 2)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        faint = diagonal <= FAINT * self.rehearsal.span.latents[step + 1].square().sum()
        gram = gram + torch.diag_embed(RIDGE * diagonal + faint.double())
        change = torch.linalg.solve(gram, torch.einsum("skd,sd->sk", moves, missed))
        weights: Tensor = (plain + change) * mask
        return weights

    def _next(self, step: int, mixed: Tensor) -> tuple[Tensor, list[Tensor]]:
        terms = [self.x, *mixed.unbind(1)]
        weights = self.rehearsal.span.weights[step]
        used = [*terms, *self.before][: len(weights)]
        x = sum(weight * term for weight, term in zip(weights, used, strict=True))
        assert isinstance(x, Tensor)
        return x, terms


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
    for step, row in enumerate(weights):
        terms = [latents[-1], *outputs[step]]
        used = [*terms, *before][: len(row)]
        after = sum(weight * term for weight, term in zip(row, used, strict=True))
        assert isinstance(after, Tensor)
        latents.append(after)
        before = terms
    return torch.stack(latents)
