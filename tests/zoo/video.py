"""Video diffusion transformers of diffusers at tiny configurations."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from diffusers.models.transformers.transformer_sana_wm_refiner import (
    SanaWMLTX2AudioVideoRotaryPosEmbed,
)
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor, nn

from zoo.entry import ZooEntry
from zoo.prompts import TEXT, Inputs, prompt, prompt_mask

FLOAT_STEPS = (1000.0, 20.0)


def _float_step(batch: int) -> Tensor:
    return torch.full((batch,), 1000.0)


def _long_step(batch: int) -> Tensor:
    return torch.full((batch,), 999)


# Wan and its descendants: the timesteps of UniPC are integers.


def _wan_config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return config | changes


def _wan_inputs(batch: int, channels: int = 4, frames: int = 2) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, channels, frames, 8, 8),
        "timestep": _long_step(batch),
        "encoder_hidden_states": prompt(batch),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _wan_text() -> nn.Module:
    return diffusers.WanTransformer3DModel(**_wan_config())


def _wan_image() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        **_wan_config(in_channels=12, image_dim=16, added_kv_proj_dim=24)
    )


def _wan_image_inputs(batch: int) -> Inputs:
    return {
        **_wan_inputs(batch, channels=12),
        "encoder_hidden_states_image": torch.randn(batch, 5, 16),
    }


def _wan_expanded_inputs(batch: int) -> Inputs:
    """Wan 2.2 TI2V: a timestep for every token, a float since a mask has multiplied it."""
    return {**_wan_inputs(batch), "timestep": torch.full((batch, 2 * 4 * 4), 999.0)}


def _wan_vace() -> nn.Module:
    return diffusers.WanVACETransformer3DModel(
        **_wan_config(vace_layers=[0, 1], vace_in_channels=8)
    )


def _wan_vace_inputs(batch: int) -> Inputs:
    return {
        **_wan_inputs(batch),
        "control_hidden_states": torch.randn(batch, 8, 2, 8, 8),
        "control_hidden_states_scale": torch.ones(2),
    }


def _wan_animate() -> nn.Module:
    return diffusers.WanAnimateTransformer3DModel(
        **_wan_config(in_channels=12, image_dim=16),
        latent_channels=4,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )


def _wan_animate_inputs(batch: int) -> Inputs:
    return {
        **_wan_inputs(batch, channels=12, frames=3),
        "encoder_hidden_states_image": torch.randn(batch, 5, 16),
        "pose_hidden_states": torch.randn(batch, 4, 2, 8, 8),
        "face_pixel_values": torch.randn(batch, 3, 5, 16, 16),
        "motion_encode_batch_size": 8,
    }


def _wan_animate_2() -> nn.Module:
    return diffusers.WanAnimate2Transformer3DModel(
        text_len=8,
        in_dim=12,
        dim=48,
        ffn_dim=64,
        freq_dim=32,
        text_dim=16,
        out_dim=4,
        num_heads=4,
        num_layers=2,
    )


def _wan_animate_2_inputs(batch: int) -> Inputs:
    """A step of the generation: the keys of the reference, of a pass before, come in a cache."""
    cache = WanAnimate2KVCache(2)
    for layer in cache.layer_caches:
        layer.store(torch.randn(batch, 8, 4, 12), torch.randn(batch, 8, 4, 12))
    return {
        "hidden_states": [torch.randn(4, 3, 4, 4) for _ in range(batch)],
        "timestep": torch.full((batch,), 999.0),
        "encoder_hidden_states": [torch.randn(TEXT, 16) for _ in range(batch)],
        "condition_latents": [torch.randn(8, 3, 4, 4) for _ in range(batch)],
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": 12,
        "encoder_hidden_states_image": torch.randn(batch, 4, 1280),
        "reference_grid_sizes": torch.tensor([[2, 2, 2]]).expand(batch, 3),
        "origin_len": 5,
        "origin_area": [32, 32],
        "return_dict": False,
    }


def _skyreels() -> nn.Module:
    return diffusers.SkyReelsV2Transformer3DModel(**_wan_config())


def _skyreels_forcing() -> nn.Module:
    return diffusers.SkyReelsV2Transformer3DModel(**_wan_config(num_frame_per_block=2))


def _skyreels_forcing_inputs(batch: int) -> Inputs:
    """A timestep for every frame."""
    return {
        **_wan_inputs(batch, frames=4),
        "timestep": torch.full((batch, 4), 999),
        "enable_diffusion_forcing": True,
        "fps": [1] * batch,
    }


def _chronoedit() -> nn.Module:
    return diffusers.ChronoEditTransformer3DModel(
        **_wan_config(in_channels=12, image_dim=16, added_kv_proj_dim=24)
    )


def _anyflow() -> nn.Module:
    return diffusers.AnyFlowTransformer3DModel(**_wan_config())


def _anyflow_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 2, 4, 8, 8),
        "timestep": torch.full((batch, 2), 1000.0),
        "r_timestep": torch.full((batch, 2), 750.0),
        "encoder_hidden_states": prompt(batch),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _anyflow_far() -> nn.Module:
    return diffusers.AnyFlowFARTransformer3DModel(
        **_wan_config(), compressed_patch_size=(1, 4, 4), chunk_partition=(1, 2)
    )


def _anyflow_far_inputs(batch: int) -> Inputs:
    """The second chunk, of two frames; the keys and values of the first are in the cache.

    The model itself writes the counts of tokens into the flags, of which the pipeline gives it a
    copy at every step.
    """
    return {
        **_anyflow_inputs(batch),
        "chunk_partition": [1, 2],
        "kv_cache": {
            layer: {
                "compressed_cache": torch.zeros(2, batch, 2, 3 * 2 * 2, 12),
                "full_cache": torch.randn(2, batch, 2, 3 * 4 * 4, 12),
            }
            for layer in range(2)
        },
        "kv_cache_flag": {
            "num_cached_chunks": 1,
            "is_cache_step": False,
            "num_cached_full_tokens": 16,
            "num_cached_compressed_tokens": 0,
        },
    }


def _helios() -> nn.Module:
    config = _wan_config(rope_dim=(4, 4, 4))
    del config["rope_max_seq_len"]
    return diffusers.HeliosTransformer3DModel(**config)


def _helios_inputs(batch: int) -> Inputs:
    """History of 4, 2 and 1 frames and an image before the two frames in the making."""
    indices = torch.arange(10)[None]
    return {
        **_wan_inputs(batch),
        "indices_hidden_states": indices[:, 8:],
        "indices_latents_history_short": indices[:, [0, 7]],
        "indices_latents_history_mid": indices[:, 5:7],
        "indices_latents_history_long": indices[:, 1:5],
        "latents_history_short": torch.randn(batch, 4, 2, 8, 8),
        "latents_history_mid": torch.randn(batch, 4, 2, 8, 8),
        "latents_history_long": torch.randn(batch, 4, 4, 8, 8),
    }


# Hunyuan: the masks of the prompts have the dtype of the model.


def _hunyuan_config() -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 4, 4),
    }


def _hunyuan_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2, 8, 8),
        "timestep": _float_step(batch),
        "encoder_hidden_states": prompt(batch),
        "encoder_attention_mask": prompt_mask(batch, torch.float32),
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _hunyuan() -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(**_hunyuan_config())


def _hunyuan_15() -> nn.Module:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=(4, 4, 4),
        target_size=16,
        task_type="t2v",
    )


def _hunyuan_15_inputs(batch: int) -> Inputs:
    """Text to video: the embeddings of the image are zeros, and so is the second prompt's mask."""
    return {
        "hidden_states": torch.randn(batch, 9, 2, 4, 4),
        "timestep": _float_step(batch),
        "encoder_hidden_states": prompt(batch),
        "encoder_attention_mask": prompt_mask(batch, torch.float32),
        "encoder_hidden_states_2": torch.zeros(batch, 4, 8),
        "encoder_attention_mask_2": torch.zeros(batch, 4),
        "image_embeds": torch.zeros(batch, 3, 12),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _framepack() -> nn.Module:
    return diffusers.HunyuanVideoFramepackTransformer3DModel(
        **_hunyuan_config(), has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True
    )


def _framepack_inputs(batch: int) -> Inputs:
    """An image, two frames in the making, and a history of 1, 2 and 4 frames."""
    return {
        **_hunyuan_inputs(batch),
        "image_embeds": torch.randn(batch, 5, 16),
        "indices_latents": torch.arange(1, 3),
        "latents_clean": torch.randn(batch, 4, 2, 8, 8),
        "indices_latents_clean": torch.tensor([0, 3]),
        "latents_history_2x": torch.randn(batch, 4, 2, 8, 8),
        "indices_latents_history_2x": torch.arange(4, 6),
        "latents_history_4x": torch.randn(batch, 4, 4, 8, 8),
        "indices_latents_history_4x": torch.arange(6, 10),
    }


def _motif() -> nn.Module:
    return diffusers.MotifVideoTransformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=4,
        num_decoder_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=16,
        image_embed_dim=16,
        rope_axes_dim=(4, 4, 4),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )


