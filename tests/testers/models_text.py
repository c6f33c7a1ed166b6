"""Tiny real text-to-image pipelines of further families, made from configs: see `tests/testers/models.py`.

`FAMILIES[name]` tells what a test needs to know of one; `family_pipeline(name)` gives a fresh pipeline.
"""

import importlib
import importlib.util
import sys
import types

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import BertConfig, BertModel

from tests.testers.family_cases import FAMILIES, embeds, family_pipeline, register_case
from tests.testers.models import FLUX, WIDTH, autoencoder, gemma_encoder, sdxl_unet, t5_encoder
from tests.testers.tokenizers import bert_tokenizer, gemma_tokenizer, t5_tokenizer

__all__ = ["FAMILIES", "family_pipeline", "kolors_class"]

LATENT = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0609}


def kolors_class(module: str, name: str) -> type[DiffusionPipeline]:
    """A pipeline of Kolors without sentencepiece, which the file of its tokenizer imports: none is made here."""
    missing = importlib.util.find_spec("sentencepiece") is None
    if missing:
        sys.modules["sentencepiece"] = types.SimpleNamespace(SentencePieceProcessor=None)  # type: ignore[assignment]
    try:
        return getattr(importlib.import_module(f"diffusers.pipelines.{module}"), name)
    finally:
        if missing:
            del sys.modules["sentencepiece"]


@register_case("kolors", size=(32, 48), **{
    "call": {"prompt_embeds": embeds(1, 12, 24), "pooled_prompt_embeds": embeds(1, 24, seed=1)},
    "null": {"negative_prompt_embeds": embeds(1, 12, 24, seed=2), "negative_pooled_prompt_embeds": embeds(1, 24)},
    "stacks": ("down_blocks", "up_blocks"),
})  # fmt: skip
def kolors() -> DiffusionPipeline:
    """A UNet2DConditionModel that projects the text of a language model itself."""
    unet = sdxl_unet(24, cross_attention_dim=WIDTH, encoder_hid_dim=24, encoder_hid_dim_type="text_proj")
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.014, num_train_timesteps=1100, beta_schedule="scaled_linear", steps_offset=1
    )
    pipeline = kolors_class("kolors.pipeline_kolors", "KolorsPipeline")
    return pipeline(autoencoder((8, 8, 16), scaling_factor=0.13025), None, None, unet, scheduler)


@register_case("hunyuan_dit", size=(64, 96), stacks=("blocks",),
           off={"guidance_scale": 1.0, "use_resolution_binning": False},
           guided={"guidance_scale": 4.0, "use_resolution_binning": False})  # fmt: skip
def hunyuan_dit() -> HunyuanDiTPipeline:
    """BERT and T5 text in one cross-attention, long skips, learned variance; its rope is an input."""
    tokenizer = bert_tokenizer()
    text = BertConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    t5 = t5_tokenizer()
    transformer = HunyuanDiT2DModel(
        sample_size=8,
        num_layers=4,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        mlp_ratio=2,
        in_channels=4,
        hidden_size=WIDTH,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=2 * WIDTH,
        pooled_projection_dim=WIDTH,
        text_len=77,
        text_len_t5=256,
    )
    return HunyuanDiTPipeline(
        vae=autoencoder((4, 4, 8, 8), scaling_factor=0.13025),
        text_encoder=BertModel(text),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_end=0.018, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5_encoder(t5),
        tokenizer_2=t5,
    )


@register_case("aura_flow", size=(32, 48), stacks=("joint_transformer_blocks", "single_transformer_blocks"))
def aura_flow() -> AuraFlowPipeline:
    """Two streams, then one; eight register tokens before the text."""
    tokenizer = t5_tokenizer()
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pos_embed_max_size=256,
    )
    vae = autoencoder(scaling_factor=0.13025)
    return AuraFlowPipeline(
        tokenizer, t5_encoder(tokenizer), vae, transformer, FlowMatchEulerDiscreteScheduler(shift=1.73)
    )


@register_case("lumina2", size=(64, 96), stacks=("noise_refiner", "layers"),
           guided={"guidance_scale": 4.0, "cfg_normalization": False})  # fmt: skip
def lumina2() -> Lumina2Pipeline:
    """One stream over caption and image, grouped queries; time runs from noise to image."""
    tokenizer = gemma_tokenizer()
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 32, 32),
        cap_feat_dim=WIDTH,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder((4, 4, 8, 8), scaling_factor=0.3611, **LATENT),
        text_encoder=gemma_encoder(tokenizer),
        tokenizer=tokenizer,
    )


