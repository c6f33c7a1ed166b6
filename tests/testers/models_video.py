"""Tiny real text-to-video pipelines, beside those of images in `tests/testers/models_text.py`."""

from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from tests.testers.family_cases import register_case
from tests.testers.models import WIDTH, t5_encoder
from tests.testers.tokenizers import t5_tokenizer

VIDEOS = ("wan", "ltx")


@register_case("wan", size=(9, 16, 32), stacks=("blocks",))
def wan() -> WanPipeline:
    """Two calls a step, the conditional one first; one latent frame a group of four frames."""
    tokenizer = t5_tokenizer()
    text = UMT5Config(vocab_size=len(tokenizer), d_model=2 * WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=2 * WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 1.0, 0.7],
        scale_factor_spatial=4,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    return WanPipeline(tokenizer, UMT5EncoderModel(text), vae, scheduler, transformer)


@register_case("ltx", size=(9, 32, 64))
def ltx() -> LTXPipeline:
    """Packed tokens and their size; one call a step, its null half first; one latent frame a group of eight."""
    tokenizer = t5_tokenizer()
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=3,
        caption_channels=2 * WIDTH,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        patch_size=1,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    return LTXPipeline(scheduler, vae, t5_encoder(tokenizer), tokenizer, transformer)
