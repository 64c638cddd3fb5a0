"""Reading and writing of the sample's weights: safetensors only, written atomically."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
DIT_WEIGHTS = WEIGHTS_FOLDER / "fashion_dit.safetensors"
CLASSIFIER_WEIGHTS = WEIGHTS_FOLDER / "classifier.safetensors"


def save_atomic(tensors: dict[str, Tensor], path: Path) -> None:
    """Write to a temporary name, then rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
    temporary.chmod(0o644)
    os.replace(temporary, path)


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load a state dict of any float type into a float32 model; returns it in eval mode."""
    state = {
        name: value.float() if value.is_floating_point() else value
        for name, value in load_file(path).items()
    }
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same state with float tensors rounded to float16, for a small file."""
    return {
        name: value.to(torch.float16) if value.is_floating_point() else value
        for name, value in state.items()
    }


def training_state(
    step: int, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Everything that a later run needs, as flat tensors: `part.name` for each module's values."""
    tensors = {"step": torch.tensor(step)}
    for part, module in modules.items():
        tensors |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    return tensors


def load_training_state(
    tensors: dict[str, Tensor], modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> int:
    """Load what `training_state` wrote into modules and optimizer; returns the step."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in (*modules, "optimizer")}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        if rest:
            parts[part][rest] = value
    for part, module in modules.items():
        module.load_state_dict(parts[part])
    saved = optimizer.state_dict()
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    for name, value in parts["optimizer"].items():
        index, _, moment = name.partition(".")
        parameter = parameters[int(index)]
        # Fused optimizers walk through memory: moments must lie in it as their parameter does.
        laid = value if value.ndim == 0 else torch.empty_like(parameter).copy_(value)
        saved["state"].setdefault(int(index), {})[moment] = laid
    optimizer.load_state_dict(saved)
    return int(tensors["step"])
