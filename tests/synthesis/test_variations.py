"""Variants by a vector (RCG) and by unCLIP: each equals the pipeline called for it alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from diffusers_repr.pipelines.rcg import RCGPipeline
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusers_repr import PAG, Denoiser, IdentityAssigner
from diffusers_repr.data.image_data import load_images
from diffusers_repr.encoders import load_encoder
from diffusers_repr.models import VectorEmbedding
from diffusers_repr.synthesis import GenerationRecipe, GuidanceSampler, RepresentationAugmenter, UnCLIPAugmenter
from diffusers_repr.synthesis.recipe import open_maker, read_generation
from tests.objectives.cases import shake
from tests.testers.models import WIDTH, autoencoder, clip_config
from tests.testers.tokenizers import clip_tokenizer

ENCODER = "examples/models/digits-ddpm:mid_block@100"


def unclip() -> StableUnCLIPImg2ImgPipeline:
    """Stable unCLIP at toy size, 32 x 32 pixels."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    vision = CLIPVisionConfig(hidden_size=WIDTH, projection_dim=WIDTH, num_hidden_layers=1, num_attention_heads=2,
                              image_size=16, intermediate_size=16, patch_size=8)  # fmt: skip
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    unet = UNet2DConditionModel(sample_size=16, block_out_channels=(8, 16), cross_attention_dim=WIDTH,
                                norm_num_groups=4, attention_head_dim=2, class_embed_type="projection",
                                projection_class_embeddings_input_dim=2 * WIDTH, layers_per_block=1,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))  # fmt: skip
    return StableUnCLIPImg2ImgPipeline(
        feature_extractor=processor, image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"), tokenizer=tokenizer,
        text_encoder=CLIPTextModel(clip_config(tokenizer)).eval(), unet=shake(unet).eval(),
        scheduler=DDIMScheduler(), vae=autoencoder().eval(),
    )  # fmt: skip


def as_array(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_unclip_variants_are_those_of_the_stock_pipeline():
    data = load_images("digits", "test").select(range(2))
    denoiser = Denoiser.from_pipe(unclip())
    settings = {"num_inference_steps": 2, "scales": GuidanceSampler(2, 6), "name": "unclip"}
    maker = UnCLIPAugmenter(denoiser, data, noise_level=10, **settings)
    keys = maker.keys(2)
    made = as_array(maker(keys))
    assert made.shape == (4, *denoiser.image_size, 3)
    assert len({image.tobytes() for image in made}) == 4
    for key, image in zip(keys, made, strict=True):
        source = data.read([int(key.source.split("#")[0].rpartition("/")[2])])[0].convert("RGB")
        call = {"noise_level": 10, "guidance_scale": json.loads(key.guidance)["guidance_scale"], "output_type": "np"}
        call["generator"] = torch.Generator().manual_seed(key.seed)
        (own,) = denoiser.pipe([source], prompt=[""], num_inference_steps=2, **call).images
        assert np.abs(np.round(own * 255) - image).max() <= 1
    assert UnCLIPAugmenter(denoiser, data, noise_level=11, **settings).keys(2)[0].name != keys[0].name
    with pytest.raises(ValueError, match="timestep from 0 to 999"):
        UnCLIPAugmenter(denoiser, data, noise_level=1000)


@pytest.fixture(scope="module")
def vectors():
    """An encoder of the digits, its assigner, and a network of images of such vectors."""
    encoder, data = load_encoder(ENCODER), load_images("digits", "test").select(range(6))
    assigner = IdentityAssigner(encoder.dim).fit(encoder(data.read(range(6))).global_features)
    torch.manual_seed(0)
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2, class_embed_type="identity", layers_per_block=1)  # fmt: skip
    pipe = RCGPipeline(unet=shake(unet).eval(), scheduler=DDIMScheduler(),
                       condition_embedding=VectorEmbedding(encoder.dim, 32).eval())  # fmt: skip
    return encoder, assigner, pipe, data


