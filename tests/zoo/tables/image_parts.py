"""What rows of the image table share: configurations, calls, ids and masks of 4x4 tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.tables.inputs import call, filled, integers, last_padded, normal, prompt, repeated
from zoo.tables.sizes import HEIGHT, TEXT

SIDE = 4  # columns of tokens
TOKENS = HEIGHT * SIDE
LATENT, PACKED = normal(4, 2 * HEIGHT, 2 * SIDE), normal(TOKENS, 16)
SIZES = {"original_size": repeated([64.0, 64.0]), "target_size": repeated([64.0, 64.0])}
CROP = repeated([0.0, 0.0])
IMAGE_SHAPES = [(1, HEIGHT, SIDE)]

# A constant, row and column of every token; time, row, column and layer.
IMAGE_IDS = torch.cartesian_prod(torch.arange(1), torch.arange(HEIGHT), torch.arange(SIDE)).float()
DIAGONAL_IDS = torch.stack([torch.zeros(TEXT), torch.arange(TEXT), torch.arange(TEXT)], -1)
NO_IDS = torch.zeros(TEXT, 3)
IMAGE_IDS4 = torch.cartesian_prod(*map(torch.arange, (1, HEIGHT, SIDE, 1)))
TEXT_IDS4 = torch.cartesian_prod(*map(torch.arange, (1, 1, 1, TEXT)))


def text_then_image(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A mask of both: the last token of the text is padding."""
    return torch.cat([last_padded(dtype)(batch), torch.ones(batch, TOKENS, dtype=dtype)], dim=1)


def causal_text() -> Tensor:
    """OmniGen's mask: text and time see what is before them, the image everything."""
    length = TEXT + 1 + TOKENS
    mask = torch.ones(length, length)
    mask[: TEXT + 1] = torch.ones(TEXT + 1, length).tril()
    return mask


def ideogram_ids() -> Tensor:
    """Places of text and image, one token of padding in front."""
    ids = torch.zeros(TEXT + TOKENS, 3, dtype=torch.int64)
    ids[1:TEXT] = torch.arange(TEXT - 1)[:, None]
    ids[TEXT:] = IMAGE_IDS.long() + 65536
    return ids


def normal_experts(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.2)


# fmt: off
HEADS = dict(num_layers=2, num_attention_heads=2, attention_head_dim=16)
PATCHES = dict(
    HEADS, in_channels=4, patch_size=2, sample_size=8, attention_bias=True,
    activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_elementwise_affine=False)
PIXART = dict(
    PATCHES, attention_head_dim=24,  # the size conditions take a third of the width each
    out_channels=8, cross_attention_dim=48, caption_channels=16, norm_type="ada_norm_single",
    use_additional_conditions=True)
COGVIEW = dict(
    HEADS, in_channels=4, out_channels=4, text_embed_dim=16, time_embed_dim=16, condition_dim=16)
FLUX = dict(
    HEADS, in_channels=16, num_single_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6))
FLUX2 = dict(FLUX, axes_dims_rope=(4, 4, 4, 4))
JOY = dict(
    in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=2,
    rope_dim_list=[4, 6, 6])

DIT_CALL = call(hidden_states=LATENT, timestep=filled(999), class_labels=integers(1000))
PIXART_CALL = call(
    hidden_states=LATENT, encoder_hidden_states=prompt(), encoder_attention_mask=last_padded(),
    timestep=filled(999),
    added_cond_kwargs={"resolution": repeated([64.0, 64.0]), "aspect_ratio": repeated([1.0])})
COGVIEW_CALL = call(
    hidden_states=LATENT, encoder_hidden_states=prompt(), timestep=filled(999), **SIZES,
    crop_coords=CROP)
BRIA_CALL = call(
    hidden_states=PACKED, timestep=filled(1000.0), encoder_hidden_states=prompt(), txt_ids=NO_IDS,
    img_ids=IMAGE_IDS)
