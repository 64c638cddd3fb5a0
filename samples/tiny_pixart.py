"""PixArt-alpha at a tiny configuration with random weights: every part of the real pipeline.

Nothing is downloaded. With a trained checkpoint, this file is one line:
`PixArtAlphaPipeline.from_pretrained("PixArt-alpha/PixArt-XL-2-512x512")`.
"""

from __future__ import annotations

import string

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

TEXT_WIDTH = 32


def t5_tokenizer() -> T5TokenizerFast:
    """T5's tokenizer with a vocabulary of single characters in the place of 32,000 pieces."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(piece, -1.0) for piece in ("▁", *string.printable.strip())]
    return T5TokenizerFast(vocab=[*special, *pieces], extra_ids=0, model_max_length=64)


def t5_encoder(vocabulary: int) -> T5EncoderModel:
    """T5's encoder, two layers of width 32."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def tiny_vae(latent_channels: int = 4, **options: bool | float) -> AutoencoderKL:
    """An image autoencoder which makes 8 x 8 pixels of every latent, as the trained ones do."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=latent_channels,
        norm_num_groups=4,
        **options,
    ).eval()


def tiny_transformer() -> PixArtTransformer2DModel:
    """PixArt's transformer, four blocks of width 64 in the place of 28 of width 1152."""
    return PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=4,
        cross_attention_dim=64,
        caption_channels=TEXT_WIDTH,
        sample_size=32,
    ).eval()


def tiny_pixart() -> PixArtAlphaPipeline:
    """The pipeline: prompts in, images of 256 x 256 pixels out."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    pipe = PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(len(tokenizer)),
        vae=tiny_vae(),
        transformer=tiny_transformer(),
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
