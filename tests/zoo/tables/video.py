"""The other video transformers of diffusers at tiny configurations."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from diffusers.models.transformers.transformer_sana_wm_refiner import (
    SanaWMLTX2AudioVideoRotaryPosEmbed,
)
from torch import Tensor

from zoo.entry import ZooEntry
from zoo.tables.inputs import call, filled, listed, normal, prompt, repeated, some_padded
from zoo.tables.sizes import HEIGHT, TEXT

FLOAT_STEPS = (1000.0, 20.0)
FRAMES, SIDE = 2, 4  # SIDE counts columns of tokens
SIDES = 2 * HEIGHT, 2 * SIDE  # of a frame
TOKENS = FRAMES * HEIGHT * SIDE
PLACES = torch.cartesian_prod(*map(torch.arange, (FRAMES, HEIGHT, SIDE))).T


def allegro_rope() -> Any:
    """Frequencies and places by axis."""
    frequencies = get_3d_rotary_pos_embed_allegro(
        embed_dim=12,
        crops_coords=((0, 0), (HEIGHT, SIDE)),
        grid_size=(HEIGHT, SIDE),
        temporal_size=FRAMES,
        interpolation_scale=(2.2, 2.0, 2.0),
    )
    return frequencies[:3], PLACES[:, None].contiguous().unbind()


def refiner_rope(batch: int) -> Any:
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
    return rope(rope.prepare_video_coords(batch, FRAMES, HEIGHT, SIDE, device=cpu, fps=24.0), cpu)


def camera(batch: int) -> Tensor:
    """A camera that moves ahead: 4x4 matrices to the world, then the focal lengths and centre."""
    pose = torch.eye(4).repeat(batch, 3, 1, 1)
    pose[..., 2, 3] = torch.arange(3) * 0.1
    lens = torch.tensor([4.0, 4.0, 2.0, 2.0]).expand(batch, 3, 4)
    return torch.cat([pose.flatten(-2), lens], dim=-1)


def packed_row() -> dict[str, Tensor]:
    """MiniMax's one row: text, then audio, then video; video and audio at one time, going up."""
    length = TEXT + 6 + 8
    text, audio, video = torch.arange(length).split([TEXT, 6, 8])
    tags = torch.empty(length, dtype=torch.long)
    tags[video], tags[text], tags[audio] = 0, 1, 2
    positions = torch.zeros(length, 3)
    positions[:, 0] = torch.arange(length).clamp(max=TEXT + 6).float()
    positions[video, 1] = (torch.arange(8) // 4).float()
    positions[video, 2] = (torch.arange(8) % 4).float()
    return {
        "timestep_indices": torch.zeros(length, dtype=torch.long),
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


def video_tokens(batch: int) -> Tensor:
    """Where Cosmos 3 packs the videos: after the text, one after the other."""
    return torch.arange(TEXT, TEXT + batch * TOKENS)


# fmt: off
COGVIDEOX = dict(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
    text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8, sample_frames=5,
    max_text_seq_length=TEXT)
LTX_2 = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
    cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
    audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=2, caption_channels=16)
COSMOS = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
    mlp_ratio=2.0, text_embed_dim=32, adaln_lora_dim=8, max_size=(4, 16, 16),
    concat_padding_mask=False)  # no mask of the padding: it would want torchvision
KANDINSKY = dict(
    in_visual_dim=4, out_visual_dim=4, time_dim=16, model_dim=24, ff_dim=32, num_visual_blocks=2,
    axes_dims=(4, 4, 4))
KANDINSKY_TEXT = dict(KANDINSKY, in_text_dim=16, in_text_dim2=8, num_text_blocks=2)

LATENT, PACKED = normal(4, FRAMES, *SIDES), normal(TOKENS, 4)
COGVIDEOX_CALL = call(  # frames before channels
    hidden_states=normal(FRAMES, 4, *SIDES), encoder_hidden_states=prompt(), timestep=filled(999),
    image_rotary_emb=None, attention_kwargs=None)

