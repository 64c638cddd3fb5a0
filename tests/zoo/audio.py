"""Diffusion transformers of diffusers for audio, embeddings and proteins, tiny."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import nn

from zoo.entry import ZooEntry
from zoo.prompts import TEXT, Inputs, prompt, prompt_mask


def _stable_audio() -> nn.Module:
    return diffusers.StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=16,
    )


def _stable_audio_inputs(batch: int) -> Inputs:
    """One time for the whole batch; a cosine schedule of sigmas, counted by their arctangent."""
    return {
        "hidden_states": torch.randn(batch, 4, 8),
        "timestep": torch.full((1,), 0.998),
        "encoder_hidden_states": prompt(batch),
        "global_hidden_states": torch.randn(batch, 1, 8),
        "rotary_embedding": get_1d_rotary_pos_embed(
            4, 9, use_real=True, repeat_interleave_real=False
        ),
        "return_dict": False,
    }


def _stable_audio_3() -> nn.Module:
    return diffusers.StableAudio3DiTModel(
        io_channels=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        cond_token_dim=16,
        global_cond_dim=8,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        ff_mult=2,
        num_memory_tokens=3,
    )


def _stable_audio_3_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 8, 12),
        "timestep": torch.ones(batch),
        "encoder_hidden_states": prompt(batch),
        "global_hidden_states": torch.randn(batch, 8),
        "encoder_attention_mask": prompt_mask(batch, torch.long),
        "return_dict": False,
    }


def _ace_step() -> nn.Module:
    return diffusers.AceStepTransformer1DModel(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        in_channels=24,
        audio_acoustic_hidden_dim=8,
        sliding_window=4,
        rope_theta=10000.0,
    )


def _ace_step_inputs(batch: int) -> Inputs:
    """Odd layers attend in a window; the second timestep is the first, as in the pipeline."""
    return {
        "hidden_states": torch.randn(batch, 16, 8),
        "timestep": torch.ones(batch),
        "timestep_r": torch.ones(batch),
        "encoder_hidden_states": prompt(batch, 32),
        "context_latents": torch.randn(batch, 16, 16),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _longcat() -> nn.Module:
    return diffusers.LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=2, dit_heads=4, dit_text_dim=16, latent_dim=8, ff_mult=2.0
    )


def _longcat_inputs(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, 12, 8),
        "encoder_hidden_states": prompt(batch),
        "encoder_attention_mask": prompt_mask(batch, torch.bool),
        "timestep": torch.ones(batch),
        "attention_mask": torch.ones(batch, 12, dtype=torch.bool),
        "latent_cond": torch.zeros(batch, 12, 8),
    }


def _minimax_music_3() -> nn.Module:
    return diffusers.MiniMaxMusic3Transformer1DModel(
        in_channels=8,
        condition_dim=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        ff_inner_dim=32,
        rotary_dim=4,
        fourier_embedding_dim=8,
    )


def _minimax_music_3_inputs(batch: int) -> Inputs:
    """Time goes up: 0 is noise."""
    return {
        "hidden_states": torch.randn(batch, 8, 12),
        "timestep": torch.zeros(batch),
        "encoder_hidden_states": torch.randn(batch, 12, 16),
        "return_dict": False,
    }


def _t5_film() -> nn.Module:
    return diffusers.T5FilmDecoder(
        input_dims=8, targets_length=12, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=32
    )


def _t5_film_inputs(batch: int) -> Inputs:
    """Notes of different counts, and the spectrogram before, which the first segment lacks."""
    return {
        "encodings_and_masks": [
            (torch.randn(batch, TEXT, 16), prompt_mask(batch, torch.bool)),
            (torch.randn(batch, 4, 16), torch.ones(batch, 4)),
        ],
        "decoder_input_tokens": torch.randn(batch, 12, 8),
        "decoder_noise_time": torch.full((batch,), 0.999),
    }


def _prior() -> nn.Module:
    return diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=12,
        num_embeddings=TEXT,
        additional_embeddings=4,
    )


def _prior_inputs(batch: int) -> Inputs:
    """The embedding of an image, not an image; the timestep is a scalar."""
    return {
        "hidden_states": torch.randn(batch, 12),
        "timestep": torch.tensor(999),
        "proj_embedding": torch.randn(batch, 12),
        "encoder_hidden_states": prompt(batch, 12),
        "attention_mask": prompt_mask(batch, torch.bool),
    }


def _rfd4() -> nn.Module:
    """The features that want no annotation of atoms."""
    return diffusers.RFD4ProteinaTransformer(
        nlayers=3,
        token_dim=24,
        nheads=2,
        dim_cond=16,
        pair_repr_dim=16,
        latent_dim=8,
        token_type_emb_dim=8,
        t_emb_dim=16,
        seq_sep_dim=8,
        xt_pair_dist_dim=8,
        feats_seq=("xt_bb_ca", "xt_local_latents", "token_type", "cond_a37coors_nm"),
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining"),
        feats_pair_repr=("xt_bb_ca_pair_dists", "bond_mask", "bond_order", "molecule_idx_pair"),
        tri_mult_c=8,
        num_sequence_classes=21,
    )


def _rfd4_inputs(batch: int) -> Inputs:
    """Two times, both up; two passes of the trunk for a step."""
    tokens = 10
    return {
        "bb_ca": torch.randn(batch, tokens, 3),
        "local_latents": torch.randn(batch, tokens, 8),
        "bb_ca_time": torch.zeros(batch),
        "local_latents_time": torch.zeros(batch),
        "padding_mask": prompt_mask(batch, torch.bool, tokens),
        "token_type": torch.randint(7, (batch, tokens)),
        "atom37_mask": torch.ones(batch, tokens, 37, dtype=torch.bool),
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(batch, tokens, dtype=torch.bool),
            "supports_local_latent": torch.ones(batch, tokens, dtype=torch.bool),
            "molecule_iid": torch.arange(tokens).div(5, rounding_mode="floor").repeat(batch, 1),
        },
        "recycle_depth": 2,
        "attention_kwargs": None,
    }


ENTRIES: tuple[ZooEntry, ...] = (
    ZooEntry("StableAudioDiTModel", _stable_audio, _stable_audio_inputs, timesteps=(0.998, 0.18)),
    ZooEntry(
        "StableAudio3DiTModel", _stable_audio_3, _stable_audio_3_inputs, timesteps=(1.0, 0.02)
    ),
    ZooEntry("AceStepTransformer1DModel", _ace_step, _ace_step_inputs, timesteps=(1.0, 0.02)),
    ZooEntry("LongCatAudioDiTTransformer", _longcat, _longcat_inputs, timesteps=(1.0, 0.06)),
    ZooEntry(
        "MiniMaxMusic3Transformer1DModel",
        _minimax_music_3,
        _minimax_music_3_inputs,
        timesteps=(0.0, 0.97),
    ),
    ZooEntry(
        "T5FilmDecoder",
        _t5_film,
        _t5_film_inputs,
        latent="decoder_input_tokens",
        timestep="decoder_noise_time",
        timesteps=(0.999, 0.001),
    ),
    ZooEntry("PriorTransformer", _prior, _prior_inputs),
    ZooEntry(
        "RFD4ProteinaTransformer",
        _rfd4,
        _rfd4_inputs,
        latent="bb_ca",
        timestep="bb_ca_time",
        timesteps=(0.0, 0.98),
    ),
)