@register_case("cogview4", size=(32, 48), **{
    "call": {"prompt_embeds": embeds(1, 16, 24)}, "null": {"negative_prompt_embeds": embeds(1, 16, 24, seed=2)},
})  # fmt: skip
def cogview4() -> CogView4Pipeline:
    """One set of weights for text and image tokens; sizes are inputs."""
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=24,
        time_embed_dim=WIDTH,
        condition_dim=8,
        sample_size=8,
        rope_axes_dim=(32, 32),
    )
    vae = autoencoder((8, 16), scaling_factor=1.0, **LATENT)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    return CogView4Pipeline(None, None, vae, transformer, scheduler)


@register_case("chroma", size=(32, 48), stacks=("transformer_blocks", "single_transformer_blocks"))
def chroma() -> ChromaPipeline:
    """As FLUX, with modulation from one small network and a mask over the text's padding."""
    tokenizer = t5_tokenizer()
    transformer = ChromaTransformer2DModel(
        **FLUX, approximator_num_channels=8, approximator_hidden_dim=WIDTH, approximator_layers=1
    )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(scaling_factor=0.3611, **LATENT),
        text_encoder=t5_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    )


@register_case("qwen_image", size=(32, 48), **{
    "call": {"prompt_embeds": embeds(1, 9, 24), "prompt_embeds_mask": torch.ones(1, 9, dtype=torch.long)},
    "null": {
        "negative_prompt_embeds": embeds(1, 12, 24, seed=2),
        "negative_prompt_embeds_mask": torch.ones(1, 12, dtype=torch.long),
    },
    "off": {"true_cfg_scale": 1.0}, "guided": {"true_cfg_scale": 4.0},
})  # fmt: skip
def qwen_image() -> QwenImagePipeline:
    """Packed latents of a video autoencoder; two streams all through."""
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 1.0, 0.7],
    )
    return QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)


@register_case("hunyuan_image", size=(32, 48), stacks=("transformer_blocks", "single_transformer_blocks"), **{
    "call": {
        "prompt_embeds": embeds(1, 9, 24), "prompt_embeds_mask": torch.tensor([[1] * 7 + [0] * 2]),
        "prompt_embeds_2": embeds(1, 6, 20, seed=1), "prompt_embeds_mask_2": torch.tensor([[1] * 4 + [0] * 2]),
    },
    "null": {
        "negative_prompt_embeds": embeds(1, 9, 24, seed=2), "negative_prompt_embeds_mask": torch.ones(1, 9),
        "negative_prompt_embeds_2": embeds(1, 6, 20, seed=3), "negative_prompt_embeds_mask_2": torch.ones(1, 6),
    },
    "off": {}, "guided": {},
})  # fmt: skip
def hunyuan_image() -> HunyuanImagePipeline:
    """Two texts; guided by a component, which is off unless a test switches it on."""
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=24,
        text_embed_2_dim=20,
        rope_axes_dim=(4, 4),
    )
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),  # it norms in 32 groups
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=32,
        scaling_factor=0.75,
    )
    return HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
        guider=AdaptiveProjectedMixGuidance(enabled=False),
    )


@register_case("flux2", size=(32, 48), stacks=("transformer_blocks", "single_transformer_blocks"), **{
    "call": {"prompt_embeds": embeds(1, 9, 24)}, "null": {}, "off": {}, "guided": {},
})  # fmt: skip
def flux2() -> Flux2Pipeline:
    """Attention fused with the MLP; latents normalised by the autoencoder's batch norm."""
    transformer = Flux2Transformer2DModel(**{**FLUX, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 4, 4)})
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    return Flux2Pipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)


@register_case("z_image", size=(32, 48), stacks=("noise_refiner", "layers"), **{
    "call": {"prompt_embeds": [embeds(9, 24)]}, "null": {"negative_prompt_embeds": [embeds(40, 24, seed=2)]},
    "off": {"guidance_scale": 0.0}, "guided": {"guidance_scale": 3.0},
})  # fmt: skip
def z_image() -> ZImagePipeline:
    """Lists of images and captions; one stream, the image first; time runs from noise to image."""
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 4, 4],
        axes_lens=[256, 32, 32],
    )
    vae = autoencoder(scaling_factor=0.3611, **LATENT)
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # diffusers 0.36 leaves them as memory was
        torch.nn.init.normal_(token, std=0.02)
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae, None, None, transformer)
