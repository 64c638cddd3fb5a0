"""The ways to sample that the evaluation compares: peers, the paper, and calicache's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from diffusion import GuidedDDIM
from peers import (
    DynamicModes,
    ForecastCalibrate,
    LinearPredictor,
    Peer,
    PeerRun,
    Spectrum,
    TaylorSeerLite,
    fit_weights,
)
from torch import Tensor

from calicache import StepMode
from calicache.graph_passes import spread_schedule, uniform_schedule

STEPS, GUIDANCE, NULL_CLASS = 35, 1.5, 10
BUDGETS = {7: 5, 9: 4, 12: 3, 18: 2}  # REFRESH steps of 35: interval
RANK = 28  # width / 9
POWERS = (0.85, 0.9, 0.95, 1.0, 1.1)
SHARES = (0.2, 0.3, 0.4, 0.5)  # of the full run, for plans that are searched
ERRORS = (0.02, 0.01)

Denoiser = Callable[..., Tensor]
Schedule = tuple[StepMode, ...]


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the comparison.

    Attributes:
        family: the curve it belongs to; `name` tells the row.
        sampler: `ddim`, or `dpm` for DPM-Solver++ 2M.
        steps: calls of the model.
        schedules: candidates; the best on seeds of their own is taken. None is the plain model.
        options: of `Plan.from_trajectory`.
        budget: of a plan that is searched, a share of the full run's MACs.
        max_error: of a plan that is searched, in the place of a budget.
        peer: gives the outputs of the steps that its one schedule leaves out.
    """

    family: str
    name: str
    sampler: str = "ddim"
    steps: int = STEPS
    schedules: tuple[Schedule, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: float | None = None
    max_error: float | None = None
    peer: Peer | None = None

    @property
    def searched(self) -> bool:
        """Whether its plan comes from a search."""
        return self.budget is not None or self.max_error is not None

    @property
    def plain(self) -> bool:
        """Whether it runs the model as it is, on all steps or beside a peer."""
        return self.peer is not None or (self.schedules is None and not self.searched)

    @property
    def calls(self) -> Sequence[int]:
        """The steps that call the model or its plan: all but those of a peer."""
        if self.peer is None or self.schedules is None:
            return range(self.steps)
        return computed_steps(self.schedules[0])

    @property
    def key(self) -> str:
        """A file name."""
        text = f"{self.family} {self.name}".lower()
        return "".join(letter if letter.isalnum() else "-" for letter in text)

    def sample(self, model: Denoiser, noise: Tensor, labels: Tensor) -> Tensor:
        """Images (B, 1, 28, 28)."""
        if self.peer is not None:
            model = PeerRun(model, self.peer, self.calls)
        if self.sampler == "dpm":
            return sample_dpm(model, noise, labels, self.steps)
        return GuidedDDIM(self.steps, GUIDANCE, NULL_CLASS).sample(model, noise, labels)


def methods(outputs: Tensor) -> list[Method]:
    """All rows, the full run first.

    Args:
        outputs: of the model at every step of recorded runs, (STEPS, ...).
    """
    rows = [Method("full", f"DDIM, {STEPS} steps")]
    for refreshes, interval in BUDGETS.items():
        rows += _peers(refreshes, interval) + _recent_peers(refreshes, interval, outputs)
        rows += _ours(refreshes, interval)
    for share in SHARES:
        rows += _searched(share)
    for limit in ERRORS:
        rows.append(Method("searched", f"error at most {limit:g}", max_error=limit))
    return rows


def _evenly(interval: int, mode: StepMode) -> tuple[Schedule, ...]:
    return (uniform_schedule(STEPS, interval, mode),)


def _peers(refreshes: int, interval: int) -> list[Method]:
    plain = {"correct": False, "rank": RANK}
    label = f"{refreshes} REFRESH of {STEPS}"
    rows = [
        Method("DDIM, fewer steps", f"{refreshes} steps", steps=refreshes),
        Method("DPM-Solver++ 2M", f"{refreshes} steps", "dpm", refreshes),
        Method(
            "final-output forecast",
            f"order 2, {label}",
            schedules=_evenly(interval, StepMode.FORECAST),
            options={**plain, "order": 2},
        ),
    ]
    for order, peer in ((0, "FORA"), (1, "TaylorSeer"), (2, "TaylorSeer")):
        rows.append(
            Method(
                f"REUSE order {order} ({peer})",
                label,
                schedules=_evenly(interval, StepMode.REUSE),
                options={**plain, "order": order},
            )
        )
    if interval in (2, 3):
        for weighting in ("none", "activation", "increment"):
            rows.append(
                Method(
                    f"paper, {weighting}",
                    f"rank {RANK}, {label}",
                    schedules=_evenly(interval, StepMode.CALIBRATE),
                    options={**plain, "order": 0, "weighting": weighting},
                )
            )
    return rows


def _recent_peers(refreshes: int, interval: int, outputs: Tensor) -> list[Method]:
    """Caching methods of 2025 and 2026 at the final output, see peers.py.

    Spectrum and L2P stand as published, and in the form that was better on the seeds for choices.
    """
    schedules = _evenly(interval, StepMode.FORECAST)
    computed = computed_steps(schedules[0])
    peers: dict[str, Peer] = {
        "TaylorSeer-Lite": TaylorSeerLite(),
        "Spectrum": Spectrum(STEPS),
        "Spectrum, small ridge": Spectrum(STEPS, ridge=0.001, share=0.75),
        "DMD": DynamicModes(),
        "FoCa": ForecastCalibrate(),
        "L2P": LinearPredictor(fit_weights(outputs, ridge=0.0003)),
        "L2P, computed outputs": LinearPredictor(fit_weights(outputs, computed)),
    }
    label = f"{refreshes} REFRESH of {STEPS}"
    return [Method(name, label, schedules=schedules, peer=peer) for name, peer in peers.items()]


def _ours(refreshes: int, interval: int) -> list[Method]:
    label = f"{refreshes} REFRESH of {STEPS}"
    mode = StepMode.FORECAST
    spread = (spread_schedule(STEPS, refreshes, power, mode) for power in POWERS)
    candidates = tuple(dict.fromkeys((*_evenly(interval, mode), *spread)))
    rows = [Method("ours, FORECAST", f"fitted, {label}", schedules=candidates)]
    if interval in (2, 3):
        uniform = _evenly(interval, StepMode.CALIBRATE)
        options = {"rank": RANK}
        rows.append(
            Method("ours, CALIBRATE", f"rank {RANK}, {label}", schedules=uniform, options=options)
        )
    return rows


def _searched(share: float) -> list[Method]:
    """A plan from a search, and the best that even schedules do at the same MACs."""
    refreshes = int(share * STEPS)
    label = f"fitted, even, up to {refreshes} REFRESH of {STEPS}"
    even = (
        spread_schedule(STEPS, refreshes, 1.0, StepMode.FORECAST),
        *_evenly(math.ceil(STEPS / refreshes), StepMode.FORECAST),
    )
    return [
        Method("uniform, FORECAST", label, schedules=even),
        Method("searched", f"budget {share:g}", budget=share),
    ]


def computed_steps(schedule: Schedule) -> list[int]:
    """The steps that compute the model in full, ascending."""
    return [step for step, mode in enumerate(schedule) if mode is StepMode.REFRESH]


def sample_dpm(model: Denoiser, noise: Tensor, labels: Tensor, steps: int) -> Tensor:
    """DPM-Solver++ 2M from diffusers, with the sample model's noise schedule and guidance."""
    scheduler = DPMSolverMultistepScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(steps)
    both = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
    x = noise
    with torch.no_grad():
        for now in scheduler.timesteps:
            output = model(
                hidden_states=torch.cat([x, x]),
                timestep=torch.full_like(both, int(now)),
                class_labels=both,
            )
            conditional, unconditional = output.chunk(2)
            epsilon = unconditional + GUIDANCE * (conditional - unconditional)
            x = scheduler.step(epsilon, now, x).prev_sample
    return x