def _motif_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 9, 2, 8, 8),
        "timestep": _float_step(batch),
        "encoder_hidden_states": prompt(batch),
        "encoder_attention_mask": prompt_mask(batch, torch.long),
        "attention_kwargs": None,
        "return_dict": False,
    }


# CogVideoX: frames before channels.


def _cogvideox_config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 16,
        "text_embed_dim": 16,
        "num_layers": 2,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 5,
        "max_text_seq_length": TEXT,
    }
    return config | changes


def _cogvideox_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 2, 4, 8, 8),
        "encoder_hidden_states": prompt(batch),
        "timestep": _long_step(batch),
        "image_rotary_emb": None,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _cogvideox() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(**_cogvideox_config())


def _cogvideox_15() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        **_cogvideox_config(
            patch_size_t=2,
            patch_bias=False,
            ofs_embed_dim=16,
            use_rotary_positional_embeddings=True,
        )
    )


def _cogvideox_15_inputs(batch: int) -> Inputs:
    return {
        **_cogvideox_inputs(batch),
        "ofs": torch.full((1,), 2.0),
        "image_rotary_emb": get_3d_rotary_pos_embed(
            embed_dim=16,
            crops_coords=None,
            grid_size=(4, 4),
            temporal_size=1,
            grid_type="slice",
            max_size=(4, 4),
        ),
    }


