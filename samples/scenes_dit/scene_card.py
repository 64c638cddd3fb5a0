"""Draw the sample grid of the model card and count what its captions asked for.

    python samples/scenes_dit/scene_card.py

Writes `samples/scenes_dit/scenes.png`: captions of test scenes, each under its image.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import torch
from autoencoder import latent_noise, load_autoencoder
from flow import GuidedFlow
from PIL import Image, ImageDraw
from scene_scores import agreement
from scene_weights import load_scene_dit
from scenes import IMAGE_SIZE, captions, decode_words, draw_scenes, render
from shared import load_split
from torch import Tensor

COLUMNS, ROWS, SCALE, TEXT_HEIGHT = 6, 4, 3, 64
STEPS, GUIDANCE, SHIFT = 30, 3.0, 1.5


def save_captioned(images: Tensor, texts: list[str], path: Path) -> None:
    """Write images (B, 3, 64, 64) in -1 .. 1, enlarged, each with its text below."""
    side = IMAGE_SIZE * SCALE
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (side + SCALE), rows * (side + TEXT_HEIGHT)), "white")
    pen = ImageDraw.Draw(sheet)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    for index, (pixel, text) in enumerate(zip(pixels, texts, strict=True)):
        left = index % COLUMNS * (side + SCALE)
        top = index // COLUMNS * (side + TEXT_HEIGHT)
        tile = Image.fromarray(pixel.numpy()).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(tile, (left, top))
        lines = [textwrap.shorten(part, 34) for part in text.split(" , ")]
        pen.text((left + 2, top + side + 2), "\n".join(lines), fill="black")
    sheet.save(path)


def main() -> None:
    """Sample, save the grid, print the agreement of samples and of real scenes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the IDX files (default: Debian's)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "scenes.png")
    arguments = parser.parse_args()
    draw = torch.Generator().manual_seed(2)
    test = load_split(arguments.data, train=False)
    scenes = draw_scenes(test, COLUMNS * ROWS, draw)
    asked = captions(scenes)
    sampler = GuidedFlow(STEPS, GUIDANCE, SHIFT)
    latents = sampler.sample(load_scene_dit(), latent_noise(len(asked), draw), asked)
    autoencoder = load_autoencoder()
    with torch.no_grad():
        images = autoencoder.decode(latents)
        real = autoencoder.decode(autoencoder.encode(render(scenes, test)))
    save_captioned(images, [decode_words(caption) for caption in asked], arguments.out)
    for name, shown in (("samples", images), ("real scenes, decoded", real)):
        print(f"{name}: {agreement(shown, scenes)}")


if __name__ == "__main__":
    main()