def test_variants_by_a_vector_keep_the_vector_and_draw_the_rest(vectors):
    encoder, assigner, pipe, data = vectors
    maker = RepresentationAugmenter(Denoiser.from_pipe(pipe), data, encoder, assigner, num_inference_steps=2,
                                    name="rcg")  # fmt: skip
    keys = maker.keys(2, [1, 4])
    made, given = as_array(maker(keys)), []
    for key, image in zip(keys, made, strict=True):
        row = int(key.source.split("#")[0].rpartition("/")[2])
        vector = assigner.assign(encoder([data.read([row])[0]]).global_features)
        given.append(vector)
        call = {"generator": torch.Generator().manual_seed(key.seed), "output_type": "np"}
        (own,) = pipe(condition=vector, num_inference_steps=2, **call).images
        assert np.abs(np.round(own * 255)[..., 0] - image).max() <= 1
    assert torch.equal(given[0], given[1])
    assert not torch.equal(given[0], given[2])
    assert len({image.tobytes() for image in made}) == 4
    other = IdentityAssigner(encoder.dim).fit(torch.randn(5, encoder.dim))
    again = RepresentationAugmenter(Denoiser.from_pipe(pipe), data, encoder, other, num_inference_steps=2, name="rcg")
    assert again.keys(1, [1])[0].name != keys[0].name
    with pytest.raises(ValueError, match="vectors of 64 are needed"):
        RepresentationAugmenter(Denoiser.from_pipe(pipe), data, encoder, IdentityAssigner(3))


def test_further_guidance_acts_on_both(vectors):
    encoder, assigner, pipe, data = vectors
    given = {"num_inference_steps": 2, "name": "guided", "guidance": [PAG(20.0)]}
    for maker in (
        RepresentationAugmenter(Denoiser.from_pipe(pipe), data, encoder, assigner, **given),
        UnCLIPAugmenter(Denoiser.from_pipe(unclip()), data, **given, scales=GuidanceSampler(1, 1)),
    ):
        keys = maker.keys(1, [1, 4])
        made, alone = as_array(maker(keys)), as_array(maker(keys[1:]))
        assert np.abs(made[1:] - alone).max() <= 1
        maker.guidance = []
        assert np.abs(as_array(maker(keys)) - made).max() > 3
        assert maker.keys(1, [1])[0].name != keys[0].name
    with pytest.raises(ValueError, match="set guidance_scale to 1"):
        UnCLIPAugmenter(maker.denoiser, data, **given, scales=GuidanceSampler(2, 6))


def test_a_recipe_opens_both(vectors, tmp_path):
    encoder, assigner, pipe, _ = vectors
    pipe.save_pretrained(tmp_path / "rcg")
    assigner.save_pretrained(tmp_path / "assigner")
    recipe = {"model": str(tmp_path / "rcg"), "count": 1, "dataset_name": "digits", "limit": 1,
              "num_inference_steps": 2}  # fmt: skip
    given = {"method": "representation", "encoder": ENCODER, "assigner": str(tmp_path / "assigner")}
    maker, keys = open_maker(GenerationRecipe(**recipe, **given))
    assert str(tmp_path) not in repr(keys())
    assert maker(keys())[0].size == (8, 8)
    for changes, message in (
        ({"method": "representation"}, "needs `encoder` and `assigner`"),
        ({**given, "method": "code"}, "`encoder` would do nothing"),
        ({**given, "strength": 0.3}, "`strength` would do nothing"),
        ({"method": "image_to_image", "noise_level": 3}, "`noise_level` would do nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            GenerationRecipe(**recipe, **changes)
    with pytest.raises(ValueError, match="made by image_to_image"):
        open_maker(GenerationRecipe("examples/models/digits-ddpm", "image_variation", 1, dataset_name="digits"))


def test_every_recipe_of_the_examples_is_one():
    methods = []
    for file in sorted(Path("examples/configs/generate").glob("*.yaml")):
        methods.append(read_generation(file).method)
        assert f"diffusers-repr generate {file}" in file.read_text()
    assert {"class", "prompt", "image_to_image", "code", "representation"} <= set(methods)
