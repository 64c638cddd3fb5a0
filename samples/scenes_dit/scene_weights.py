"""The transformer's weights on disk: float16 in two files, each small enough for a repository."""

from __future__ import annotations

from pathlib import Path

from autoencoder import WEIGHTS_FOLDER
from safetensors.torch import load_file
from scene_model import SceneDiT
from shared import half, save_atomic
from torch import Tensor

SCENE_DIT_WEIGHTS = tuple(WEIGHTS_FOLDER / f"scenes_dit_{part}.safetensors" for part in (1, 2))


def save_scene_dit(state: dict[str, Tensor]) -> tuple[Path, ...]:
    """Write a state dict in two halves of about the same size; returns their paths."""
    rounded = half(state)
    sizes = {name: value.nbytes for name, value in rounded.items()}
    parts: tuple[dict[str, Tensor], ...] = ({}, {})
    written = 0
    for name, value in rounded.items():
        parts[2 * written >= sum(sizes.values())][name] = value
        written += sizes[name]
    for part, path in zip(parts, SCENE_DIT_WEIGHTS, strict=True):
        save_atomic(part, path)
    return SCENE_DIT_WEIGHTS


def load_scene_dit() -> SceneDiT:
    """The trained transformer in float32 and eval mode, without gradients."""
    model = SceneDiT()
    state = {name: value for path in SCENE_DIT_WEIGHTS for name, value in load_file(path).items()}
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval().requires_grad_(False)