def _consisid() -> nn.Module:
    return diffusers.ConsisIDTransformer3DModel(
        **_cogvideox_config(num_attention_heads=3, use_rotary_positional_embeddings=True),
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=8,
        LFE_vit_dim=8,
        LFE_depth=4,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=2,
        LFE_output_dim=32,
        LFE_ff_mult=2,
        LFE_num_scale=2,
    )


def _consisid_inputs(batch: int) -> Inputs:
    return {
        **_cogvideox_inputs(batch),
        "image_rotary_emb": get_3d_rotary_pos_embed(
            embed_dim=16, crops_coords=((0, 0), (4, 4)), grid_size=(4, 4), temporal_size=2
        ),
        "id_vit_hidden": [torch.randn(batch, 3, 8) for _ in range(2)],
        "id_cond": torch.randn(batch, 8),
    }


def _easyanimate() -> nn.Module:
    return diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=3,
        mmdit_layers=2,
        time_embed_dim=8,
        text_embed_dim=16,
        add_norm_text_encoder=True,
    )


def _easyanimate_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 4, 2, 8, 8),
        "timestep": _float_step(batch),
        "encoder_hidden_states": prompt(batch),
        "return_dict": False,
    }


# Latents packed to tokens.


def _ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )


def _ltx_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 2 * 4 * 4, 8),
        "encoder_hidden_states": prompt(batch),
        "timestep": _float_step(batch),
        "encoder_attention_mask": prompt_mask(batch, torch.bool),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _ltx_2_config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 4,
        "audio_cross_attention_dim": 8,
        "num_layers": 2,
        "caption_channels": 16,
    }
    return config | changes


