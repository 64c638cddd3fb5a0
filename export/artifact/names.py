"""Names of the inputs and outputs that layouts add to a model's own."""

from __future__ import annotations


def next_name(cache: str) -> str:
    """Name of the graph output that carries a cache's new value."""
    return f"{cache}_next"


STEP_INPUT = "step"


NOISE_INPUT, GUIDANCE_INPUT, LATENTS_OUTPUT = "noise", "guidance_scale", "latents"
