"""The image transformers of diffusers, each at two layers of every kind and an 8x8 latent.

The inputs are those of the class's own pipeline: dtypes, scales, ids and masks. Prompts have six
tokens, the last of them padding where the class takes a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    BriaFibo2Transformer2DModel,
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    DiTTransformer2DModel,
    ErnieImageTransformer2DModel,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    FluxTransformer2DModel,
    GlmImageTransformer2DModel,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanImageTransformer2DModel,
    Ideogram4Transformer2DModel,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    Kandinsky6Transformer3DModel,
    Krea2Transformer2DModel,
    LongCatImageTransformer2DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    NucleusMoEImageTransformer2DModel,
    OmniGenTransformer2DModel,
    OvisImageTransformer2DModel,
    PixArtTransformer2DModel,
    PRXTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.embeddings import (
    get_2d_rotary_pos_embed,
    get_2d_rotary_pos_embed_lumina,
)
from diffusers.models.transformers.transformer_2d_dreamlite import DreamLiteTransformer2DModel
from diffusers.models.transformers.transformer_ideogram4 import (
    LLM_TOKEN_INDICATOR,
    OUTPUT_IMAGE_INDICATOR,
    SEQUENCE_PADDING_INDICATOR,
)
from torch import Tensor, nn

from zoo.entry import ZooEntry

TEXT = 6
SIDE = 4  # tokens along a side of the image
TOKENS = SIDE * SIDE
FLOW = (1.0, 0.02)
RISING = (0.0, 0.98)

Inputs = Mapping[str, Any]


def _time(batch: int, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((batch,), value, dtype=dtype)


def _latent(batch: int, channels: int = 4) -> Tensor:
    return torch.randn(batch, channels, 2 * SIDE, 2 * SIDE)


def _text(batch: int, width: int = 16) -> Tensor:
    return torch.randn(batch, TEXT, width)


def _mask(batch: int, dtype: torch.dtype = torch.int64, length: int = TEXT) -> Tensor:
    mask = torch.ones(batch, length, dtype=dtype)
    mask[:, -1] = 0
    return mask


def _image_ids(first: int = 0) -> Tensor:
    """(token, 3) in float32: a constant, row and column."""
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return torch.stack([torch.full_like(row, first), row, column], -1).reshape(-1, 3).float()


def _diagonal_ids(first: int = 0) -> Tensor:
    place = torch.arange(TEXT)
    return torch.stack([torch.full_like(place, first), place, place], -1).float()


def _image_ids4() -> Tensor:
    """(token, 4) in int64: time, row, column and layer."""
    one, side = torch.arange(1), torch.arange(SIDE)
    return torch.cartesian_prod(one, side, side, one)


def _text_ids4() -> Tensor:
    one = torch.arange(1)
    return torch.cartesian_prod(one, one, one, torch.arange(TEXT))


# latents as images, time from 999 down


def _dit_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": _latent(batch),
        "timestep": _time(batch, 999, torch.int64),
        "class_labels": torch.randint(0, 1000, (batch,)),
        "return_dict": False,
    }


def _pixart_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": _latent(batch),
        "encoder_hidden_states": _text(batch),
        "encoder_attention_mask": _mask(batch),
        "timestep": _time(batch, 999, torch.int64),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[64.0, 64.0]]).repeat(batch, 1),
            "aspect_ratio": torch.tensor([[1.0]]).repeat(batch, 1),
        },
        "return_dict": False,
    }


def _dreamlite_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 32, SIDE, SIDE),
        "encoder_hidden_states": _text(batch),
        "timestep": torch.tensor(999),
        "return_dict": False,
    }


def _hunyuan_dit_inputs(batch: int) -> Inputs:
    sizes = torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]])
    crop = ((0, 0), (SIDE, SIDE))
    return {
        "hidden_states": _latent(batch),
        "timestep": _time(batch, 999.0),
        "encoder_hidden_states": _text(batch),
        "text_embedding_mask": _mask(batch),
        "encoder_hidden_states_t5": _text(batch),
        "text_embedding_mask_t5": _mask(batch),
        "image_meta_size": sizes.repeat(batch, 1),
        "style": torch.zeros(batch, dtype=torch.int64),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, crop, (SIDE, SIDE), output_type="pt"),
        "return_dict": False,
    }


def _sd3_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": _latent(batch),
        "timestep": _time(batch, 1000.0),
        "encoder_hidden_states": _text(batch),
        "pooled_projections": torch.randn(batch, 16),
        "return_dict": False,
    }


def _sana_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": _latent(batch),
        "encoder_hidden_states": _text(batch),
        "encoder_attention_mask": _mask(batch),
        "timestep": _time(batch, 999.0),
        "return_dict": False,
    }


def _cogview3_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": _latent(batch),
        "encoder_hidden_states": _text(batch),
        "timestep": _time(batch, 999, torch.int64),
        "original_size": torch.tensor([[64.0, 64.0]]).repeat(batch, 1),
        "target_size": torch.tensor([[64.0, 64.0]]).repeat(batch, 1),
        "crop_coords": torch.tensor([[0.0, 0.0]]).repeat(batch, 1),
        "return_dict": False,
    }


def _cogview4_inputs(batch: int) -> Inputs:
    return {**_cogview3_inputs(batch), "timestep": _time(batch, 1000.0)}


def _glm_inputs(batch: int) -> Inputs:
    prior = torch.randint(0, 32, (batch, TOKENS))
    return {
        "hidden_states": _latent(batch),
        "encoder_hidden_states": _text(batch),
        "prior_token_id": prior,
        "prior_token_drop": torch.full_like(prior, False, dtype=torch.bool),
        "timestep": _time(batch, 999.0),
        "target_size": torch.tensor([[64.0, 64.0]]).repeat(batch, 1),
        "crop_coords": torch.tensor([[0.0, 0.0]]).repeat(batch, 1),
        "return_dict": False,
    }


def _hidream_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": _latent(batch),
        "timesteps": _time(batch, 1000.0),
        "encoder_hidden_states_t5": _text(batch),
        "encoder_hidden_states_llama3": torch.randn(4, batch, TEXT, 16),
        "pooled_embeds": torch.randn(batch, 16),
        "return_dict": False,
    }


def _hunyuan_image_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 8, SIDE, SIDE),
        "timestep": _time(batch, 1000.0),
        "encoder_hidden_states": _text(batch),
        "encoder_attention_mask": _mask(batch),
        "encoder_hidden_states_2": torch.randn(batch, 4, 16),
        "encoder_attention_mask_2": _mask(batch, length=4),
        "return_dict": False,
    }


def _ernie_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 8, SIDE, SIDE),
        "timestep": _time(batch, 1000.0),
        "text_bth": _text(batch),
        "text_lens": torch.tensor([TEXT, TEXT - 1] * batch)[:batch],
        "return_dict": False,
    }


def _joy_edit_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 2, 4, 1, 2 * SIDE, 2 * SIDE),
        "timestep": _time(batch, 1000.0),
        "encoder_hidden_states": _text(batch),
        "return_dict": False,
    }


def _joy_edit_plus_inputs(batch: int) -> Inputs:
    shapes = [(1, SIDE, SIDE), (1, 2, SIDE)]
    return {
        "hidden_states": torch.randn(batch, TOKENS + 2 * SIDE, 4, 1, 2, 2),
        "timestep": _time(batch, 1000.0),
        "encoder_hidden_states": _text(batch),
        "encoder_hidden_states_mask": _mask(batch),
        "shape_list": [shapes] * batch,
        "return_dict": False,
    }


def _kandinsky6_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 1, 2 * SIDE, 2 * SIDE, 9),
        "audio_hidden_states": None,
        "encoder_hidden_states": _text(batch),
        "pooled_projections": torch.randn(batch, 16),
        "timestep": _time(batch, 1000.0),
        "visual_rope_pos": None,
        "encoder_attention_mask": _mask(batch, torch.bool),
        "visual_token_type_ids": None,
        "return_dict": False,
    }


# latents as images, time between 0 and 1


def _aura_flow_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": _latent(batch),
        "encoder_hidden_states": _text(batch),
        "timestep": _time(batch, 1.0),
        "return_dict": False,
    }


def _lumina_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": _latent(batch),
        "timestep": _time(batch, 0.0),
        "encoder_hidden_states": _text(batch),
        "encoder_mask": _mask(batch),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 16, 16),
        "cross_attention_kwargs": {"base_sequence_length": TOKENS},
        "return_dict": False,
    }


def _lumina2_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": _latent(batch),
        "timestep": _time(batch, 0.0),
        "encoder_hidden_states": _text(batch),
        "encoder_attention_mask": _mask(batch),
        "return_dict": False,
    }


def _z_image_inputs(batch: int) -> Inputs:
    return {
        "x": list(torch.randn(batch, 4, 1, 2 * SIDE, 2 * SIDE).unbind()),
        "t": _time(batch, 0.0),
        "cap_feats": list(_text(batch).unbind()),
        "return_dict": False,
    }


def _omnigen_inputs(batch: int) -> Inputs:
    length = TEXT + 1 + TOKENS
    mask = torch.ones(length, length)
    mask[: TEXT + 1] = torch.ones(TEXT + 1, length).tril()
    return {
        "hidden_states": _latent(batch),
        "timestep": _time(batch, 0.0),
        "input_ids": torch.randint(0, 32, (batch, TEXT)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask.repeat(batch, 1, 1),
        "position_ids": torch.arange(length).repeat(batch, 1),
        "return_dict": False,
    }


def _prx_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": _latent(batch),
        "timestep": _time(batch, 1.0),
        "encoder_hidden_states": _text(batch),
        "attention_mask": _mask(batch, torch.bool),
        "return_dict": False,
    }


def _bria_fibo2_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": _latent(batch),
        "timestep": _time(batch, 1.0),
        "encoder_hidden_states": torch.randn(batch, 2, TEXT, 16),
        "encoder_attention_mask": None,
        "context_latents": None,
        "return_dict": False,
    }


# latents packed as tokens


def _flux_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, TOKENS, 16),
        "timestep": _time(batch, 1.0),
        "guidance": _time(batch, 3.5),
        "pooled_projections": torch.randn(batch, 16),
        "encoder_hidden_states": _text(batch),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": _image_ids(),
        "return_dict": False,
    }


def _flux2_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, TOKENS, 16),
        "timestep": _time(batch, 1.0),
        "guidance": _time(batch, 4.0),
        "encoder_hidden_states": _text(batch),
        "txt_ids": _text_ids4().repeat(batch, 1, 1),
        "img_ids": _image_ids4().unsqueeze(0).expand(batch, -1, -1),
        "return_dict": False,
    }


def _flux3_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, TOKENS, 16),
        "encoder_hidden_states": _text(batch),
        "timestep": _time(batch, 1.0),
        "img_ids": _image_ids4().float(),
        "txt_ids": _text_ids4().float(),
        "return_dict": False,
    }


def _chroma_inputs(batch: int) -> Inputs:
    mask = torch.cat([_mask(batch, torch.float32), torch.ones(batch, TOKENS)], dim=1)
    return {
        "hidden_states": torch.randn(batch, TOKENS, 16),
        "timestep": _time(batch, 1.0),
        "encoder_hidden_states": _text(batch),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": _image_ids(),
        "attention_mask": mask,
        "return_dict": False,
    }


def _bria_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, TOKENS, 16),
        "timestep": _time(batch, 1000.0),
        "encoder_hidden_states": _text(batch),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": _image_ids(),
        "return_dict": False,
    }


def _bria_fibo_inputs(batch: int) -> Inputs:
    mask = torch.cat([_mask(batch, torch.bool), torch.ones(batch, TOKENS, dtype=torch.bool)], dim=1)
    return {
        **_bria_inputs(batch),
        "text_encoder_layers": [_text(batch) for _ in range(4)],
        "joint_attention_kwargs": {"attention_mask": mask[:, None, None, :]},
    }


def _qwen_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, TOKENS, 16),
        "timestep": _time(batch, 1.0),
        "guidance": None,
        "encoder_hidden_states_mask": _mask(batch),
        "encoder_hidden_states": _text(batch),
        "img_shapes": [[(1, SIDE, SIDE)]] * batch,
        "return_dict": False,
    }


def _qwen21_inputs(batch: int) -> Inputs:
    slots = torch.cat([torch.zeros(batch, TEXT), torch.ones(batch, TOKENS // 4)], dim=1)
    return {
        "hidden_states": torch.randn(batch, TOKENS, 16),
        "timestep": _time(batch, 1.0),
        "encoder_hidden_states": _text(batch),
        "encoder_hidden_states_mask": _mask(batch, torch.bool),
        "img_shapes": [[(1, SIDE, SIDE)]] * batch,
        "img_mask": slots.bool(),
        "return_dict": False,
    }


def _ideogram4_inputs(batch: int) -> Inputs:
    pad = 1
    length = TEXT + TOKENS
    ids = torch.zeros(batch, length, 3, dtype=torch.int64)
    ids[:, pad:TEXT] = torch.arange(TEXT - pad)[:, None]
    ids[:, TEXT:] = _image_ids().long() + 65536
    segments = torch.full((batch, length), SEQUENCE_PADDING_INDICATOR)
    segments[:, pad:] = 1
    roles = torch.zeros(batch, length, dtype=torch.int64)
    roles[:, pad:TEXT] = LLM_TOKEN_INDICATOR
    roles[:, TEXT:] = OUTPUT_IMAGE_INDICATOR
    return {
        "hidden_states": torch.cat(
            [torch.zeros(batch, TEXT, 16), torch.randn(batch, TOKENS, 16)], 1
        ),
        "timestep": _time(batch, 0.0),
        "encoder_hidden_states": torch.randn(batch, length, 16),
        "position_ids": ids,
        "segment_ids": segments,
        "indicator": roles,
        "return_dict": False,
    }


def _krea2_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, TOKENS, 16),
        "encoder_hidden_states": torch.randn(batch, TEXT, 3, 16),
        "timestep": _time(batch, 1.0),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), _image_ids()]),
        "encoder_attention_mask": _mask(batch, torch.bool),
        "return_dict": False,
    }


def _longcat_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, TOKENS, 16),
        "timestep": _time(batch, 1.0),
        "guidance": None,
        "encoder_hidden_states": _text(batch),
        "txt_ids": _diagonal_ids(),
        "img_ids": _image_ids(1) + torch.tensor([0.0, TEXT, TEXT]),
        "return_dict": False,
    }


def _ovis_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, TOKENS, 16),
        "timestep": _time(batch, 1.0),
        "encoder_hidden_states": _text(batch),
        "txt_ids": _diagonal_ids(),
        "img_ids": _image_ids(),
        "return_dict": False,
    }


def _nucleus_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, TOKENS, 16),
        "timestep": _time(batch, 1.0),
        "encoder_hidden_states": _text(batch),
        "encoder_hidden_states_mask": _mask(batch),
        "img_shapes": [(1, SIDE, SIDE)] * batch,
        "return_dict": False,
    }


# two classes leave a parameter's memory as it is


def _lumina_next() -> nn.Module:
    model = LuminaNextDiT2DModel(
        sample_size=8,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=16,
    )
    nn.init.zeros_(model.pad_token)
    return model


def _nucleus() -> nn.Module:
    model = NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )
    for name, parameter in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


_HEADS = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
_PATCHES: dict[str, Any] = {
    **_HEADS,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 8,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_elementwise_affine": False,
}
_PIXART: dict[str, Any] = {
    **_PATCHES,
    "attention_head_dim": 24,  # the size conditions take a third of the width each
    "out_channels": 8,
    "cross_attention_dim": 48,
    "caption_channels": 16,
    "norm_type": "ada_norm_single",
    "use_additional_conditions": True,
}
_COGVIEW: dict[str, Any] = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_embed_dim": 16,
    "time_embed_dim": 16,
    "condition_dim": 16,
}
_FLUX: dict[str, Any] = {
    **_HEADS,
    "in_channels": 16,
    "num_single_layers": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}
_FLUX2: dict[str, Any] = {**_FLUX, "axes_dims_rope": (4, 4, 4, 4)}
_JOY: dict[str, Any] = {
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 16,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}

ENTRIES: tuple[ZooEntry, ...] = (
    ZooEntry(
        name="DiTTransformer2DModel",
        build=partial(DiTTransformer2DModel, **_PATCHES, out_channels=8),
        inputs=_dit_inputs,
    ),
    ZooEntry(
        name="Transformer2DModel (ada_norm_zero)",
        build=partial(Transformer2DModel, **_PATCHES, out_channels=8, norm_type="ada_norm_zero"),
        inputs=_dit_inputs,
    ),
    ZooEntry(
        name="Transformer2DModel (ada_norm_single)",
        build=partial(Transformer2DModel, **_PIXART),
        inputs=_pixart_inputs,
    ),
    ZooEntry(
        name="PixArtTransformer2DModel",
        build=partial(PixArtTransformer2DModel, **_PIXART),
        inputs=_pixart_inputs,
    ),
    ZooEntry(
        name="DreamLiteTransformer2DModel",
        build=partial(
            DreamLiteTransformer2DModel,
            **_HEADS,
            in_channels=32,
            cross_attention_dim=16,
            norm_type="ada_norm",
            num_embeds_ada_norm=1000,
        ),
        inputs=_dreamlite_inputs,
    ),
    ZooEntry(
        name="HunyuanDiT2DModel",
        build=partial(
            HunyuanDiT2DModel,
            **{**_HEADS, "num_layers": 4},  # two halves, joined by skips
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=32,
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=16,
            text_len=TEXT,
            text_len_t5=TEXT,
        ),
        inputs=_hunyuan_dit_inputs,
    ),
    ZooEntry(
        name="LuminaNextDiT2DModel",
        build=_lumina_next,
        inputs=_lumina_inputs,
        timesteps=RISING,
    ),
    ZooEntry(
        name="SD3Transformer2DModel",
        build=partial(
            SD3Transformer2DModel,
            **_HEADS,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        inputs=_sd3_inputs,
        timesteps=(1000, 20),
    ),
    ZooEntry(
        name="AuraFlowTransformer2DModel",
        build=partial(
            AuraFlowTransformer2DModel,
            sample_size=8,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pos_embed_max_size=TOKENS,
        ),
        inputs=_aura_flow_inputs,
        timesteps=FLOW,
    ),
    ZooEntry(
        name="FluxTransformer2DModel",
        build=partial(
            FluxTransformer2DModel, **_FLUX, pooled_projection_dim=16, guidance_embeds=True
        ),
        inputs=_flux_inputs,
        timesteps=FLOW,
    ),
    ZooEntry(
        name="Flux2Transformer2DModel",
        build=partial(Flux2Transformer2DModel, **_FLUX2, timestep_guidance_channels=32),
        inputs=_flux2_inputs,
        timesteps=FLOW,
    ),
    ZooEntry(
        name="Flux3Transformer2DModel",
        build=partial(Flux3Transformer2DModel, **_FLUX2, cond_in_channels=16, timestep_channels=32),
        inputs=_flux3_inputs,
        timesteps=FLOW,
    ),
    ZooEntry(
        name="ChromaTransformer2DModel",
        build=partial(
            ChromaTransformer2DModel,
            **_FLUX,
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        inputs=_chroma_inputs,
        timesteps=FLOW,
    ),
    ZooEntry(
        name="SanaTransformer2DModel",
        build=partial(
            SanaTransformer2DModel,
            **_HEADS,
            in_channels=4,
            out_channels=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=16,
            sample_size=8,
        ),
        inputs=_sana_inputs,
    ),
    ZooEntry(
        name="Lumina2Transformer2DModel",
        build=partial(
            Lumina2Transformer2DModel,
            sample_size=8,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=2,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(32, 16, 16),
            cap_feat_dim=16,
        ),
        inputs=_lumina2_inputs,
        timesteps=RISING,
    ),
    ZooEntry(
        name="CogView3PlusTransformer2DModel",
        build=partial(
            CogView3PlusTransformer2DModel, **_COGVIEW, pos_embed_max_size=8, sample_size=8
        ),
        inputs=_cogview3_inputs,
    ),
    ZooEntry(
        name="CogView4Transformer2DModel",
        build=partial(CogView4Transformer2DModel, **_COGVIEW, sample_size=8, rope_axes_dim=(8, 8)),
        inputs=_cogview4_inputs,
        timesteps=(1000, 20),
    ),
    ZooEntry(
        name="QwenImageTransformer2DModel",
        build=partial(
            QwenImageTransformer2DModel,
            **_HEADS,
            in_channels=16,
            out_channels=4,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
        inputs=_qwen_inputs,
        timesteps=FLOW,
    ),
    ZooEntry(
        name="QwenImage21Transformer2DModel",
        build=partial(
            QwenImage21Transformer2DModel,
            **_HEADS,
            in_channels=16,
            out_channels=16,
            context_in_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
        inputs=_qwen21_inputs,
        timesteps=FLOW,
    ),
    ZooEntry(
        name="ZImageTransformer2DModel",
        build=partial(
            ZImageTransformer2DModel,
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=2,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[128, 16, 16],
        ),
        inputs=_z_image_inputs,
        latent="x.0",
        timestep="t",
        timesteps=RISING,
    ),
    ZooEntry(
        name="OmniGenTransformer2DModel",
        build=partial(
            OmniGenTransformer2DModel,
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            num_layers=2,
            pad_token_id=0,
            vocab_size=32,
            rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            pos_embed_max_size=8,
            time_step_dim=16,
        ),
        inputs=_omnigen_inputs,
        timesteps=RISING,
    ),
    ZooEntry(
        name="HiDreamImageTransformer2DModel",
        build=partial(
            HiDreamImageTransformer2DModel,
            **_HEADS,
            patch_size=2,
            in_channels=4,
            num_single_layers=2,
            caption_channels=[16, 16],
            text_emb_dim=16,
            axes_dims_rope=(4, 6, 6),
            max_resolution=(8, 8),
            llama_layers=[0, 1, 2, 3],
        ),
        inputs=_hidream_inputs,
        timestep="timesteps",
        timesteps=(1000, 20),
    ),
    ZooEntry(
        name="BriaTransformer2DModel",
        build=partial(BriaTransformer2DModel, **_FLUX),
        inputs=_bria_inputs,
        timesteps=(1000, 20),
    ),
    ZooEntry(
        name="BriaFiboTransformer2DModel",
        build=partial(BriaFiboTransformer2DModel, **_FLUX, text_encoder_dim=16),
        inputs=_bria_fibo_inputs,
        timesteps=(1000, 20),
    ),
    ZooEntry(
        name="BriaFibo2Transformer2DModel",
        build=partial(
            BriaFibo2Transformer2DModel,
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=2,
            n_heads=2,
            cap_feat_dim=16,
            injection_layer_ids=(1,),
            min_num_gist_tokens=4,
            max_num_gist_tokens=8,
            gist_step=2,
            gist_min_text_len=4,
            gist_max_text_len=16,
            axes_dims=(4, 6, 6),
            axes_lens=(32, 16, 16),
        ),
        inputs=_bria_fibo2_inputs,
        timesteps=FLOW,
    ),
    ZooEntry(
        name="PRXTransformer2DModel",
        build=partial(
            PRXTransformer2DModel,
            in_channels=4,
            context_in_dim=16,
            hidden_size=32,
            mlp_ratio=2.0,
            num_heads=2,
            depth=2,
            axes_dim=[8, 8],
        ),
        inputs=_prx_inputs,
        timesteps=FLOW,
    ),
    ZooEntry(
        name="HunyuanImageTransformer2DModel",
        build=partial(
            HunyuanImageTransformer2DModel,
            **_HEADS,
            in_channels=8,
            out_channels=8,
            num_single_layers=2,
            num_refiner_layers=2,
            text_embed_dim=16,
            text_embed_2_dim=16,
            rope_axes_dim=(8, 8),
        ),
        inputs=_hunyuan_image_inputs,
        timesteps=(1000, 20),
    ),
    ZooEntry(
        name="GlmImageTransformer2DModel",
        build=partial(GlmImageTransformer2DModel, **_COGVIEW, prior_vq_quantizer_codebook_size=32),
        inputs=_glm_inputs,
        timesteps=(999, 19),
    ),
    ZooEntry(
        name="ErnieImageTransformer2DModel",
        build=partial(
            ErnieImageTransformer2DModel,
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=32,
            in_channels=8,
            out_channels=8,
            text_in_dim=16,
            rope_axes_dim=(4, 6, 6),
        ),
        inputs=_ernie_inputs,
        timesteps=(1000, 20),
    ),
    ZooEntry(
        name="Ideogram4Transformer2DModel",
        build=partial(
            Ideogram4Transformer2DModel,
            **_HEADS,
            in_channels=16,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=16,
            mrope_section=(4, 2, 2),
        ),
        inputs=_ideogram4_inputs,
        timesteps=RISING,
    ),
    ZooEntry(
        name="JoyImageEditTransformer3DModel",
        build=partial(JoyImageEditTransformer3DModel, **_JOY),
        inputs=_joy_edit_inputs,
        timesteps=(1000, 20),
    ),
    ZooEntry(
        name="JoyImageEditPlusTransformer3DModel",
        build=partial(JoyImageEditPlusTransformer3DModel, **_JOY),
        inputs=_joy_edit_plus_inputs,
        timesteps=(1000, 20),
    ),
    ZooEntry(
        name="Kandinsky6Transformer3DModel (image)",
        build=partial(
            Kandinsky6Transformer3DModel,
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=16,
            time_dim=16,
            model_dim=32,
            ff_dim=32,
            num_text_blocks=2,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
            in_audio_dim=4,
            out_audio_dim=4,
        ),
        inputs=_kandinsky6_inputs,
        timesteps=(1000, 20),
    ),
    ZooEntry(
        name="Krea2Transformer2DModel",
        build=partial(
            Krea2Transformer2DModel,
            **_HEADS,
            in_channels=16,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=16,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=16,
            axes_dims_rope=(4, 6, 6),
        ),
        inputs=_krea2_inputs,
        timesteps=FLOW,
    ),
    ZooEntry(
        name="LongCatImageTransformer2DModel",
        build=partial(LongCatImageTransformer2DModel, **_FLUX, pooled_projection_dim=16),
        inputs=_longcat_inputs,
        timesteps=FLOW,
    ),
    ZooEntry(
        name="NucleusMoEImageTransformer2DModel",
        build=_nucleus,
        inputs=_nucleus_inputs,
        timesteps=FLOW,
    ),
    ZooEntry(
        name="OvisImageTransformer2DModel",
        build=partial(OvisImageTransformer2DModel, **_FLUX, out_channels=16),
        inputs=_ovis_inputs,
        timesteps=FLOW,
    ),
)