def _ltx_2() -> nn.Module:
    return diffusers.LTX2VideoTransformer3DModel(**_ltx_2_config())


def _ltx_2_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 2 * 4 * 4, 4),
        "audio_hidden_states": torch.randn(batch, 5, 4),
        "encoder_hidden_states": prompt(batch),
        "audio_encoder_hidden_states": prompt(batch),
        "timestep": _float_step(batch),
        "sigma": _float_step(batch),
        "encoder_attention_mask": prompt_mask(batch, torch.long),
        "audio_encoder_attention_mask": prompt_mask(batch, torch.long),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "fps": 24.0,
        "audio_num_frames": 5,
        "isolate_modalities": False,
        "spatio_temporal_guidance_blocks": None,
        "perturbation_mask": None,
        "use_cross_timestep": False,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _sana_wm_refiner() -> nn.Module:
    return diffusers.SanaWMLTX2RefinerTransformer3DModel(**_ltx_2_config())


def _sana_wm_refiner_inputs(batch: int) -> Inputs:
    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(
        dim=16,
        patch_size=1,
        patch_size_t=1,
        base_num_frames=20,
        base_height=2048,
        base_width=2048,
        scale_factors=(8, 32, 32),
        modality="video",
        num_attention_heads=2,
    )
    cpu = torch.device("cpu")
    coordinates = rope.prepare_video_coords(batch, 2, 4, 4, device=cpu, fps=24.0)
    return {
        "hidden_states": torch.randn(batch, 2 * 4 * 4, 4),
        "encoder_hidden_states": prompt(batch),
        "timestep": torch.full((batch, 2 * 4 * 4), 900.0),
        "video_rotary_emb": rope(coordinates, device=cpu),
        "encoder_attention_mask": prompt_mask(batch, torch.long),
        "return_dict": False,
    }


def _minimax_h3() -> nn.Module:
    return diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=2,
        ffn_dim=32,
        in_channels=4,
        audio_in_channels=6,
        text_dim=16,
        freq_dim=8,
        time_embed_hidden_dim=24,
        time_embed_dim=16,
        rope_freq_dim=2,
    )


def _minimax_h3_inputs(batch: int) -> Inputs:
    """One packed row: text, then audio, then video; video and audio at one time, going up."""
    length = TEXT + 6 + 8
    text, audio, video = torch.arange(length).split([TEXT, 6, 8])
    tags = torch.empty(length, dtype=torch.long)
    tags[video], tags[text], tags[audio] = 0, 1, 2
    positions = torch.zeros(length, 3)
    positions[:, 0] = torch.arange(length).clamp(max=TEXT + 6).float()
    positions[video, 1] = (torch.arange(8) // 4).float()
    positions[video, 2] = (torch.arange(8) % 4).float()
    return {
        "hidden_states": torch.randn(batch, 8, 16),
        "audio_hidden_states": torch.randn(batch, 6, 6),
        "encoder_hidden_states": prompt(batch),
        "timestep": torch.zeros(1),
        "timestep_indices": torch.zeros(length, dtype=torch.long),
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
        "attention_kwargs": None,
        "return_dict": False,
    }


# The others.


def _mochi() -> nn.Module:
    return diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=TEXT,
    )


def _mochi_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 4, 2, 8, 8),
        "encoder_hidden_states": prompt(batch),
        "timestep": torch.zeros(batch),
        "encoder_attention_mask": prompt_mask(batch, torch.bool),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _latte() -> nn.Module:
    return diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=16,
        video_length=3,
    )


def _latte_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 4, 3, 8, 8),
        "encoder_hidden_states": prompt(batch),
        "timestep": _long_step(batch),
        "enable_temporal_attentions": True,
        "return_dict": False,
    }


