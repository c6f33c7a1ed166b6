"""Tiny real pipelines of every family, made from configs: nothing is downloaded, weights are seeded.

`PIPELINES[name]()` gives a fresh pipeline; `build(name)` does the same, `saved(name)` a folder with it.
"""

import atexit
import copy
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tests.testers.hosts import mask_in_float64
from tests.testers.tokenizers import clip_tokenizer, gemma_tokenizer, t5_tokenizer

mask_in_float64()

WIDTH = 16  # of every text encoder but T5's, which is 32

PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {}
_BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {}  # those and the others, which no matrix of families runs
# What each is conditioned on, and an image size (H, W) with H != W where the network takes one.
CONDITIONS: dict[str, dict] = {}
SIZES: dict[str, tuple[int, int]] = {}


def _register(name: str, size: tuple[int, int], family: bool = True, **condition):
    """Register a builder: it runs once a process, seeded; each call after gives a copy."""

    def register(function: Callable[[], DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
        @functools.cache
        def master() -> DiffusionPipeline:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(sum(map(ord, name)))
                pipe = function()
            pipe.set_progress_bar_config(disable=True)
            for component in pipe.components.values():
                if isinstance(component, torch.nn.Module):
                    component.eval()
            return pipe

        def build_fresh() -> DiffusionPipeline:
            return copy.deepcopy(master())

        _BUILDERS[name], CONDITIONS[name], SIZES[name] = build_fresh, condition, size
        if family:
            PIPELINES[name] = build_fresh
        return build_fresh

    return register


def build(name: str) -> DiffusionPipeline:
    """A fresh pipeline by its name."""
    return _BUILDERS[name]()


@functools.cache
def saved(name: str) -> Path:
    """A folder with the pipeline, one a process and removed at its end; do not write into it."""
    folder = tempfile.mkdtemp(prefix=f"{name}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build(name).save_pretrained(folder)
    return Path(folder)


# Text encoders and autoencoders.


def clip_config(tokenizer: PreTrainedTokenizerFast, **changes) -> CLIPTextConfig:
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": WIDTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**{**settings, **changes})


def t5_encoder(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=2 * WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )


def gemma_encoder(tokenizer: PreTrainedTokenizerFast) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=2048,
        )
    )


def autoencoder(channels: tuple[int, ...] = (8, 16), **changes) -> AutoencoderKL:
    """An AutoencoderKL of stride `2 ** (len(channels) - 1)`."""
    settings = {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 32,
        "scaling_factor": 0.18215,
    }
    return AutoencoderKL(**{**settings, **changes})


# Pixel models.


def unet2d(channels: int, **changes) -> UNet2DModel:
    settings = {
        "sample_size": 16,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return UNet2DModel(**{**settings, **changes})


@_register("ddpm", size=(16, 24))
def ddpm() -> DDPMPipeline:
    """One channel, predicts noise."""
    return DDPMPipeline(unet2d(1), DDPMScheduler())


@_register("ddim", size=(24, 16))
def ddim() -> DDIMPipeline:
    """Three channels, predicts v."""
    return DDIMPipeline(unet2d(3), DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True))


@_register("class_unet", size=(16, 24), class_labels=3)
def class_unet() -> DDIMPipeline:
    """Class-conditional, ten classes; no stock pipeline samples it."""
    return DDIMPipeline(unet2d(3, num_class_embeds=10), DDIMScheduler())


# Text-to-image models with a U-Net.


def stable_diffusion(**unet) -> StableDiffusionPipeline:
    tokenizer = clip_tokenizer()
    settings = {"sample_size": 16, "cross_attention_dim": WIDTH, "attention_head_dim": 2, "norm_num_groups": 4}
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**settings, **unet),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@_register("sd", size=(32, 48), prompt="a photo of a cat")
def sd() -> StableDiffusionPipeline:
    """Stable Diffusion 1: four stages, two layers a stage, as the real one."""
    return stable_diffusion(block_out_channels=(8, 8, 16, 16))


