"""Train the scenes' transformer; an interrupted run goes on where it stopped.

    python samples/scenes_dit/train_scenes.py --steps 10000
    python samples/scenes_dit/train_scenes.py --release

Every random draw is seeded by the step number, so a resumed run equals an unbroken one.
Scenes are drawn, rendered and encoded for each step anew. Most steps see a quarter of the places of
every latent, which takes a quarter of the time (Zheng et al., "Fast training of diffusion models
with masked transformers", TMLR 2024, without its decoder); the last ones see all. The learning
rate warms up, stays, and falls to zero over the last fifth of `--steps`; the moving
average can be released at any time before that.
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
from autoencoder import WEIGHTS_FOLDER, Autoencoder, latent_noise, load_autoencoder
from flow import TIME_SCALE, add_noise, draw_times
from safetensors.torch import load_file
from scene_model import SceneDiT, SceneDiTConfig
from scene_weights import save_scene_dit
from scenes import PADDING, captions, draw_scenes, render
from shared import (
    Split,
    descend,
    falling_rate,
    load_split,
    load_training_state,
    make_optimizer,
    training_state,
    update_average,
)
from torch import Tensor, nn
from training import CHECKPOINT, run


@dataclass(frozen=True, slots=True)
class SceneTrainConfig:
    """Everything that decides the result of a training run."""

    steps: int = 10_000
    batch: int = 32
    thin_share: float = 0.85
    thin_places: int = 64
    learning_rate: float = 1e-3
    warmup: int = 500
    decay_share: float = 0.2
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    caption_dropout: float = 0.1
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


class SceneTrainer:
    """Model, its moving average, the optimizer and the step number, as one resumable state."""

    def __init__(
        self,
        config: SceneTrainConfig,
        data: Split,
        autoencoder: Autoencoder,
        sizes: SceneDiTConfig | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.data, self.autoencoder = config, data, autoencoder
        self.model = SceneDiT(sizes)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = make_optimizer(self.model, config.weight_decay)
        self.step = 0

    def train_step(self) -> float:
        """One optimizer step; returns the mean squared error of the velocity."""
        config = self.config
        draw = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        scenes = draw_scenes(self.data, config.batch, draw)
        with torch.no_grad():
            latents = self.autoencoder.encode(render(scenes, self.data))
        dropped = torch.rand(config.batch, 1, generator=draw) < config.caption_dropout
        caption = captions(scenes).masked_fill(dropped, PADDING)
        time = draw_times(config.batch, draw)
        noise = latent_noise(config.batch, draw)
        noisy, velocity = add_noise(latents, noise, time), noise - latents
        places = self._places(draw)  # (B, M)
        output = self.model.token_velocity(
            _at(noisy, places), self.model.positions[0, places], TIME_SCALE * time, caption
        )  # (B, M, 4)
        error = F.mse_loss(output, _at(velocity, places))
        error.backward()
        descend(self.model, self.optimizer, config.rate(self.step))
        update_average(self.average, self.model, config.ema_decay, self.step)
        self.step += 1
        return float(error.detach())

    def _places(self, draw: torch.Generator) -> Tensor:
        """Places that each latent of a batch is trained on at this step, int64 (B, M)."""
        config, count = self.config, self.model.config.grid**2
        thin = self.step < config.thin_share * config.steps
        places = config.thin_places if thin else count
        return torch.rand(config.batch, count, generator=draw).argsort(dim=1)[:, :places]

    def state(self) -> dict[str, Tensor]:
        """Everything a later run needs, as flat tensors."""
        return training_state(self.step, self._modules(), self.optimizer)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a state written by `state`."""
        self.step = load_training_state(tensors, self._modules(), self.optimizer)

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "average": self.average}


def _at(latents: Tensor, places: Tensor) -> Tensor:
    """Latents (B, C, H, W) at places (B, M), counted along the rows: tokens (B, M, C)."""
    tokens = latents.flatten(2).transpose(1, 2)  # (B, N, C)
    return tokens.gather(1, places.unsqueeze(2).expand(-1, -1, tokens.shape[2]))


def release(out: Path, folder: Path = WEIGHTS_FOLDER) -> int:
    """Write the moving average of a folder's checkpoint as weights; returns its step."""
    tensors = load_file(out / CHECKPOINT)
    prefix = "average."
    average = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    save_scene_dit(average, folder)
    return int(tensors["step"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the IDX files (default: Debian's)")
    parser.add_argument("--steps", type=int, default=SceneTrainConfig().steps)
    parser.add_argument("--minutes", type=float, help="stop after this time; goes on when called")
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=Path("out/scenes_dit"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--release", action="store_true", help="write the average and end")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = SceneTrainConfig(steps=arguments.steps)
    over = arguments.release
    if not over:
        data = load_split(arguments.data, train=True)
        trainer = SceneTrainer(config, data, load_autoencoder())
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
        save_minutes, minutes = arguments.save_minutes, arguments.minutes
        over = run(trainer, config.steps, arguments.out, save_minutes=save_minutes, minutes=minutes)
    if over:
        print(f"step {release(arguments.out)}, wrote {WEIGHTS_FOLDER}")


if __name__ == "__main__":
    main()
