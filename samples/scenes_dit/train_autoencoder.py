"""Train the autoencoder of the scenes; an interrupted run goes on where it stopped.

    python samples/scenes_dit/train_autoencoder.py --steps 2000

Every random draw is seeded by the step number, so a resumed run equals an unbroken one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from autoencoder import AUTOENCODER_WEIGHTS, Autoencoder, latent_noise, load_autoencoder
from scenes import draw_scenes, render
from shared import (
    Split,
    descend,
    half,
    load_split,
    load_training_state,
    make_optimizer,
    save_atomic,
    training_state,
)
from torch import Tensor
from training import run


@dataclass(frozen=True, slots=True)
class AutoencoderConfig:
    """Everything that decides the result of a training run."""

    steps: int = 2_000
    batch: int = 16
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.01
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, then half a cosine down to zero."""
        falling = 0.5 + 0.5 * math.cos(math.pi * min(step / self.steps, 1.0))
        return self.learning_rate * min((step + 1) / self.warmup, falling)


class AutoencoderTrainer:
    """Autoencoder, optimizer and step number, as one resumable state."""

    def __init__(self, config: AutoencoderConfig, data: Split) -> None:
        torch.manual_seed(config.seed)
        self.config, self.data = config, data
        # Convolutions on a CPU are faster with the channels last.
        self.model = Autoencoder().to(memory_format=torch.channels_last).train()
        self.optimizer = make_optimizer(self.model, config.weight_decay)
        self.step = 0

    def train_step(self) -> float:
        """One optimizer step; returns the mean squared error of the images."""
        config = self.config
        draw = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        images = render(draw_scenes(self.data, config.batch, draw), self.data)
        images = images.contiguous(memory_format=torch.channels_last)
        output = self.model(images, latent_noise(config.batch, draw))
        error = F.mse_loss(output, images)
        # The absolute error keeps edges sharp once the squared one is small.
        (error + 0.1 * F.l1_loss(output, images)).backward()
        descend(self.model, self.optimizer, config.rate(self.step))
        self.step += 1
        return float(error.detach())

    def state(self) -> dict[str, Tensor]:
        """Everything a later run needs, as flat tensors."""
        return training_state(self.step, {"model": self.model}, self.optimizer)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a state written by `state`."""
        self.step = load_training_state(tensors, {"model": self.model}, self.optimizer)


@torch.inference_mode()
def measure(model: Autoencoder, test: Split, batch: int = 256) -> dict[str, float]:
    """PSNR in dB of scenes of test items, with and without noise, and the latents' deviation."""
    draw = torch.Generator().manual_seed(1)
    images = render(draw_scenes(test, batch, draw), test)
    latents = model.encode(images)
    noisy = model(images, latent_noise(batch, draw))
    errors = [F.mse_loss(output, images) for output in (model.decode(latents), noisy)]
    psnr, noisy_psnr = (10 * math.log10(4.0 / float(error)) for error in errors)
    figures = {"psnr": psnr, "psnr_with_noise": noisy_psnr, "deviation": float(latents.std())}
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the IDX files (default: Debian's)")
    parser.add_argument("--steps", type=int, default=AutoencoderConfig().steps)
    parser.add_argument("--minutes", type=float, help="stop after this time; goes on when called")
    parser.add_argument("--save-minutes", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path("out/scenes_autoencoder"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = AutoencoderConfig(steps=arguments.steps)
    trainer = AutoencoderTrainer(config, load_split(arguments.data, train=True))
    if not run(
        trainer,
        config.steps,
        arguments.out,
        save_minutes=arguments.save_minutes,
        minutes=arguments.minutes,
    ):
        return
    save_atomic(half(trainer.model.state_dict()), AUTOENCODER_WEIGHTS)
    figures = measure(load_autoencoder(), load_split(arguments.data, train=False))
    report = json.dumps(figures | {"steps": config.steps, "seed": config.seed}, indent=2)
    AUTOENCODER_WEIGHTS.with_suffix(".json").write_text(report + "\n")
    print(f"wrote {AUTOENCODER_WEIGHTS}: {figures}")


if __name__ == "__main__":
    main()
