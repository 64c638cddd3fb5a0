"""The image transformers of diffusers, each at two layers of every kind and an 8x8 latent.

The inputs are those of the class's own pipeline: dtypes, scales, ids and masks. Prompts have six
tokens, the last of them padding where the class takes a mask.
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from diffusers.models.transformers.transformer_ideogram4 import (
    LLM_TOKEN_INDICATOR,
    OUTPUT_IMAGE_INDICATOR,
    SEQUENCE_PADDING_INDICATOR,
)
from torch import nn

from zoo.entry import ZooEntry
from zoo.tables.image_parts import (
    BRIA_CALL,
    COGVIEW,
    COGVIEW_CALL,
    CROP,
    DIAGONAL_IDS,
    DIT_CALL,
    FLUX,
    FLUX2,
    HEADS,
    IMAGE_IDS,
    IMAGE_IDS4,
    IMAGE_SHAPES,
    JOY,
    LATENT,
    NO_IDS,
    PACKED,
    PATCHES,
    PIXART,
    PIXART_CALL,
    SIDE,
    TEXT_IDS4,
    TOKENS,
    causal_text,
    ideogram_ids,
    normal_experts,
    text_then_image,
)
from zoo.tables.inputs import call, filled, integers, last_padded, listed, normal, prompt, repeated
from zoo.tables.sizes import HEIGHT, TEXT

DOWN, FLOW, RISING = (1000, 20), (1.0, 0.02), (0.0, 0.98)

# fmt: off
ENTRIES: tuple[ZooEntry, ...] = (
    ZooEntry("DiTTransformer2DModel", dict(PATCHES, out_channels=8), DIT_CALL),
    ZooEntry(
        "Transformer2DModel (ada_norm_zero)",
        dict(PATCHES, out_channels=8, norm_type="ada_norm_zero"), DIT_CALL),
    ZooEntry("Transformer2DModel (ada_norm_single)", PIXART, PIXART_CALL),
    ZooEntry("PixArtTransformer2DModel", PIXART, PIXART_CALL),
    ZooEntry(
        "DreamLiteTransformer2DModel",
        dict(HEADS, in_channels=32, cross_attention_dim=16, norm_type="ada_norm",
             num_embeds_ada_norm=1000),
        call(hidden_states=normal(32, HEIGHT, SIDE), encoder_hidden_states=prompt(),
             timestep=torch.tensor(999)),
        module="diffusers.models.transformers.transformer_2d_dreamlite"),
    ZooEntry(
        "HunyuanDiT2DModel",
        dict(HEADS, num_layers=4,  # two halves, joined by skips
             in_channels=4, patch_size=2, sample_size=8, hidden_size=32, cross_attention_dim=16,
             cross_attention_dim_t5=16, pooled_projection_dim=16, text_len=TEXT, text_len_t5=TEXT),
        call(hidden_states=LATENT, timestep=filled(999.0), encoder_hidden_states=prompt(),
             text_embedding_mask=last_padded(), encoder_hidden_states_t5=prompt(),
             text_embedding_mask_t5=last_padded(),
             image_meta_size=repeated([64.0, 64.0, 64.0, 64.0, 0.0, 0.0]), style=filled(0),
             image_rotary_emb=get_2d_rotary_pos_embed(
                 16, ((0, 0), (HEIGHT, SIDE)), (HEIGHT, SIDE), output_type="pt"))),
    ZooEntry(
        "LuminaNextDiT2DModel",
        dict(sample_size=8, hidden_size=32, num_layers=2, num_attention_heads=2, num_kv_heads=1,
             multiple_of=16, cross_attention_dim=16),
        call(hidden_states=LATENT, timestep=filled(0.0), encoder_hidden_states=prompt(),
             encoder_mask=last_padded(),
             image_rotary_emb=get_2d_rotary_pos_embed_lumina(16, 16, 16),
             cross_attention_kwargs={"base_sequence_length": TOKENS}),
        timesteps=RISING, prepare=lambda model: nn.init.zeros_(model.pad_token)),
    ZooEntry(
        "SD3Transformer2DModel",
        dict(HEADS, sample_size=8, in_channels=4, out_channels=4, joint_attention_dim=16,
             caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=8,
             dual_attention_layers=(0,), qk_norm="rms_norm"),
        call(hidden_states=LATENT, timestep=filled(1000.0), encoder_hidden_states=prompt(),
             pooled_projections=normal(16)),
        timesteps=DOWN),
    ZooEntry(
        "AuraFlowTransformer2DModel",
        dict(sample_size=8, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=16,
             num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=32,
             pos_embed_max_size=TOKENS),
        call(hidden_states=LATENT, encoder_hidden_states=prompt(), timestep=filled(1.0)),
        timesteps=FLOW),
    ZooEntry(
        "FluxTransformer2DModel",
        dict(FLUX, pooled_projection_dim=16, guidance_embeds=True),
        call(hidden_states=PACKED, timestep=filled(1.0), guidance=filled(3.5),
             pooled_projections=normal(16), encoder_hidden_states=prompt(), txt_ids=NO_IDS,
             img_ids=IMAGE_IDS),
        timesteps=FLOW),
    ZooEntry(
        "Flux2Transformer2DModel",
        dict(FLUX2, timestep_guidance_channels=32),
        call(hidden_states=PACKED, timestep=filled(1.0), guidance=filled(4.0),
             encoder_hidden_states=prompt(), txt_ids=repeated(TEXT_IDS4),
             img_ids=lambda batch: IMAGE_IDS4.expand(batch, -1, -1)),
        timesteps=FLOW),
    ZooEntry(
        "Flux3Transformer2DModel",
        dict(FLUX2, cond_in_channels=16, timestep_channels=32),
        call(hidden_states=PACKED, encoder_hidden_states=prompt(), timestep=filled(1.0),
             img_ids=IMAGE_IDS4.float(), txt_ids=TEXT_IDS4.float()),
        timesteps=FLOW),
    ZooEntry(
        "ChromaTransformer2DModel",
        dict(FLUX, approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1),
        call(hidden_states=PACKED, timestep=filled(1.0), encoder_hidden_states=prompt(),
             txt_ids=NO_IDS, img_ids=IMAGE_IDS, attention_mask=text_then_image),
        timesteps=FLOW),
    ZooEntry(
        "SanaTransformer2DModel",
        dict(HEADS, in_channels=4, out_channels=4, num_cross_attention_heads=2,
             cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16,
             sample_size=8),
        call(hidden_states=LATENT, encoder_hidden_states=prompt(),
             encoder_attention_mask=last_padded(), timestep=filled(999.0))),
    ZooEntry(
        "Lumina2Transformer2DModel",
        dict(sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=2,
             num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 6, 6),
             axes_lens=(32, 16, 16), cap_feat_dim=16),
        call(hidden_states=LATENT, timestep=filled(0.0), encoder_hidden_states=prompt(),
             encoder_attention_mask=last_padded()),
        timesteps=RISING),
    ZooEntry(
        "CogView3PlusTransformer2DModel",
        dict(COGVIEW, pos_embed_max_size=8, sample_size=8), COGVIEW_CALL),
    ZooEntry(
        "CogView4Transformer2DModel",
        dict(COGVIEW, sample_size=8, rope_axes_dim=(8, 8)),
        {**COGVIEW_CALL, "timestep": filled(1000.0)}, timesteps=DOWN),
    ZooEntry(
        "QwenImageTransformer2DModel",
        dict(HEADS, in_channels=16, out_channels=4, joint_attention_dim=16,
             axes_dims_rope=(4, 6, 6)),
        call(hidden_states=PACKED, timestep=filled(1.0), guidance=None,
             encoder_hidden_states_mask=last_padded(), encoder_hidden_states=prompt(),
             img_shapes=lambda batch: [IMAGE_SHAPES] * batch),
        timesteps=FLOW),
    ZooEntry(
        "QwenImage21Transformer2DModel",
        dict(HEADS, in_channels=16, out_channels=16, context_in_dim=16, axes_dims_rope=(4, 6, 6)),
        call(hidden_states=PACKED, timestep=filled(1.0), encoder_hidden_states=prompt(),
             encoder_hidden_states_mask=last_padded(torch.bool),
             img_shapes=lambda batch: [IMAGE_SHAPES] * batch,
             img_mask=repeated(torch.arange(TEXT + TOKENS // 4) >= TEXT)),
        timesteps=FLOW),
    ZooEntry(
        "ZImageTransformer2DModel",
        dict(in_channels=4, dim=32, n_layers=2, n_refiner_layers=2, n_heads=2, n_kv_heads=2,
             cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[128, 16, 16]),
        call(x=listed(4, 1, 2 * HEIGHT, 2 * SIDE), t=filled(0.0), cap_feats=listed(TEXT, 16)),
        latent="x.0", timestep="t", timesteps=RISING),
    ZooEntry(
        "OmniGenTransformer2DModel",
        dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32,
             num_layers=2, pad_token_id=0, vocab_size=32, pos_embed_max_size=8, time_step_dim=16,
             rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}),
        call(hidden_states=LATENT, timestep=filled(0.0), input_ids=integers(32, TEXT),
             input_img_latents=[], input_image_sizes={}, attention_mask=repeated(causal_text()),
             position_ids=repeated(torch.arange(TEXT + 1 + TOKENS))),
        timesteps=RISING),
    ZooEntry(
        "HiDreamImageTransformer2DModel",
        dict(HEADS, patch_size=2, in_channels=4, num_single_layers=2, caption_channels=[16, 16],
             text_emb_dim=16, axes_dims_rope=(4, 6, 6), max_resolution=(8, 8),
             llama_layers=[0, 1, 2, 3]),
        call(hidden_states=LATENT, timesteps=filled(1000.0), encoder_hidden_states_t5=prompt(),
             encoder_hidden_states_llama3=lambda batch: torch.randn(4, batch, TEXT, 16),
             pooled_embeds=normal(16)),
        timestep="timesteps", timesteps=DOWN),
    ZooEntry("BriaTransformer2DModel", FLUX, BRIA_CALL, timesteps=DOWN),
    ZooEntry(
        "BriaFiboTransformer2DModel",
        dict(FLUX, text_encoder_dim=16),
        {**BRIA_CALL, "text_encoder_layers": [prompt()] * 4, "joint_attention_kwargs": {
            "attention_mask": lambda batch: text_then_image(batch, torch.bool)[:, None, None]}},
        timesteps=DOWN),
    ZooEntry(
        "BriaFibo2Transformer2DModel",
        dict(in_channels=4, dim=32, n_layers=2, n_refiner_layers=2, n_heads=2, cap_feat_dim=16,
             injection_layer_ids=(1,), min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=2,
             gist_min_text_len=4, gist_max_text_len=16, axes_dims=(4, 6, 6),
             axes_lens=(32, 16, 16)),
        call(hidden_states=LATENT, timestep=filled(1.0), encoder_hidden_states=normal(2, TEXT, 16),
             encoder_attention_mask=None, context_latents=None),
        timesteps=FLOW),
    ZooEntry(
        "PRXTransformer2DModel",
        dict(in_channels=4, context_in_dim=16, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2,
             axes_dim=[8, 8]),
        call(hidden_states=LATENT, timestep=filled(1.0), encoder_hidden_states=prompt(),
             attention_mask=last_padded(torch.bool)),
        timesteps=FLOW),
    ZooEntry(
        "HunyuanImageTransformer2DModel",
        dict(HEADS, in_channels=8, out_channels=8, num_single_layers=2, num_refiner_layers=2,
             text_embed_dim=16, text_embed_2_dim=16, rope_axes_dim=(8, 8)),
        call(hidden_states=normal(8, HEIGHT, SIDE), timestep=filled(1000.0),
             encoder_hidden_states=prompt(), encoder_attention_mask=last_padded(),
             encoder_hidden_states_2=normal(4, 16), encoder_attention_mask_2=last_padded(length=4)),
        timesteps=DOWN),
    ZooEntry(
        "GlmImageTransformer2DModel",
        dict(COGVIEW, prior_vq_quantizer_codebook_size=32),
        call(prior_token_id=integers(32, TOKENS), prior_token_drop=filled(False, TOKENS),
             hidden_states=LATENT, encoder_hidden_states=prompt(), timestep=filled(999.0),
             target_size=repeated([64.0, 64.0]), crop_coords=CROP),
        timesteps=(999, 19)),
    ZooEntry(
        "ErnieImageTransformer2DModel",
        dict(hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32,
             in_channels=8, out_channels=8, text_in_dim=16, rope_axes_dim=(4, 6, 6)),
        call(hidden_states=normal(8, HEIGHT, SIDE), timestep=filled(1000.0), text_bth=prompt(),
             text_lens=lambda batch: torch.tensor([TEXT, TEXT - 1] * batch)[:batch]),
        timesteps=DOWN),
    ZooEntry(
        "Ideogram4Transformer2DModel",
        dict(HEADS, in_channels=16, intermediate_size=32, adaln_dim=16, llm_features_dim=16,
             mrope_section=(4, 2, 2)),
        call(hidden_states=lambda batch: torch.cat(
                 [torch.zeros(batch, TEXT, 16), torch.randn(batch, TOKENS, 16)], 1),
             timestep=filled(0.0), encoder_hidden_states=normal(TEXT + TOKENS, 16),
             position_ids=repeated(ideogram_ids()),
             segment_ids=repeated([SEQUENCE_PADDING_INDICATOR] + (TEXT - 1 + TOKENS) * [1]),
             indicator=repeated([0] + (TEXT - 1) * [LLM_TOKEN_INDICATOR]
                                + TOKENS * [OUTPUT_IMAGE_INDICATOR])),
        timesteps=RISING),
    ZooEntry(
        "JoyImageEditTransformer3DModel", JOY,
        call(hidden_states=normal(2, 4, 1, 2 * HEIGHT, 2 * SIDE), timestep=filled(1000.0),
             encoder_hidden_states=prompt()),
        timesteps=DOWN),
    ZooEntry(
        "JoyImageEditPlusTransformer3DModel", JOY,
        call(hidden_states=normal(TOKENS + 2 * SIDE, 4, 1, 2, 2), timestep=filled(1000.0),
             encoder_hidden_states=prompt(), encoder_hidden_states_mask=last_padded(),
             shape_list=lambda batch: [[(1, HEIGHT, SIDE), (1, 2, SIDE)]] * batch),
        timesteps=DOWN),
    ZooEntry(
        "Kandinsky6Transformer3DModel (image)",
        dict(in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=16,
             model_dim=32, ff_dim=32, num_text_blocks=2, num_visual_blocks=2, axes_dims=(4, 6, 6),
             in_audio_dim=4, out_audio_dim=4),
        call(hidden_states=normal(1, 2 * HEIGHT, 2 * SIDE, 9), audio_hidden_states=None,
             encoder_hidden_states=prompt(), pooled_projections=normal(16),
             timestep=filled(1000.0), visual_rope_pos=None,
             encoder_attention_mask=last_padded(torch.bool), visual_token_type_ids=None),
        timesteps=DOWN),
    ZooEntry(
        "Krea2Transformer2DModel",
        dict(HEADS, in_channels=16, num_key_value_heads=1, intermediate_size=32,
             timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=3,
             text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
             axes_dims_rope=(4, 6, 6)),
        call(hidden_states=PACKED, encoder_hidden_states=normal(TEXT, 3, 16), timestep=filled(1.0),
             position_ids=torch.cat([NO_IDS, IMAGE_IDS]),
             encoder_attention_mask=last_padded(torch.bool)),
        timesteps=FLOW),
    ZooEntry(
        "LongCatImageTransformer2DModel",
        dict(FLUX, pooled_projection_dim=16),
        call(hidden_states=PACKED, timestep=filled(1.0), guidance=None,
             encoder_hidden_states=prompt(), txt_ids=DIAGONAL_IDS,
             img_ids=IMAGE_IDS + torch.tensor([1.0, TEXT, TEXT])),
        timesteps=FLOW),
    ZooEntry(
        "NucleusMoEImageTransformer2DModel",
        dict(in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
             num_attention_heads=2, num_key_value_heads=1, joint_attention_dim=16,
             axes_dims_rope=(4, 6, 6), dense_moe_strategy="leave_first_block_dense",
             num_experts=4, moe_intermediate_dim=16, capacity_factors=2.0),
        call(hidden_states=PACKED, timestep=filled(1.0), encoder_hidden_states=prompt(),
             encoder_hidden_states_mask=last_padded(),
             img_shapes=lambda batch: IMAGE_SHAPES * batch),
        timesteps=FLOW, prepare=normal_experts),
    ZooEntry(
        "OvisImageTransformer2DModel",
        dict(FLUX, out_channels=16),
        call(hidden_states=PACKED, timestep=filled(1.0), encoder_hidden_states=prompt(),
             txt_ids=DIAGONAL_IDS, img_ids=IMAGE_IDS),
        timesteps=FLOW),
)