ENTRIES: tuple[ZooEntry, ...] = (
    ZooEntry("CogVideoXTransformer3DModel", COGVIDEOX, COGVIDEOX_CALL),
    ZooEntry(
        "CogVideoXTransformer3DModel 1.5",
        dict(COGVIDEOX, patch_size_t=2, patch_bias=False, ofs_embed_dim=16,
             use_rotary_positional_embeddings=True),
        {**COGVIDEOX_CALL, "ofs": torch.full((1,), 2.0),
         "image_rotary_emb": get_3d_rotary_pos_embed(
             embed_dim=16, crops_coords=None, grid_size=(HEIGHT, SIDE), temporal_size=1,
             grid_type="slice", max_size=(HEIGHT, SIDE))}),
    ZooEntry(
        "ConsisIDTransformer3DModel",
        dict(COGVIDEOX, num_attention_heads=3, use_rotary_positional_embeddings=True,
             is_train_face=True, cross_attn_interval=1, cross_attn_dim_head=8,
             cross_attn_num_heads=2, LFE_id_dim=8, LFE_vit_dim=8, LFE_depth=4, LFE_dim_head=8,
             LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=2, LFE_output_dim=32,
             LFE_ff_mult=2, LFE_num_scale=2),
        {**COGVIDEOX_CALL,
         "image_rotary_emb": get_3d_rotary_pos_embed(
             embed_dim=16, crops_coords=((0, 0), (HEIGHT, SIDE)), grid_size=(HEIGHT, SIDE),
             temporal_size=FRAMES),
         "id_vit_hidden": [normal(3, 8)] * 2, "id_cond": normal(8)}),
    ZooEntry(
        "EasyAnimateTransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
             patch_size=2, num_layers=3, mmdit_layers=2, time_embed_dim=8, text_embed_dim=16,
             add_norm_text_encoder=True),
        call(hidden_states=LATENT, timestep=filled(1000.0), encoder_hidden_states=prompt()),
        timesteps=FLOAT_STEPS),
    ZooEntry(
        "LTXVideoTransformer3DModel",
        dict(in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8,
             cross_attention_dim=16, num_layers=2, caption_channels=16),
        call(hidden_states=normal(TOKENS, 8), encoder_hidden_states=prompt(),
             timestep=filled(1000.0), encoder_attention_mask=some_padded(torch.bool),
             num_frames=FRAMES, height=HEIGHT, width=SIDE,
             rope_interpolation_scale=(8 / 25, 32, 32), attention_kwargs=None),
        timesteps=FLOAT_STEPS),
    ZooEntry(
        "LTX2VideoTransformer3DModel", LTX_2,
        call(hidden_states=PACKED, audio_hidden_states=normal(5, 4),
             encoder_hidden_states=prompt(), audio_encoder_hidden_states=prompt(),
             timestep=filled(1000.0), sigma=filled(1000.0), encoder_attention_mask=some_padded(),
             audio_encoder_attention_mask=some_padded(), num_frames=FRAMES, height=HEIGHT,
             width=SIDE, fps=24.0, audio_num_frames=5, isolate_modalities=False,
             spatio_temporal_guidance_blocks=None, perturbation_mask=None,
             use_cross_timestep=False, attention_kwargs=None),
        timesteps=FLOAT_STEPS),
    ZooEntry(
        "SanaWMLTX2RefinerTransformer3DModel", LTX_2,
        call(hidden_states=PACKED, encoder_hidden_states=prompt(), timestep=filled(900.0, TOKENS),
             video_rotary_emb=refiner_rope, encoder_attention_mask=some_padded()),
        timesteps=(900.0, 400.0)),
    ZooEntry(
        "MiniMaxH3Transformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=2,
             num_refiner_layers=2, ffn_dim=32, in_channels=4, audio_in_channels=6, text_dim=16,
             freq_dim=8, time_embed_hidden_dim=24, time_embed_dim=16, rope_freq_dim=2),
        call(hidden_states=normal(8, 16), audio_hidden_states=normal(6, 6),
             encoder_hidden_states=prompt(), timestep=torch.zeros(1), **packed_row(),
             attention_kwargs=None),
        timesteps=(0.0, 0.98)),
    ZooEntry(
        "MochiTransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=8, num_layers=3, pooled_projection_dim=16,
             in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=TEXT),
        call(hidden_states=LATENT, encoder_hidden_states=prompt(), timestep=filled(0.0),
             encoder_attention_mask=some_padded(torch.bool), attention_kwargs=None),
        timesteps=(0.0, 980.0)),
    ZooEntry(
        "LatteTransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
             num_layers=2, cross_attention_dim=16, attention_bias=True, sample_size=8,
             patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
             norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
             caption_channels=16, video_length=3),
        call(hidden_states=normal(4, 3, *SIDES), encoder_hidden_states=prompt(),
             timestep=filled(999), enable_temporal_attentions=True)),
    ZooEntry(
        "AllegroTransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24,
             sample_height=8, sample_width=8, sample_frames=2, caption_channels=16),
        call(hidden_states=LATENT, encoder_hidden_states=prompt(),
             encoder_attention_mask=some_padded(), timestep=filled(999),
             image_rotary_emb=allegro_rope())),
    # The first Cosmos counts EDM noise levels: a quarter of the logarithm of sigma.
    ZooEntry(
        "CosmosTransformer3DModel", COSMOS,
        call(hidden_states=LATENT, timestep=filled(1.0955), encoder_hidden_states=prompt(32),
             fps=30, padding_mask=torch.zeros(1, 1, 64, 64)),
        timesteps=(1.0955, -1.5)),
    # Video to world of Cosmos 2.5: a timestep for every frame, the first frame given.
    ZooEntry(
        "CosmosTransformer3DModel 2.5",
        dict(COSMOS, in_channels=5, extra_pos_embed_type=None, use_crossattn_projection=True,
             crossattn_proj_in_channels=24, encoder_hidden_states_channels=32),
        call(hidden_states=normal(4, 3, *SIDES),
             condition_mask=repeated((torch.arange(3) < 1).float().repeat_interleave(16 * HEIGHT)
                                     .reshape(1, 3, *SIDES)),
             timestep=filled(1.0, 1, 3, 1, 1), encoder_hidden_states=prompt(24),
             padding_mask=torch.zeros(1, 1, 64, 64)),
        timesteps=(1.0, 0.02)),
    # Packed into one row, a video for each of the batch; the pipeline itself has one alone.
    ZooEntry(
        "Cosmos3OmniTransformer",
        dict(head_dim=12, hidden_size=24, intermediate_size=48, latent_channel=4,
             latent_patch_size=2, num_attention_heads=2, num_hidden_layers=2,
             num_key_value_heads=1, patch_latent_dim=16, rope_axes_dim=[2, 2, 2], vocab_size=32),
        call(input_ids=lambda _: torch.randint(32, (TEXT,)), text_indexes=torch.arange(TEXT),
             position_ids=lambda batch: torch.cat(
                 [torch.arange(TEXT).expand(3, TEXT), *[PLACES + TEXT] * batch], dim=1),
             und_len=TEXT, sequence_length=lambda batch: TEXT + batch * TOKENS,
             vision_tokens=listed(1, 4, FRAMES, *SIDES),
             vision_token_shapes=lambda batch: [(FRAMES, HEIGHT, SIDE)] * batch,
             vision_sequence_indexes=video_tokens, vision_mse_loss_indexes=video_tokens,
             vision_timesteps=lambda batch: torch.full((batch * TOKENS,), 1000.0),
             vision_noisy_frame_indexes=lambda batch: [torch.arange(FRAMES)] * batch),
        latent="vision_tokens.0", timestep="vision_timesteps", timesteps=FLOAT_STEPS),
    ZooEntry(
        "SanaVideoTransformer3DModel",
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
             num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=12,
             cross_attention_dim=24, caption_channels=16, sample_size=8, rope_max_seq_len=32),
        call(hidden_states=LATENT, encoder_hidden_states=prompt(),
             encoder_attention_mask=some_padded(), timestep=filled(1000.0), attention_kwargs=None),
        timesteps=FLOAT_STEPS),
    ZooEntry(
        "SanaWMTransformer3DModel",
        dict(in_channels=4, num_layers=2, hidden_size=32, num_attention_heads=2,
             softmax_every_n=2, linear_head_dim=16, caption_channels=16, mlp_ratio=2.0,
             chunk_plucker_channels=8, chunk_plucker_post_attn_blocks=2),
        call(hidden_states=normal(4, 3, HEIGHT, 4), timestep=filled(1000.0, 1, 3),
             encoder_hidden_states=normal(1, TEXT, 16), mask=some_padded(),
             data_info={"img_hw": torch.tensor([[32.0 * HEIGHT, 128.0]])}, camera_conditions=camera,
             chunk_plucker=normal(8, 3, HEIGHT, 4)),
        timesteps=FLOAT_STEPS),
    ZooEntry(
        "Kandinsky5Transformer3DModel",
        dict(KANDINSKY_TEXT, visual_cond=True),
        dict(hidden_states=normal(FRAMES, *SIDES, 9), encoder_hidden_states=prompt(),
             pooled_projections=normal(8), timestep=filled(1000.0),
             visual_rope_pos=[*map(torch.arange, (FRAMES, HEIGHT, SIDE))],
             text_rope_pos=torch.arange(TEXT), scale_factor=(1.0, 2.0, 2.0), sparse_params=None,
             return_dict=True),
        timesteps=FLOAT_STEPS),
    ZooEntry(
        "Kandinsky6Transformer3DModel",
        dict(KANDINSKY_TEXT, in_audio_dim=4, out_audio_dim=4),
        call(hidden_states=normal(FRAMES, *SIDES, 9), audio_hidden_states=normal(5, 4),
             encoder_hidden_states=prompt(), pooled_projections=normal(8), timestep=filled(1000.0),
             visual_rope_pos=(*map(torch.arange, (FRAMES, HEIGHT, SIDE)),),
             encoder_attention_mask=some_padded(torch.bool), visual_token_type_ids=None),
        timesteps=FLOAT_STEPS),
    ZooEntry(
        "Kandinsky6SRTransformer3DModel",
        dict(KANDINSKY, nabla_window=(1, 1, 1)),
        call(hidden_states=normal(FRAMES, *SIDES, 9), timestep=filled(1000.0)),
        timesteps=FLOAT_STEPS),
)
