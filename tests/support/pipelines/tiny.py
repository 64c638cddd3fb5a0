"""Real diffusers pipelines at tiny configurations: random weights, nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from support.models import shake
from tiny_pixart import TEXT_WIDTH, t5_encoder, t5_tokenizer, tiny_pixart, tiny_vae
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

CLIP_WIDTH, CLIP_LENGTH = 16, 24


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer without merges: a token is a byte."""
    units = list(bytes_to_unicode().values())
    names = [*units, *(f"{unit}</w>" for unit in units), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CLIP_LENGTH)


def clip_encoder(kind: type[PreTrainedModel], tokenizer: CLIPTokenizer) -> PreTrainedModel:
    """A CLIP text model of two layers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=32,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config).eval()


def flow_vae() -> AutoencoderKL:
    """The autoencoder of SD3 and Flux: a shift, no convolutions around the latents."""
    return tiny_vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)


def dit_pipeline() -> DiTPipeline:
    """Class labels in, images of 64 x 64 out."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    # As in the checkpoints; with clipping, a network of random weights makes chaos.
    scheduler = DDIMScheduler(clip_sample=False)
    return _quiet(DiTPipeline(shake(transformer), tiny_vae(), scheduler))


def pixart_pipeline() -> PixArtAlphaPipeline:
    """The sample's own: prompts in, images of 256 x 256 out unless asked for less."""
    pipe = tiny_pixart()
    shake(pipe.transformer)
    return pipe


def sd3_pipeline() -> StableDiffusion3Pipeline:
    """Three text encoders; a block with two attentions, as in SD 3.5."""
    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=shake(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=flow_vae(),
            text_encoder=clip_encoder(CLIPTextModelWithProjection, clip),
            tokenizer=clip,
            text_encoder_2=clip_encoder(CLIPTextModelWithProjection, clip),
            tokenizer_2=clip,
            text_encoder_3=t5_encoder(len(t5)),
            tokenizer_3=t5,
        )
    )


def flux_pipeline() -> FluxPipeline:
    """Flux dev: the guidance is an input of the transformer."""
    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return _quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=flow_vae(),
            text_encoder=clip_encoder(CLIPTextModel, clip),
            tokenizer=clip,
            text_encoder_2=t5_encoder(len(t5)),
            tokenizer_2=t5,
            transformer=shake(transformer),
        )
    )


def wan_pipeline() -> WanPipeline:
    """Wan 2.1 with its checkpoints' scheduler: prompts in, videos out, two calls per step."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, 0.0, -0.1, 0.0],
        latents_std=[1.0, 2.0, 1.5, 1.0],
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return _quiet(
        WanPipeline(
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(text).eval(),
            vae=vae.eval(),
            transformer=shake(transformer),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )
    )


def wan22_pipeline() -> WanPipeline:
    """Wan 2.2: one transformer for much noise, another one for little."""
    pipe = wan_pipeline()
    config = {key: v for key, v in pipe.transformer.config.items() if not key.startswith("_")}
    parts = {key: v for key, v in pipe.components.items() if v is not None}
    parts |= {"transformer_2": shake(WanTransformer3DModel(**config), scale=0.06)}
    parts |= {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "boundary_ratio": 0.8}
    return _quiet(WanPipeline(**parts))


def _quiet(pipe: DiffusionPipeline) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True, slots=True, eq=False)
class PipelineCase:
    """One pipeline and how its users call it.

    Attributes:
        name: of the test's parameter.
        make: makes the pipeline; always the same weights.
        options: of every call: sizes, lengths, a negative prompt.
        guidance: name of the argument that the guidance scale goes to.
        scale: the guidance scale of the recorded run.
        calls: of the transformer per step.
        callback: name of the argument for a function to call after every step, or None.
    """

    name: str
    make: Callable[[], Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    guidance: str = "guidance_scale"
    scale: float = 4.0
    calls: int = 1
    callback: str | None = "callback_on_step_end"

    def build(self) -> Any:
        """A pipeline around the one transformer of its kind, which nobody may change."""
        pipe = self.make()
        pipe.transformer = _transformer(self.make)
        return pipe

    def images(self, pipe: Any, prompt: str, seed: int = 1, **options: Any) -> Any:
        """What the pipeline returns for a prompt, or for a class label of the prompt's length."""
        given: dict[str, Any] = {self.guidance: self.scale, **self.options, **options}
        given |= (
            {"class_labels": [len(prompt), 5]}
            if isinstance(pipe, DiTPipeline)
            else {"prompt": prompt}
        )
        return pipe(generator=torch.Generator().manual_seed(seed), return_dict=False, **given)[0]

    def latents(self, pipe: Any, prompt: str, seed: int = 1, **options: Any) -> Tensor:
        """The latents of a run, without decoding where the pipeline can leave it out."""
        if not isinstance(pipe, DiTPipeline):
            return self.images(pipe, prompt, seed, output_type="latent", **options)
        seen: list[Tensor] = []
        handle = pipe.vae.post_quant_conv.register_forward_pre_hook(_keep_input(seen))
        try:
            self.images(pipe, prompt, seed, output_type="np", **options)
        finally:
            handle.remove()
        return seen[0]


@cache
def _transformer(make: Callable[[], Any]) -> nn.Module:
    return make().transformer


def _keep_input(seen: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _, inputs: seen.append(inputs[0])


STEPS = 6
_SMALL = {"num_inference_steps": STEPS, "height": 64, "width": 64, "max_sequence_length": 24}
_TRUE_CFG = {"negative_prompt": "blurred", "true_cfg_scale": 3.0}
CASES = (
    PipelineCase("dit", dit_pipeline, {"num_inference_steps": STEPS}, callback=None),
    PipelineCase(
        "pixart",
        pixart_pipeline,
        {**_SMALL, "clean_caption": False, "use_resolution_binning": False},
        callback="callback",
    ),
    PipelineCase("sd3", sd3_pipeline, _SMALL),
    PipelineCase("flux", flux_pipeline, _SMALL),
    PipelineCase(
        "flux_cfg", flux_pipeline, {**_SMALL, **_TRUE_CFG}, "true_cfg_scale", 3.0, calls=2
    ),
    PipelineCase("wan", wan_pipeline, {**_SMALL, "num_frames": 9}, calls=2),
)
