"""Wan, Hunyuan and their descendants at tiny configurations."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

from zoo.entry import ZooEntry
from zoo.tables.inputs import call, filled, listed, normal, prompt, some_padded
from zoo.tables.sizes import HEIGHT, TEXT

FLOAT_STEPS = (1000.0, 20.0)
HISTORY = torch.arange(10)[None]
SIDES = 2 * HEIGHT, 8  # of a frame


def reference_cache(batch: int) -> WanAnimate2KVCache:
    """The keys of the reference, of a pass before the generation."""
    cache = WanAnimate2KVCache(2)
    for layer in cache.layer_caches:
        layer.store(torch.randn(batch, 8, 4, 12), torch.randn(batch, 8, 4, 12))
    return cache


# fmt: off
WAN = dict(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=48, num_layers=2, rope_max_seq_len=32)
WAN_IMAGE = dict(WAN, in_channels=12, image_dim=16, added_kv_proj_dim=24)
HELIOS = {name: value for name, value in WAN.items() if name != "rope_max_seq_len"}
HUNYUAN = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
    num_single_layers=2, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16,
    pooled_projection_dim=8, rope_axes_dim=(4, 4, 4))

# The timesteps of UniPC are integers.
WAN_CALL = call(
    hidden_states=normal(4, 2, *SIDES), timestep=filled(999), encoder_hidden_states=prompt(),
    attention_kwargs=None)
WAN_IMAGE_CALL = {
    **WAN_CALL, "hidden_states": normal(12, 2, *SIDES),
    "encoder_hidden_states_image": normal(5, 16)}
ANYFLOW_CALL = call(
    hidden_states=normal(2, 4, *SIDES), timestep=filled(1000.0, 2), r_timestep=filled(750.0, 2),
    encoder_hidden_states=prompt(), attention_kwargs=None)
# The masks of the prompts have the dtype of the model.
HUNYUAN_CALL = call(
    hidden_states=normal(4, 2, *SIDES), timestep=filled(1000.0), encoder_hidden_states=prompt(),
    encoder_attention_mask=some_padded(torch.float32), pooled_projections=normal(8),
    guidance=filled(6000.0), attention_kwargs=None)

ENTRIES: tuple[ZooEntry, ...] = (
    ZooEntry("WanTransformer3DModel", WAN, WAN_CALL),
    ZooEntry("WanTransformer3DModel image", WAN_IMAGE, WAN_IMAGE_CALL),
    # Wan 2.2 TI2V: a timestep for every token, a float since a mask has multiplied it.
    ZooEntry(
        "WanTransformer3DModel expanded", WAN,
        {**WAN_CALL, "timestep": filled(999.0, 2 * HEIGHT * 4)}),
    ZooEntry(
        "WanVACETransformer3DModel",
        dict(WAN, vace_layers=[0, 1], vace_in_channels=8),
        {**WAN_CALL, "control_hidden_states": normal(8, 2, *SIDES),
         "control_hidden_states_scale": torch.ones(2)}),
    ZooEntry(
        "WanAnimateTransformer3DModel",
        dict(WAN, in_channels=12, image_dim=16, latent_channels=4,
             motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16,
             motion_style_dim=8, motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16,
             face_encoder_num_heads=2, inject_face_latents_blocks=2),
        {**WAN_IMAGE_CALL, "hidden_states": normal(12, 3, *SIDES),
         "pose_hidden_states": normal(4, 2, *SIDES), "face_pixel_values": normal(3, 5, 16, 16),
         "motion_encode_batch_size": 8}),
    ZooEntry(
        "WanAnimate2Transformer3DModel",
        dict(text_len=8, in_dim=12, dim=48, ffn_dim=64, freq_dim=32, text_dim=16, out_dim=4,
             num_heads=4, num_layers=2),
        call(kv_cache=reference_cache, kv_cache_mode="cached",
             hidden_states=listed(4, 3, HEIGHT, 4), timestep=filled(999.0),
             encoder_hidden_states=listed(TEXT, 16),
             condition_latents=listed(8, 3, HEIGHT, 4), seq_len=3 * HEIGHT,
             encoder_hidden_states_image=normal(4, 1280),
             reference_grid_sizes=lambda batch: torch.tensor([[2, 2, 2]]).expand(batch, 3),
             origin_len=5, origin_area=[32, 32]),
        latent="hidden_states.0"),
    ZooEntry("SkyReelsV2Transformer3DModel", WAN, WAN_CALL),
    # A timestep for every frame.
    ZooEntry(
        "SkyReelsV2Transformer3DModel forcing",
        dict(WAN, num_frame_per_block=2),
        {**WAN_CALL, "hidden_states": normal(4, 4, *SIDES), "timestep": filled(999, 4),
         "enable_diffusion_forcing": True, "fps": lambda batch: [1] * batch}),
    ZooEntry("ChronoEditTransformer3DModel", WAN_IMAGE, WAN_IMAGE_CALL),
    ZooEntry("AnyFlowTransformer3DModel", WAN, ANYFLOW_CALL, timesteps=FLOAT_STEPS),
    # The second chunk, of two frames; the keys and values of the first are in the cache. The model
    # itself writes into the flags, of which the pipeline gives it a copy at every step.
    ZooEntry(
        "AnyFlowFARTransformer3DModel",
        dict(WAN, compressed_patch_size=(1, 4, 4), chunk_partition=(1, 2)),
        {**ANYFLOW_CALL, "chunk_partition": [1, 2],
         "kv_cache": {
             layer: {
                 "compressed_cache": lambda batch: torch.zeros(2, batch, 2, 3 * HEIGHT, 12),
                 "full_cache": lambda batch: torch.randn(2, batch, 2, 3 * HEIGHT * 4, 12)}
             for layer in range(2)},
         "kv_cache_flag": {
             "num_cached_chunks": 1, "is_cache_step": False, "num_cached_full_tokens": 4 * HEIGHT,
             "num_cached_compressed_tokens": 0}},
        timesteps=FLOAT_STEPS),
    # History of 4, 2 and 1 frames and an image before the two frames in the making.
    ZooEntry(
        "HeliosTransformer3DModel",
        dict(HELIOS, rope_dim=(4, 4, 4)),
        {**WAN_CALL, "indices_hidden_states": HISTORY[:, 8:],
         "indices_latents_history_short": HISTORY[:, [0, 7]],
         "indices_latents_history_mid": HISTORY[:, 5:7],
         "indices_latents_history_long": HISTORY[:, 1:5],
         "latents_history_short": normal(4, 2, *SIDES), "latents_history_mid": normal(4, 2, *SIDES),
         "latents_history_long": normal(4, 4, *SIDES)}),
    ZooEntry("HunyuanVideoTransformer3DModel", HUNYUAN, HUNYUAN_CALL, timesteps=FLOAT_STEPS),
    # Text to video: the embeddings of the image are zeros, and so is the second prompt's mask.
    ZooEntry(
        "HunyuanVideo15Transformer3DModel",
        dict(in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=12,
             num_layers=2, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16,
             text_embed_2_dim=8, image_embed_dim=12, rope_axes_dim=(4, 4, 4), target_size=16,
             task_type="t2v"),
        call(hidden_states=normal(9, 2, HEIGHT, 4), timestep=filled(1000.0),
             encoder_hidden_states=prompt(), encoder_attention_mask=some_padded(torch.float32),
             encoder_hidden_states_2=filled(0.0, 4, 8), encoder_attention_mask_2=filled(0.0, 4),
             image_embeds=filled(0.0, 3, 12), attention_kwargs=None),
        timesteps=FLOAT_STEPS),
    # An image, two frames in the making, and a history of 1, 2 and 4 frames.
    ZooEntry(
        "HunyuanVideoFramepackTransformer3DModel",
        dict(HUNYUAN, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True),
        {**HUNYUAN_CALL, "image_embeds": normal(5, 16), "indices_latents": torch.arange(1, 3),
         "latents_clean": normal(4, 2, *SIDES), "indices_latents_clean": torch.tensor([0, 3]),
         "latents_history_2x": normal(4, 2, *SIDES),
         "indices_latents_history_2x": torch.arange(4, 6),
         "latents_history_4x": normal(4, 4, *SIDES),
         "indices_latents_history_4x": torch.arange(6, 10)},
        timesteps=FLOAT_STEPS),
    ZooEntry(
        "MotifVideoTransformer3DModel",
        dict(in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=12,
             num_layers=2, num_single_layers=4, num_decoder_layers=2, mlp_ratio=2.0,
             text_embed_dim=16, image_embed_dim=16, rope_axes_dim=(4, 4, 4),
             enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True),
        call(hidden_states=normal(9, 2, *SIDES), timestep=filled(1000.0),
             encoder_hidden_states=prompt(), encoder_attention_mask=some_padded(),
             attention_kwargs=None),
        timesteps=FLOAT_STEPS),
)
