"""Diffusion transformers of diffusers for audio, embeddings and proteins, tiny."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from zoo.entry import ZooEntry
from zoo.tables.inputs import call, filled, integers, normal, prompt, repeated, some_padded
from zoo.tables.sizes import TEXT

RESIDUES = 10

# fmt: off
ENTRIES: tuple[ZooEntry, ...] = (
    # One time for the whole batch; a cosine schedule of sigmas, counted by their arctangent.
    ZooEntry(
        "StableAudioDiTModel",
        dict(sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8,
             num_attention_heads=4, num_key_value_attention_heads=2, out_channels=4,
             cross_attention_dim=16, time_proj_dim=8, global_states_input_dim=8,
             cross_attention_input_dim=16),
        call(hidden_states=normal(4, 8), timestep=torch.full((1,), 0.998),
             encoder_hidden_states=prompt(), global_hidden_states=normal(1, 8),
             rotary_embedding=get_1d_rotary_pos_embed(
                 4, 9, use_real=True, repeat_interleave_real=False)),
        timesteps=(0.998, 0.18)),
    ZooEntry(
        "StableAudio3DiTModel",
        dict(io_channels=8, embed_dim=32, depth=2, num_heads=4, cond_token_dim=16,
             global_cond_dim=8, local_add_cond_dim=5, timestep_features_dim=16, ff_mult=2,
             num_memory_tokens=3),
        call(hidden_states=normal(8, 12), timestep=filled(1.0), encoder_hidden_states=prompt(),
             global_hidden_states=normal(8), encoder_attention_mask=some_padded()),
        timesteps=(1.0, 0.02)),
    # Odd layers attend in a window; the second timestep is the first, as in the pipeline.
    ZooEntry(
        "AceStepTransformer1DModel",
        dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, in_channels=24, audio_acoustic_hidden_dim=8,
             sliding_window=4, rope_theta=10000.0),
        call(hidden_states=normal(16, 8), timestep=filled(1.0), timestep_r=filled(1.0),
             encoder_hidden_states=prompt(32), context_latents=normal(16, 16),
             attention_kwargs=None),
        timesteps=(1.0, 0.02)),
    ZooEntry(
        "LongCatAudioDiTTransformer",
        dict(dit_dim=32, dit_depth=2, dit_heads=4, dit_text_dim=16, latent_dim=8, ff_mult=2.0),
        dict(hidden_states=normal(12, 8), encoder_hidden_states=prompt(),
             encoder_attention_mask=some_padded(torch.bool), timestep=filled(1.0),
             attention_mask=filled(True, 12), latent_cond=filled(0.0, 12, 8)),
        timesteps=(1.0, 0.06)),
    # Time goes up: 0 is noise.
    ZooEntry(
        "MiniMaxMusic3Transformer1DModel",
        dict(in_channels=8, condition_dim=16, num_layers=2, num_attention_heads=2,
             attention_head_dim=8, ff_inner_dim=32, rotary_dim=4, fourier_embedding_dim=8),
        call(hidden_states=normal(8, 12), timestep=filled(0.0),
             encoder_hidden_states=normal(12, 16)),
        timesteps=(0.0, 0.97)),
    # Notes of different counts, and the spectrogram before, which the first segment lacks.
    ZooEntry(
        "T5FilmDecoder",
        dict(input_dims=8, targets_length=12, d_model=16, num_layers=2, num_heads=2, d_kv=8,
             d_ff=32),
        dict(encodings_and_masks=[
                 (prompt(), some_padded(torch.bool)), (normal(4, 16), filled(1.0, 4))],
             decoder_input_tokens=normal(12, 8), decoder_noise_time=filled(0.999)),
        latent="decoder_input_tokens", timestep="decoder_noise_time", timesteps=(0.999, 0.001)),
    # The embedding of an image, not an image; the timestep is a scalar.
    ZooEntry(
        "PriorTransformer",
        dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=12,
             num_embeddings=TEXT, additional_embeddings=4),
        dict(hidden_states=normal(12), timestep=torch.tensor(999), proj_embedding=normal(12),
             encoder_hidden_states=prompt(12), attention_mask=some_padded(torch.bool))),
    # The features that want no annotation of atoms; two times, both up; two passes of the trunk
    # for a step.
    ZooEntry(
        "RFD4ProteinaTransformer",
        dict(nlayers=3, token_dim=24, nheads=2, dim_cond=16, pair_repr_dim=16, latent_dim=8,
             token_type_emb_dim=8, t_emb_dim=16, seq_sep_dim=8, xt_pair_dist_dim=8,
             feats_seq=("xt_bb_ca", "xt_local_latents", "token_type", "cond_a37coors_nm"),
             feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining"),
             feats_pair_repr=("xt_bb_ca_pair_dists", "bond_mask", "bond_order",
                              "molecule_idx_pair"),
             tri_mult_c=8, num_sequence_classes=21),
        dict(bb_ca=normal(RESIDUES, 3), local_latents=normal(RESIDUES, 8), bb_ca_time=filled(0.0),
             local_latents_time=filled(0.0), padding_mask=some_padded(torch.bool, RESIDUES),
             token_type=integers(7, RESIDUES), atom37_mask=filled(True, RESIDUES, 37),
             conditioning={
                 "is_in_context_conditioning": filled(False, RESIDUES),
                 "supports_local_latent": filled(True, RESIDUES),
                 "molecule_iid": repeated(torch.arange(RESIDUES) // 5)},
             recycle_depth=2, attention_kwargs=None),
        latent="bb_ca", timestep="bb_ca_time", timesteps=(0.0, 0.98)),
)