@_register("short_sd", size=(32, 48), family=False, prompt="a photo of a cat")
def short_sd() -> StableDiffusionPipeline:
    """Its text and its latents, with a quarter of its attention layers, for what does not depend on their number."""
    return stable_diffusion(
        block_out_channels=(8, 16, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def sdxl_unet(pooled: int, **changes) -> UNet2DConditionModel:
    """Two stages, of which the deeper one has two transformer layers; `pooled` is the width of the pooled text."""
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "layers_per_block": 1,
        "attention_head_dim": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": pooled + 6 * 8,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**settings, **changes})


@_register("sdxl", size=(32, 48), prompt="a photo of a cat")
def sdxl() -> StableDiffusionXLPipeline:
    """Two text encoders, size numbers, a VAE that must not run in float16."""
    one, two = clip_tokenizer(), clip_tokenizer()
    unet = sdxl_unet(WIDTH, cross_attention_dim=2 * WIDTH)
    return StableDiffusionXLPipeline(
        vae=autoencoder((8, 8, 16), scaling_factor=0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(clip_config(one)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(two, hidden_act="gelu")),
        tokenizer=one,
        tokenizer_2=two,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


# Transformers.


@_register("dit", size=(32, 32), class_labels=207)
def dit() -> DiTPipeline:
    """Class-conditional over 1000 ids and the null id 1000; learned variance; square inputs only."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=16,
        patch_size=2,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    labels = {0: "tench, Tinca tinca", 207: "golden retriever", 999: "toilet tissue"}
    return DiTPipeline(transformer, autoencoder(), scheduler, id2label=labels)


@_register("pixart", size=(32, 48), prompt="a photo of a cat")
def pixart() -> PixArtSigmaPipeline:
    """PixArt-Sigma."""
    tokenizer = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=2 * WIDTH,
        sample_size=16,
        patch_size=2,
        norm_num_groups=4,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer),
        vae=autoencoder(scaling_factor=0.13025),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


@_register("sd3", size=(32, 48), prompt="a photo of a cat")
def sd3() -> StableDiffusion3Pipeline:
    """Two CLIP encoders with projection and a T5."""
    one, two, three = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=24,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(clip_config(one)),
        tokenizer=one,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(two, hidden_act="gelu")),
        tokenizer_2=two,
        text_encoder_3=t5_encoder(three),
        tokenizer_3=three,
    )


# Two blocks of two streams, two of one.
FLUX = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 2 * WIDTH, "axes_dims_rope": (4, 6, 6)}  # fmt: skip


def _flux(guidance_embeds: bool) -> FluxPipeline:
    one, two = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(**FLUX, pooled_projection_dim=WIDTH, guidance_embeds=guidance_embeds)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance_embeds),
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(clip_config(one)),
        tokenizer=one,
        text_encoder_2=t5_encoder(two),
        tokenizer_2=two,
        transformer=transformer,
    )


@_register("flux", size=(32, 48), prompt="a photo of a cat")
def flux() -> FluxPipeline:
    """As FLUX.1 schnell: no guidance input."""
    return _flux(guidance_embeds=False)


@_register("flux_guidance", size=(32, 48), prompt="a photo of a cat")
def flux_guidance() -> FluxPipeline:
    """As FLUX.1 dev: guidance-distilled, dynamic shifting."""
    return _flux(guidance_embeds=True)


@_register("sana", size=(32, 64), prompt="a photo of a cat")
def sana() -> SanaPipeline:
    """Gemma text, deep-compression autoencoder, flow matching with a DPM solver."""
    tokenizer = gemma_tokenizer()
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
        timestep_scale=0.5,
    )
    halves = {"block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8, 16),
              "layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), (5,))}  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        scaling_factor=0.41407,
        **{f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in halves.items()},
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma_encoder(tokenizer),
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    )
