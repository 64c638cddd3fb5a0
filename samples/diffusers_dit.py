"""A diffusers pipeline object with an optimised transformer in it.

The weights are random and tiny, so that it runs anywhere without a download; with a trained
checkpoint the four lines that matter are the same.

python samples/diffusers_dit.py
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from calicache import Plan, optimize, record

STEPS = 10


def tiny_pipeline() -> DiTPipeline:
    """DiTPipeline at a tiny configuration with random weights."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: DiTPipeline, seed: int) -> torch.Tensor:
    """Two images (2, H, W, 3) in 0 .. 1, classes 207 and 360."""
    images = pipe(
        class_labels=[207, 360],
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return torch.from_numpy(images)


def main() -> None:
    """Optimise the pipeline's transformer and compare the images."""
    pipe = tiny_pipeline()
    full = generate(pipe, seed=1)
    with record(pipe.transformer) as recording:
        generate(pipe, seed=2)
    plan = Plan.from_trajectory(pipe.transformer, recording, schedule=2, rank=32)
    pipe.transformer = optimize(pipe.transformer, plan)
    fast = generate(pipe, seed=1)
    print(f"relative difference of the images: {float((fast - full).norm() / full.norm()):.4f}")


if __name__ == "__main__":
    main()
