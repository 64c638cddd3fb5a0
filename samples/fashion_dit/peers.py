"""Caching methods of 2025 and 2026 at the model's final output, each written from its formula.

A peer says what a skipped step returns, from the outputs of the steps before. It has no state:
`PeerRun` is one denoising, called like the model, step by step. y_k is the output of step k.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from calicache.graph_passes.common.errors import RunError

Denoiser = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class History:
    """A run before the step in question.

    Attributes:
        outputs: (B, ...) of every step so far, computed or forecast.
        computed: the steps that the model computed, ascending; never empty.
    """

    outputs: Sequence[Tensor]
    computed: Sequence[int]

    @property
    def step(self) -> int:
        """The one in question."""
        return len(self.outputs)

    @property
    def anchor(self) -> Tensor:
        """The newest computed output."""
        return self.outputs[self.computed[-1]]

    @property
    def since(self) -> int:
        """Steps from the newest computed one to the one in question."""
        return self.step - self.computed[-1]

    @property
    def slope(self) -> Tensor | None:
        """Difference of the two newest computed outputs, per step; None after one."""
        if len(self.computed) < 2:
            return None
        before, newest = self.computed[-2:]
        return (self.outputs[newest] - self.outputs[before]) / (newest - before)


class Peer(Protocol):
    """A caching method at the final output."""

    def forecast(self, history: History) -> Tensor:
        """The output (B, ...) of a skipped step."""


@dataclass(slots=True)
class PeerRun:
    """One denoising with a peer, called like the model; the next run is another one.

    Attributes:
        model: called on the computed steps; the peer is asked on all others.
        computed: steps; a RunError without step 0.
        outputs: (B, ...) of the steps so far.
    """

    model: Denoiser
    peer: Peer
    computed: Collection[int]
    outputs: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if 0 not in self.computed:
            raise RunError(
                "computed steps",
                expected="step 0 among them",
                got=str(sorted(self.computed)),
                fix="A forecast needs an output to start from: compute the first step.",
            )

    def __call__(self, **inputs: Tensor) -> Tensor:
        """The output (B, ...) of the next step."""
        step = len(self.outputs)
        if step in self.computed:
            self.outputs.append(self.model(**inputs))
        else:
            earlier = [k for k in range(step) if k in self.computed]
            self.outputs.append(self.peer.forecast(History(self.outputs, earlier)))
        return self.outputs[-1]


@dataclass(frozen=True, slots=True)
class TaylorSeerLite:
    """TaylorSeer-Lite, as in OpenVINO GenAI (`taylorseer_lite.hpp`): a line through two outputs.

        y_t = y_a + (t - a) (y_a - y_b) / (a - b),   a and b the newest computed steps

    Applied at the final output, there as here. After one computed step y_t = y_a; OpenVINO
    computes at least two, by default the first six, the last two and every third between.
    """

    def forecast(self, history: History) -> Tensor:
        """The output (B, ...) of a skipped step."""
        slope = history.slope
        return history.anchor if slope is None else history.anchor + history.since * slope


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Spectrum (arXiv 2603.01623): Chebyshev polynomials over time, fitted by ridge regression.

        y_t = sum_m c_m T_m(tau_t),   tau_t = 2 t / steps - 1,   C = (X'X + ridge I)^-1 X'Y

    X holds T_0 .. T_degree at all computed steps so far, Y their outputs. The paper forecasts the
    output of the last block; here it is the final output. `share` is the weight against the line
    through the newest two, which the authors added later and set to 0.5 .. 1. While fewer than
    degree + 1 outputs are computed, that line alone; the paper computes the first five steps.

    Attributes:
        steps: of the whole run.
        degree: of the highest polynomial, 4 as published.
        ridge: 0.1 as published.
        share: of the polynomials; the rest is the line's.
    """

    steps: int
    degree: int = 4
    ridge: float = 0.1
    share: float = 1.0

    def forecast(self, history: History) -> Tensor:
        """The output (B, ...) of a skipped step."""
        if len(history.computed) <= self.degree:
            return TaylorSeerLite().forecast(history)
        known = self._polynomials(history.computed)
        wanted = self._polynomials([history.step])[0]
        normal = known.T @ known + self.ridge * torch.eye(self.degree + 1, dtype=known.dtype)
        weights = known @ torch.linalg.solve(normal, wanted)
        spectral = mix(weights, [history.outputs[k] for k in history.computed])
        return torch.lerp(TaylorSeerLite().forecast(history), spectral, self.share)

    def _polynomials(self, steps: Sequence[int]) -> Tensor:
        """T_0 .. T_degree at steps, float64 (N, degree + 1): T_m(tau) = cos(m arccos(tau))."""
        angle = torch.arccos(2 * torch.tensor(steps, dtype=torch.float64) / self.steps - 1)
        return torch.cos(angle[:, None] * torch.arange(self.degree + 1))


