"""The samplers of the grid: diffusers' own, under classifier-free guidance in one batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

Denoiser = Callable[..., Tensor]

SHIFT = 1.5  # of the flow's times, as in the scenes' model card
NOISE = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}  # of the sample DiT
SCHEDULERS: dict[str, Callable[[], Any]] = {
    # Its first order is DDIM; diffusers' own DDIM steps by whole 1000 // steps timesteps, which is
    # another distance than the one from timestep to timestep where steps do not divide 1000.
    "DDIM": partial(DPMSolverMultistepScheduler, **NOISE, solver_order=1),
    "DPM-Solver++ 2M": partial(DPMSolverMultistepScheduler, **NOISE),
    "Euler": partial(FlowMatchEulerDiscreteScheduler, shift=SHIFT),
    "DPM-Solver++ 2M, flow": partial(
        DPMSolverMultistepScheduler,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=SHIFT,
    ),
}


@torch.no_grad()
def denoise(
    model: Denoiser,
    noise: Tensor,
    conditions: tuple[str, Tensor, Tensor],
    sampler: str,
    steps: int,
    scale: float,
) -> Tensor:
    """Final latents (B, ...).

    Args:
        model: called as model(hidden_states=, timestep=, NAME=).
        noise: standard normal (B, ...).
        conditions: name of the model's argument, its value and that of no condition, (B, ...).
        sampler: a key of `SCHEDULERS`.
        steps: calls of the model.
        scale: of the guidance; at 1 the batch is the conditional half alone.
    """
    name, condition, null = conditions
    guided = scale != 1
    given = torch.cat([condition, null]) if guided else condition
    scheduler = SCHEDULERS[sampler]()
    scheduler.set_timesteps(steps)
    x = noise
    for now in scheduler.timesteps:
        batch = torch.cat([x, x]) if guided else x
        output = model(hidden_states=batch, timestep=now.expand(len(batch)), **{name: given})
        if guided:
            conditional, unconditional = output.chunk(2)
            output = unconditional + scale * (conditional - unconditional)
        x = scheduler.step(output, now, x).prev_sample
    return x
