"""`FeatureExtractionPipeline` as any diffusers pipeline: offload, dtype, progress bar, components, prompts."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from diffusers_repr.pipelines.feature_extraction import FeatureExtractionPipeline
from PIL import Image

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.noise import NoiseLevel
from tests.testers.models import CONDITIONS, PIPELINES, build, saved

IMAGES = [Image.fromarray(np.random.default_rng(at).integers(0, 255, (32, 48, 3), dtype=np.uint8)) for at in range(2)]
CALL = {"layers": ["mid_block", "up_blocks.1"], "timestep": 261, "prompt": "a cat"}


def extract(pipe, **changes):
    return pipe(IMAGES, **{**CALL, **changes})


def test_every_argument_reaches_the_extractor():
    pipe = build("sd")
    settings = {
        "noise": "shared",
        "ensemble_size": 3,
        "pooling": "adaptive:2",
        "batch_size": 2,
        "seed": 7,
        "where": "input",
        "image_size": (16, 32),
        "sample_posterior": True,
    }
    levels = [100, NoiseLevel(nsr=0.5)]
    plain = FeatureExtractor(Denoiser.from_pipe(pipe), ["up_blocks.1"], levels, **settings)
    want = plain(IMAGES, prompt=["a cat", "a dog"], ids=["x", "y"])
    ours = FeatureExtractionPipeline.from_pipe(pipe)
    got = ours(IMAGES, "up_blocks.1", levels, prompt=["a cat", "a dog"], ids=["x", "y"], **settings)
    assert torch.equal(got.features["up_blocks.1"], want.features["up_blocks.1"])
    assert [level.timestep for level in got.level] == [level.timestep for level in want.level]
    embeddings = {k: v for k, v in plain.denoiser.condition("a cat").kwargs().items() if v is not None}
    by_embeddings = extract(ours, prompt=None, embeddings=embeddings)
    assert torch.equal(by_embeddings["mid_block"], extract(ours)["mid_block"])
    with pytest.raises(TypeError, match="pool_size"):
        extract(ours, pool_size=2)


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_from_pipe_takes_every_component_and_touches_none(name):
    pipe = build(name)
    pipe.register_to_config(_name_or_path="somebody/something")
    pipe.scheduler.register_to_config(steps_offset=0, clip_sample=True)
    network = getattr(pipe, "unet", None) or pipe.transformer
    network.register_to_config(_diffusers_version="0.6.0")  # a stock constructor rewrites such a U-Net's config
    before = {
        k: dict(c.config) for k, c in pipe.components.items() if hasattr(c, "config") and hasattr(c, "_internal_dict")
    }
    ours = FeatureExtractionPipeline.from_pipe(pipe)
    assert {k: c for k, c in ours.components.items() if c is not None} == {
        k: c for k, c in pipe.components.items() if c is not None
    }
    assert ours.denoiser.name == "somebody/something"
    ours.denoiser.condition(**CONDITIONS[name])
    assert before == {k: dict(pipe.components[k].config) for k in before}
    for key, value in pipe.config.items():
        if key in ours.config and not key.startswith("_"):
            assert ours.config[key] == value, key
    again = FeatureExtractionPipeline.from_pipe(ours)
    assert again.config.class_name == type(pipe).__name__


def test_from_pipe_with_changes():
    pipe = build("ddim")
    scheduler = DDPMScheduler(prediction_type="sample")
    ours = FeatureExtractionPipeline.from_pipe(pipe, scheduler=scheduler)
    assert ours.scheduler is scheduler
    assert ours.denoiser.schedule.output == "sample"
    with pytest.raises(TypeError, match="from_pipe takes no 'torch_dtype'. It takes: scheduler, unet"):
        FeatureExtractionPipeline.from_pipe(pipe, torch_dtype=torch.float16)


def test_the_class_loads_folders_without_remote_code():
    ours = FeatureExtractionPipeline.from_pretrained(saved("sdxl"))
    assert ours.config.class_name == "StableDiffusionXLPipeline"
    assert ours.config.force_zeros_for_empty_prompt is True
    want = extract(FeatureExtractionPipeline.from_pipe(build("sdxl")))
    assert torch.equal(extract(ours)["mid_block"], want["mid_block"])
    other = FeatureExtractionPipeline.from_pretrained(saved("sdxl"), vae=None, force_zeros_for_empty_prompt=False)
    assert other.vae is None
    assert other.config.force_zeros_for_empty_prompt is False


def test_a_setting_that_is_not_known_is_told(tmp_path, caplog):
    pipe = build("ddpm")
    pipe.register_to_config(brightness=3)
    pipe.save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        FeatureExtractionPipeline.from_pretrained(tmp_path)
    assert "FeatureExtractionPipeline does not keep ['brightness'] of DDPMPipeline" in caplog.text


def test_the_class_of_the_original_is_read_from_its_folder():
    parts = DiffusionPipeline.from_pretrained(saved("ddpm")).components
    empty = dict.fromkeys(FeatureExtractionPipeline._optional_components)
    ours = FeatureExtractionPipeline(**{**empty, **parts})
    images = torch.rand(1, 1, 16, 16)
    with pytest.raises(TypeError, match="class of the pipeline .* is not known; pass it"):
        ours(images, "mid_block", 10)
    ours.register_to_config(_name_or_path=str(saved("ddpm")))
    assert ours(images, "mid_block", 10, pooling="mean")["mid_block"].shape == (1, 16)
    foreign = FeatureExtractionPipeline(**{**empty, **parts}, class_name="NobodysPipeline")
    with pytest.raises(TypeError, match="diffusers .* has no pipeline 'NobodysPipeline'"):
        foreign(images, "mid_block", 10)
    wrong = FeatureExtractionPipeline(**{**empty, **parts}, class_name="StableDiffusionPipeline")
    with pytest.raises(TypeError, match="StableDiffusionPipeline needs vae, text_encoder, tokenizer"):
        wrong(images, "mid_block", 10)
    with pytest.raises(TypeError, match="got no unet or transformer. Make it by FeatureExtractionPipeline.from_pipe"):
        FeatureExtractionPipeline(**{**empty, "scheduler": DDPMScheduler()})


@pytest.mark.parametrize(
    "name",
    ["ddim", "sd", "dit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "flux_guidance", "sana"))],
)
def test_model_offload(name):
    def run(pipe):
        layer = "mid_block" if hasattr(build(name), "unet") else "transformer_blocks.1"
        return pipe(torch.ones(1, 3, 32, 32) / 3, layer, 261, **CONDITIONS[name])[layer]

    want = run(FeatureExtractionPipeline.from_pipe(build(name)))
    ours = FeatureExtractionPipeline.from_pipe(build(name))
    ours.enable_model_cpu_offload(device="cpu")
    assert torch.equal(run(ours), want)
    assert torch.equal(run(ours), want)
    assert all(hasattr(c, "_hf_hook") for c in ours.components.values() if isinstance(c, torch.nn.Module))
    ours.remove_all_hooks()
    assert torch.equal(run(ours), want)


def test_dtype_and_device():
    ours = FeatureExtractionPipeline.from_pipe(build("sd"))
    want = extract(ours)["mid_block"]
    ours.to(torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    got = extract(ours)["mid_block"]
    assert got.dtype == torch.float32
    assert 0 < (got - want).norm() / want.norm() < 0.1
    ours.to("cpu", torch.float32)
    assert (extract(ours)["mid_block"] - want).norm() / want.norm() < 0.05


def test_progress_bar(capfd):
    ours = FeatureExtractionPipeline.from_pipe(build("sd"))  # its bar is switched off: that is taken over
    extract(ours, batch_size=1)
    assert "it/s" not in capfd.readouterr().err
    ours.set_progress_bar_config(disable=False, desc="reading")
    extract(ours, batch_size=1)
    err = capfd.readouterr().err
    assert "reading: 100%" in err
    assert "2/2" in err


def test_prompts_are_encoded_once_until_an_encoder_changes():
    ours, calls = FeatureExtractionPipeline.from_pipe(build("sd")), []
    ours.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    first = extract(ours)
    extract(ours, timestep=100, layers="conv_in")
    extract(ours, prompt=["a cat", "a dog"])
    assert len(calls) == 2
    with torch.no_grad():
        for parameter in ours.text_encoder.parameters():
            parameter.mul_(1.5)
    changed = extract(ours)
    assert len(calls) == 3
    assert not torch.equal(changed["mid_block"], first["mid_block"])
    ours.text_encoder = build("sd").text_encoder
    assert torch.equal(extract(ours)["mid_block"], first["mid_block"])


def test_lora_on_the_text_encoder_is_seen():
    peft = pytest.importorskip("peft")
    ours = FeatureExtractionPipeline.from_pipe(build("sd"))
    plain = extract(ours)["mid_block"]
    ours.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with_lora = extract(ours)["mid_block"]
    assert not torch.equal(with_lora, plain)
    ours.text_encoder.disable_adapters()
    assert torch.equal(extract(ours)["mid_block"], plain)
    ours.text_encoder.enable_adapters()
    assert torch.equal(extract(ours)["mid_block"], with_lora)


def test_replaced_components_are_used():
    ours = FeatureExtractionPipeline.from_pipe(build("ddim"))
    images = torch.rand(1, 3, 16, 16)
    first = ours(images, "mid_block", 500)
    ours.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    assert ours(images, "mid_block", 500).level.nsr != first.level.nsr
    ours.unet = build("class_unet").unet
    with pytest.warns(UserWarning, match="the last id, 9, is taken"):
        assert ours(images, "mid_block", 500)["mid_block"].shape == first["mid_block"].shape
    assert ours(images, "mid_block", 500, class_labels=3)["mid_block"].shape == first["mid_block"].shape


def test_errors_leave_the_pipeline_usable():
    ours = FeatureExtractionPipeline.from_pipe(build("sd"))
    ours.enable_model_cpu_offload(device="cpu")
    want = extract(ours)["mid_block"]
    with pytest.raises(ValueError, match="No layer 'mid'"):
        extract(ours, layers="mid")
    with pytest.raises(ValueError, match="takes a prompt"):
        extract(ours, class_labels=3)
    with pytest.raises(ValueError, match="list is empty"):
        ours([], **CALL)
    assert torch.equal(extract(ours)["mid_block"], want)


def test_gradients_and_train_mode_stay_as_they_were():
    ours = FeatureExtractionPipeline.from_pipe(build("ddim"))
    ours.unet.train()
    features = ours(torch.rand(1, 3, 16, 16), "mid_block", 10)
    assert not features["mid_block"].requires_grad
    assert ours.unet.training
    assert torch.is_grad_enabled()