@dataclass(frozen=True, slots=True)
class DynamicModes:
    """DMD, dynamic mode decomposition, as in cache-dit 1.5 (`calibrators/dmd.py`).

        y_{n+1} = A y_n between neighbouring computed outputs;   y_t = Phi diag(lambda^k) b

    k is the distance from the newest computed step, in spacings of the computed steps. With
    X = (y_1 .. y_{n-1}) = U S V', X' = (y_2 .. y_n): lambda and W are the eigenvalues and vectors
    of U'X'V S^-1, Phi = X'V S^-1 W, b = Phi^+ y_n, for every sample of the batch apart. Of the
    newest `history` computed outputs those with one spacing are taken. Below four of them, the
    line through the newest two, as there; where the result is not finite, the newest output.
    cache-dit forecasts what a range of blocks adds to the stream; here it is the final output.

    Attributes:
        history: computed outputs at most.
        ridge: added to the singular values that are inverted.
        smallest: singular values below this share of the largest are left out.
    """

    history: int = 6
    ridge: float = 1e-8
    smallest: float = 1e-4

    def forecast(self, history: History) -> Tensor:
        """The output (B, ...) of a skipped step."""
        steps = even_tail(history.computed[-self.history :])
        if len(steps) < 4:
            return TaylorSeerLite().forecast(history)
        kept = torch.stack([history.outputs[k].flatten(1) for k in steps], dim=-1).double()
        # Modes lie in the span of the outputs: their coordinates there are n x n, not d x n.
        span, coordinates = torch.linalg.qr(kept)
        ahead = self._advance(coordinates, history.since / (steps[1] - steps[0]))
        result = (span @ ahead).to(history.anchor.dtype).view_as(history.anchor)
        return torch.where(result.isfinite().all(), result, history.anchor)

    def _advance(self, kept: Tensor, spacings: float) -> Tensor:
        """From outputs (B, d, n), oldest first, to the one so many spacings later, (B, d, 1)."""
        before, after = kept[..., :-1], kept[..., 1:]
        u, s, v = torch.linalg.svd(before, full_matrices=False)
        inverse = torch.where(s > self.smallest * s[:, :1], 1 / (s + self.ridge), 0)
        mapped = after @ v.mT * inverse[:, None]
        values, vectors = torch.linalg.eig(u.mT @ mapped)
        modes = mapped.to(vectors.dtype) @ vectors
        amplitudes = torch.linalg.pinv(modes) @ kept[..., -1:].to(modes.dtype)
        return (modes @ (values.pow(spacings)[..., None] * amplitudes)).real


@dataclass(frozen=True, slots=True)
class ForecastCalibrate:
    """FoCa, forecast then calibrate (arXiv 2508.16211), as in cache-dit 1.5 (`foca.py`).

        y_t = y_a + (t - a) / 2 ((y_a - y_b) / (a - b) + (y_{t-1} - y_{t-2}))

    a and b are the newest computed steps, y_{t-1} and y_{t-2} the outputs of the steps before,
    computed or forecast. More than `horizon` steps after a, the forecast goes back towards y_a:
    the increment for `horizon` steps times horizon / (t - a). After one computed step y_t = y_a.
    cache-dit does not divide by (a - b), so that its first difference is too long by that factor
    wherever steps between were skipped: `per_step=False`. The paper's own text was not at hand.
    cache-dit forecasts what a range of blocks adds to the stream; here it is the final output.

    Attributes:
        horizon: steps, 3 in cache-dit.
        per_step: whether the first difference is divided by its length.
    """

    horizon: int = 3
    per_step: bool = True

    def forecast(self, history: History) -> Tensor:
        """The output (B, ...) of a skipped step."""
        far = history.slope
        if far is None:
            return history.anchor
        if not self.per_step:
            far = far * (history.computed[-1] - history.computed[-2])
        near = history.outputs[-1] - history.outputs[-2]
        reach = min(history.since, self.horizon) * min(1, self.horizon / history.since)
        return history.anchor + reach / 2 * (far + near)


@dataclass(frozen=True, slots=True)
class LinearPredictor:
    """L2P (arXiv 2604.26365): a linear combination of earlier outputs, weights for every step.

        y_t = sum_{j < t} W_tj y_j

    Applied at the final output, there as here; one weight for all values of an output.

    Attributes:
        weights: (steps, steps), read below the diagonal; from `fit_weights`.
    """

    weights: Tensor

    def forecast(self, history: History) -> Tensor:
        """The output (B, ...) of a skipped step."""
        row = self.weights[history.step, : history.step]
        used = row.nonzero().flatten().tolist()
        return mix(row[used], [history.outputs[k] for k in used])


def fit_weights(
    outputs: Tensor, computed: Collection[int] | None = None, ridge: float = 0.0
) -> Tensor:
    """L2P's weights by least squares on recorded runs, all of whose steps were computed.

        min_w sum (y_t - sum_j w_j y_j)^2 + ridge s sum_j (w_j - reuse_j)^2

    over the earlier steps j, where `reuse` is 1 for the newest of them and 0 else, and s the mean
    sum of squares of a step's output. The published code takes all earlier steps, forecasts among
    them when it runs, and 201 steps of Adam from `reuse`; the ridge stands for stopping early.

    Args:
        outputs: (steps, ...), of one or more runs.
        computed: the earlier steps that are used; None for all.
        ridge: 0 is plain least squares.

    Returns:
        Float64 (steps, steps), 0 where a step is not used.
    """
    values = outputs.flatten(1).double()
    products = values @ values.T
    pull = ridge * products.diagonal().mean()
    weights = torch.zeros_like(products)
    for step in range(1, len(values)):
        used = [k for k in range(step) if computed is None or k in computed]
        identity = torch.eye(len(used), dtype=products.dtype)
        normal = products[used][:, used] + pull * identity
        wanted = products[used, step] + pull * identity[-1]  # the last of them: reuse
        # The shortest of all solutions, where outputs depend on one another.
        weights[step, used] = torch.linalg.pinv(normal, hermitian=True) @ wanted
    return weights


def even_tail(steps: Sequence[int]) -> Sequence[int]:
    """The longest end of ascending steps with one spacing."""
    first = max(len(steps) - 2, 0)
    while first > 0 and steps[first] - steps[first - 1] == steps[-1] - steps[-2]:
        first -= 1
    return steps[first:]


def mix(weights: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Sum of weights (N,) times outputs (B, ...), N of them."""
    stacked = torch.stack(list(outputs))
    return torch.tensordot(weights.to(stacked), stacked, dims=1)