def _allegro() -> nn.Module:
    return diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        sample_height=8,
        sample_width=8,
        sample_frames=2,
        caption_channels=16,
    )


def _allegro_inputs(batch: int) -> Inputs:
    freqs_t, freqs_h, freqs_w, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(
        embed_dim=12,
        crops_coords=((0, 0), (4, 4)),
        grid_size=(4, 4),
        temporal_size=2,
        interpolation_scale=(2.2, 2.0, 2.0),
    )
    positions = torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long())
    grids = positions.T[:, None].contiguous().unbind()
    return {
        "hidden_states": torch.randn(batch, 4, 2, 8, 8),
        "encoder_hidden_states": prompt(batch),
        "encoder_attention_mask": prompt_mask(batch, torch.long),
        "timestep": _long_step(batch),
        "image_rotary_emb": ((freqs_t, freqs_h, freqs_w), grids),
        "return_dict": False,
    }


def _cosmos_config(**changes: Any) -> dict[str, Any]:
    """No mask of the padding in the channels: it would want torchvision."""
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": 32,
        "adaln_lora_dim": 8,
        "max_size": (4, 16, 16),
        "concat_padding_mask": False,
    }
    return config | changes


def _cosmos() -> nn.Module:
    return diffusers.CosmosTransformer3DModel(**_cosmos_config())


def _cosmos_inputs(batch: int) -> Inputs:
    """The first Cosmos counts EDM noise levels: a quarter of the logarithm of sigma."""
    return {
        "hidden_states": torch.randn(batch, 4, 2, 8, 8),
        "timestep": torch.full((batch,), 1.0955),
        "encoder_hidden_states": prompt(batch, 32),
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, 64, 64),
        "return_dict": False,
    }


def _cosmos_25() -> nn.Module:
    return diffusers.CosmosTransformer3DModel(
        **_cosmos_config(
            in_channels=5,
            extra_pos_embed_type=None,
            use_crossattn_projection=True,
            crossattn_proj_in_channels=24,
            encoder_hidden_states_channels=32,
        )
    )


def _cosmos_25_inputs(batch: int) -> Inputs:
    """Video to world of Cosmos 2.5: a timestep for every frame, the first frame given."""
    given = torch.zeros(batch, 1, 3, 8, 8)
    given[:, :, :1] = 1.0
    return {
        "hidden_states": torch.randn(batch, 4, 3, 8, 8),
        "condition_mask": given,
        "timestep": torch.full((batch, 1, 3, 1, 1), 1.0),
        "encoder_hidden_states": prompt(batch, 24),
        "padding_mask": torch.zeros(1, 1, 64, 64),
        "return_dict": False,
    }


def _cosmos_3() -> nn.Module:
    return diffusers.Cosmos3OmniTransformer(
        head_dim=12,
        hidden_size=24,
        intermediate_size=48,
        latent_channel=4,
        latent_patch_size=2,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        patch_latent_dim=16,
        rope_axes_dim=[2, 2, 2],
        vocab_size=32,
    )


def _cosmos_3_inputs(batch: int) -> Inputs:
    """Packed into one row, a video for each of the batch; the pipeline itself has one alone."""
    frames, height, width = 2, 4, 4
    video = torch.stack(
        torch.meshgrid(
            *(torch.arange(n, dtype=torch.long) for n in (frames, height, width)), indexing="ij"
        )
    ).flatten(1)
    text = torch.arange(TEXT).expand(3, TEXT)
    tokens = torch.arange(TEXT, TEXT + batch * frames * height * width)
    return {
        "input_ids": torch.randint(32, (TEXT,)),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.cat([text, *[video + TEXT] * batch], dim=1),
        "und_len": TEXT,
        "sequence_length": TEXT + len(tokens),
        "vision_tokens": [torch.randn(1, 4, 2, 8, 8) for _ in range(batch)],
        "vision_token_shapes": [(frames, height, width)] * batch,
        "vision_sequence_indexes": tokens,
        "vision_mse_loss_indexes": tokens,
        "vision_timesteps": torch.full((len(tokens),), 1000.0),
        "vision_noisy_frame_indexes": [torch.arange(frames)] * batch,
        "return_dict": False,
    }


