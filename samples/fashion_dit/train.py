"""Train the sample DiT on Fashion-MNIST; an interrupted run goes on where it stopped.

    python samples/fashion_dit/train.py --steps 6000

Every random draw is seeded by the step number, so a resumed run equals an unbroken one.
The learning rate warms up, stays, and falls to zero over the last fifth of `--steps`;
a longer run can therefore start from a checkpoint taken before that.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from data import Split, load_split
from descent import descend, falling_rate, make_optimizer, update_average
from diffusion import TRAIN_STEPS, add_noise, alpha_bar_table
from model import FashionDiT
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from weights import DIT_WEIGHTS, half, load_training_state, save_atomic, training_state


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Everything that decides the result of a training run."""

    steps: int = 6_000
    batch: int = 64
    learning_rate: float = 1e-3
    warmup: int = 500
    decay_share: float = 0.2
    weight_decay: float = 0.01
    ema_decay: float = 0.9995
    label_dropout: float = 0.1
    snr_cap: float = 5.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, constant, linear decay to zero."""
        return falling_rate(
            self.learning_rate,
            step,
            steps=self.steps,
            warmup=self.warmup,
            decay_share=self.decay_share,
        )


class Trainer:
    """Model, its moving average, the optimizer and the step number, as one resumable state."""

    def __init__(self, config: TrainConfig, data: Split) -> None:
        torch.manual_seed(config.seed)
        self.config, self.data = config, data
        self.model = FashionDiT()
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = make_optimizer(self.model, config.weight_decay)
        self.step = 0
        snr = alpha_bar_table() / (1.0 - alpha_bar_table())
        # min-SNR weighting for epsilon prediction (Hang et al. 2023, eq. 6).
        self.loss_weight = (snr.clamp(max=config.snr_cap) / snr).float()

    def train_step(self) -> float:
        """One optimizer step; returns the unweighted mean squared error of the noise."""
        config = self.config
        draw = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        index = torch.randint(len(self.data.labels), (config.batch,), generator=draw)
        images, labels = self.data.batch(index)
        dropped = torch.rand(config.batch, generator=draw) < config.label_dropout
        labels = torch.where(dropped, self.model.null_class, labels)
        timestep = torch.randint(TRAIN_STEPS, (config.batch,), generator=draw)
        noise = torch.randn(images.shape, generator=draw)
        output = self.model(add_noise(images, noise, timestep), timestep, labels)
        error = F.mse_loss(output, noise, reduction="none").mean(dim=(1, 2, 3))  # (B,)
        (error * self.loss_weight[timestep]).mean().backward()
        descend(self.model, self.optimizer, config.rate(self.step))
        update_average(self.average, self.model, config.ema_decay, self.step)
        self.step += 1
        return float(error.detach().mean())

    def state(self) -> dict[str, Tensor]:
        """Everything a later run needs, as flat tensors."""
        return training_state(self.step, self._modules(), self.optimizer)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a state written by `state`."""
        self.step = load_training_state(tensors, self._modules(), self.optimizer)

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "average": self.average}


def train(config: TrainConfig, data_folder: Path | None, out: Path, save_every: int) -> None:
    """Train until `config.steps`, with a checkpoint every `save_every` steps."""
    checkpoint, log = out / "checkpoint.safetensors", out / "log.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    trainer = Trainer(config, load_split(data_folder, train=True))
    if checkpoint.exists():
        trainer.load(load_file(checkpoint))
    losses: list[float] = []
    progress = tqdm(total=config.steps, initial=trainer.step, unit="step", mininterval=10.0)
    while trainer.step < config.steps:
        losses.append(trainer.train_step())
        progress.update()
        if trainer.step % save_every == 0 or trainer.step == config.steps:
            mean = sum(losses) / len(losses)
            losses.clear()
            progress.set_postfix(loss=f"{mean:.4f}")
            save_atomic(trainer.state(), checkpoint)
            with log.open("a") as file:
                file.write(json.dumps({"step": trainer.step, "loss": round(mean, 5)}) + "\n")
    progress.close()
    save_atomic(half(trainer.average.state_dict()), DIT_WEIGHTS)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the IDX files (default: Debian's)")
    parser.add_argument("--steps", type=int, default=TrainConfig().steps)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("out/train"), help="checkpoint and log")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = TrainConfig(steps=arguments.steps)
    train(config, arguments.data, arguments.out, arguments.save_every)


if __name__ == "__main__":
    main()
