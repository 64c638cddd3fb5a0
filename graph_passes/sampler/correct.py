"""Output weights fitted along the corrected trajectory.

Every step's output becomes w_0 e + sum_j w_j E_j + w_x x, with e the step's own output, E_j those
of the kept REFRESH steps, and x the latent. The weights are chosen so that the sampler's next
latent comes as near as it can to the recorded one: that takes back what earlier steps did wrong,
where a fit to the step's true output would only keep its own error small.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calicache.graph_passes.sampler.update import SamplerSteps

RIDGE = 1e-6
FAINT = 1e-12  # share of the latent's energy below which outputs do not move it


def fit_step(
    sampler: SamplerSteps,
    step: int,
    features: Sequence[tuple[list[Tensor], list[Tensor | None]]],
    before: Sequence[Sequence[Tensor]],
    wanted: Sequence[Tensor],
    plain: tuple[float, ...],
) -> tuple[float, ...]:
    """Least squares for the distance of x_{k+1} to the recorded one, around plain weights.

    Args:
        sampler: how the next latent is made.
        step: k.
        features: of every run: the terms of x, and what is mixed, None where there is none.
        before: of every run: the terms of the step before.
        wanted: of every run: the recorded x_{k+1}, one copy (B, ...).
        plain: weights to start from (order + 3).
    """
    there = [k for k, value in enumerate(features[0][1]) if value is not None]
    gram = torch.zeros(len(there), len(there), dtype=torch.float64)
    moment = torch.zeros(len(there), dtype=torch.float64)
    scales = sampler.weights[step][1 : 1 + sampler.parts]
    for (terms, outputs), last, target in zip(features, before, wanted, strict=True):
        now = [terms[0], *sampler.output_terms(mix(plain, outputs))]
        reached = sampler.next_latent(step, now, last)
        missed = target.double() - reached.double().chunk(sampler.parts)[0]
        moves = []
        for k in there:
            value = outputs[k]
            assert value is not None
            shares = sampler.output_terms(value)
            moves.append(sum(s * p.double() for s, p in zip(scales, shares, strict=True)))
        matrix = torch.stack([m.flatten() for m in moves], 1)  # type: ignore[union-attr]
        gram += (matrix.T @ matrix).cpu()
        moment += (matrix.T @ missed.flatten()).cpu()
    size = sum(float(target.double().square().sum()) for target in wanted)
    if float(gram.diagonal().max()) <= FAINT * size:
        return plain  # such as the last step of a sampler that ends on its own estimate of x_0
    gram += RIDGE * torch.diag(gram.diagonal())
    change = torch.linalg.lstsq(gram, moment[:, None]).solution[:, 0].tolist()
    weights = list(plain)
    for k, value in zip(there, change, strict=True):
        weights[k] += value
    return tuple(weights)


def mix(weights: Sequence[float], outputs: Sequence[Tensor | None]) -> Tensor:
    """sum_k w_k outputs_k over the outputs that are there."""
    total: Tensor | None = None
    for weight, value in zip(weights, outputs, strict=False):
        if value is not None and weight:
            total = weight * value if total is None else total + weight * value
    assert total is not None
    return total