def _sana_video() -> nn.Module:
    return diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=8,
        rope_max_seq_len=32,
    )


def _sana_video_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 4, 2, 8, 8),
        "encoder_hidden_states": prompt(batch),
        "encoder_attention_mask": prompt_mask(batch, torch.long),
        "timestep": _float_step(batch),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _sana_wm() -> nn.Module:
    return diffusers.SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        softmax_every_n=2,
        linear_head_dim=16,
        caption_channels=16,
        mlp_ratio=2.0,
        chunk_plucker_channels=8,
        chunk_plucker_post_attn_blocks=2,
    )


def _sana_wm_inputs(batch: int) -> Inputs:
    """A camera that moves ahead: 4x4 matrices to the world, then the focal lengths and centre."""
    pose = torch.eye(4).repeat(batch, 3, 1, 1)
    pose[..., 2, 3] = torch.arange(3) * 0.1
    lens = torch.tensor([4.0, 4.0, 2.0, 2.0]).expand(batch, 3, 4)
    return {
        "hidden_states": torch.randn(batch, 4, 3, 4, 4),
        "timestep": torch.full((batch, 1, 3), 1000.0),
        "encoder_hidden_states": prompt(batch)[:, None],
        "mask": prompt_mask(batch, torch.long),
        "data_info": {"img_hw": torch.tensor([[128.0, 128.0]])},
        "camera_conditions": torch.cat([pose.flatten(-2), lens], dim=-1),
        "chunk_plucker": torch.randn(batch, 8, 3, 4, 4),
        "return_dict": False,
    }


def _kandinsky_5() -> nn.Module:
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
        visual_cond=True,
    )


def _kandinsky_5_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 2, 8, 8, 9),
        "encoder_hidden_states": prompt(batch),
        "pooled_projections": torch.randn(batch, 8),
        "timestep": _float_step(batch),
        "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(TEXT),
        "scale_factor": (1.0, 2.0, 2.0),
        "sparse_params": None,
        "return_dict": True,
    }


def _kandinsky_6() -> nn.Module:
    return diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
        in_audio_dim=4,
        out_audio_dim=4,
    )


def _kandinsky_6_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 2, 8, 8, 9),
        "audio_hidden_states": torch.randn(batch, 5, 4),
        "encoder_hidden_states": prompt(batch),
        "pooled_projections": torch.randn(batch, 8),
        "timestep": _float_step(batch),
        "visual_rope_pos": (torch.arange(2), torch.arange(4), torch.arange(4)),
        "encoder_attention_mask": prompt_mask(batch, torch.bool),
        "visual_token_type_ids": None,
        "return_dict": False,
    }


def _kandinsky_6_sr() -> nn.Module:
    return diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
        nabla_window=(1, 1, 1),
    )


def _kandinsky_6_sr_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 2, 8, 8, 9),
        "timestep": _float_step(batch),
        "return_dict": False,
    }


