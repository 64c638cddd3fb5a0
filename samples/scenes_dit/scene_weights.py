"""The transformer's weights on disk: float16 in two files, each small enough for a repository."""

from __future__ import annotations

from pathlib import Path

from autoencoder import WEIGHTS_FOLDER
from safetensors.torch import load_file
from scene_model import SceneDiT
from shared import half, save_atomic
from torch import Tensor


def scene_dit_files(folder: Path = WEIGHTS_FOLDER) -> tuple[Path, Path]:
    """The two files of a folder."""
    return folder / "scenes_dit_1.safetensors", folder / "scenes_dit_2.safetensors"


def save_scene_dit(state: dict[str, Tensor], folder: Path = WEIGHTS_FOLDER) -> None:
    """Write a state dict in two halves of about the same size."""
    rounded = half(state)
    total = sum(value.nbytes for value in rounded.values())
    parts: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    written = 0
    for name, value in rounded.items():
        parts[2 * written >= total][name] = value
        written += value.nbytes
    for part, path in zip(parts, scene_dit_files(folder), strict=True):
        save_atomic(part, path)


def load_scene_dit(folder: Path = WEIGHTS_FOLDER) -> SceneDiT:
    """The trained transformer in float32 and eval mode, without gradients."""
    model = SceneDiT()
    state: dict[str, Tensor] = {}
    for path in scene_dit_files(folder):
        state |= {name: value.float() for name, value in load_file(path).items()}
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)