ENTRIES: tuple[ZooEntry, ...] = (
    ZooEntry("WanTransformer3DModel", _wan_text, _wan_inputs),
    ZooEntry("WanTransformer3DModel image", _wan_image, _wan_image_inputs),
    ZooEntry("WanTransformer3DModel expanded", _wan_text, _wan_expanded_inputs),
    ZooEntry("WanVACETransformer3DModel", _wan_vace, _wan_vace_inputs),
    ZooEntry("WanAnimateTransformer3DModel", _wan_animate, _wan_animate_inputs),
    ZooEntry(
        "WanAnimate2Transformer3DModel",
        _wan_animate_2,
        _wan_animate_2_inputs,
        latent="hidden_states.0",
    ),
    ZooEntry("SkyReelsV2Transformer3DModel", _skyreels, _wan_inputs),
    ZooEntry("SkyReelsV2Transformer3DModel forcing", _skyreels_forcing, _skyreels_forcing_inputs),
    ZooEntry("ChronoEditTransformer3DModel", _chronoedit, _wan_image_inputs),
    ZooEntry("AnyFlowTransformer3DModel", _anyflow, _anyflow_inputs, timesteps=FLOAT_STEPS),
    ZooEntry(
        "AnyFlowFARTransformer3DModel", _anyflow_far, _anyflow_far_inputs, timesteps=FLOAT_STEPS
    ),
    ZooEntry("HeliosTransformer3DModel", _helios, _helios_inputs),
    ZooEntry("HunyuanVideoTransformer3DModel", _hunyuan, _hunyuan_inputs, timesteps=FLOAT_STEPS),
    ZooEntry(
        "HunyuanVideo15Transformer3DModel", _hunyuan_15, _hunyuan_15_inputs, timesteps=FLOAT_STEPS
    ),
    ZooEntry(
        "HunyuanVideoFramepackTransformer3DModel",
        _framepack,
        _framepack_inputs,
        timesteps=FLOAT_STEPS,
    ),
    ZooEntry("MotifVideoTransformer3DModel", _motif, _motif_inputs, timesteps=FLOAT_STEPS),
    ZooEntry("CogVideoXTransformer3DModel", _cogvideox, _cogvideox_inputs),
    ZooEntry("CogVideoXTransformer3DModel 1.5", _cogvideox_15, _cogvideox_15_inputs),
    ZooEntry("ConsisIDTransformer3DModel", _consisid, _consisid_inputs),
    ZooEntry(
        "EasyAnimateTransformer3DModel", _easyanimate, _easyanimate_inputs, timesteps=FLOAT_STEPS
    ),
    ZooEntry("LTXVideoTransformer3DModel", _ltx, _ltx_inputs, timesteps=FLOAT_STEPS),
    ZooEntry("LTX2VideoTransformer3DModel", _ltx_2, _ltx_2_inputs, timesteps=FLOAT_STEPS),
    ZooEntry(
        "SanaWMLTX2RefinerTransformer3DModel",
        _sana_wm_refiner,
        _sana_wm_refiner_inputs,
        timesteps=(900.0, 400.0),
    ),
    ZooEntry("MiniMaxH3Transformer3DModel", _minimax_h3, _minimax_h3_inputs, timesteps=(0.0, 0.98)),
    ZooEntry("MochiTransformer3DModel", _mochi, _mochi_inputs, timesteps=(0.0, 980.0)),
    ZooEntry("LatteTransformer3DModel", _latte, _latte_inputs),
    ZooEntry("AllegroTransformer3DModel", _allegro, _allegro_inputs),
    ZooEntry("CosmosTransformer3DModel", _cosmos, _cosmos_inputs, timesteps=(1.0955, -1.5)),
    ZooEntry("CosmosTransformer3DModel 2.5", _cosmos_25, _cosmos_25_inputs, timesteps=(1.0, 0.02)),
    ZooEntry(
        "Cosmos3OmniTransformer",
        _cosmos_3,
        _cosmos_3_inputs,
        latent="vision_tokens.0",
        timestep="vision_timesteps",
        timesteps=FLOAT_STEPS,
    ),
    ZooEntry("SanaVideoTransformer3DModel", _sana_video, _sana_video_inputs, timesteps=FLOAT_STEPS),
    ZooEntry("SanaWMTransformer3DModel", _sana_wm, _sana_wm_inputs, timesteps=FLOAT_STEPS),
    ZooEntry(
        "Kandinsky5Transformer3DModel", _kandinsky_5, _kandinsky_5_inputs, timesteps=FLOAT_STEPS
    ),
    ZooEntry(
        "Kandinsky6Transformer3DModel", _kandinsky_6, _kandinsky_6_inputs, timesteps=FLOAT_STEPS
    ),
    ZooEntry(
        "Kandinsky6SRTransformer3DModel",
        _kandinsky_6_sr,
        _kandinsky_6_sr_inputs,
        timesteps=FLOAT_STEPS,
    ),
)
