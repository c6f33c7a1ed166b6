"""Networks of videos: pixels and latents with frames, features with a third axis, and what is for images alone."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, WanPipeline
from PIL import Image

from diffusers_repr import PAG, SAG, AutoGuidance, EnergyGuidance, FeatureExtractor, guide
from diffusers_repr.denoiser import Denoiser, list_layers
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.denoiser.videos import to_video_pixels
from diffusers_repr.encoders import Encoder
from diffusers_repr.encoders.denoiser import DenoiserSource
from diffusers_repr.features.attention import attention_maps
from diffusers_repr.features.extraction import extract_to_store
from diffusers_repr.heads.dense.features import read_features, tap_channels
from diffusers_repr.objectives import ClassifierBase, DiffusionObjective, ReadoutObjective
from diffusers_repr.sweep import measure_alignment, select_features
from diffusers_repr.tasks import Probe
from tests.capture.test_capture import full_forward
from tests.testers.families import sides
from tests.testers.models import build
from tests.testers.models_text import FAMILIES, family_pipeline
from tests.testers.models_video import VIDEOS

LAYERS = {"wan": ["patch_embedding", "blocks.1"], "ltx": ["proj_in", "transformer_blocks.1"]}


def drawn(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def changed(model, **changes):
    """A model of the same class and config but for some arguments."""
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return type(model)(**{**config, **changes}).eval()


def normalised(pipe):
    """A pipeline whose autoencoder's statistics matter."""
    if isinstance(pipe.vae, AutoencoderKLLTXVideo):
        pipe.vae.latents_mean.copy_(drawn(4, seed=1))
        pipe.vae.latents_std.copy_(drawn(4, seed=2) + 0.5)
    return pipe


def test_videos_to_pixels():
    """Frames by PIL, numpy and tensors alike; what is a batch of images is one frame each."""
    array = (drawn(2, 5, 8, 12, 3).numpy() * 255).astype(np.uint8)
    tensors = torch.from_numpy(array).permute(0, 1, 4, 2, 3)
    wanted = tensors.transpose(1, 2).float() / 127.5 - 1
    pil = [[Image.fromarray(frame) for frame in video] for video in array]
    for given in (array, tensors, pil, list(array), list(tensors), tuple(pil)):
        assert torch.allclose(to_video_pixels(given), wanted, atol=1e-6)
    for images in (array[0], tensors[0], pil[0]):
        assert torch.allclose(to_video_pixels(images), wanted[0].transpose(0, 1).unsqueeze(2), atol=1e-6)
    assert to_video_pixels(pil[0][0]).shape == (1, 3, 1, 8, 12)
    assert to_video_pixels([pil[0]], image_size=(4, 6)).shape == (1, 3, 5, 4, 6)
    with pytest.raises(ValueError, match=r"unequal \(frames, H, W\) \[\(4, 8, 12\), \(5, 8, 12\)\]: cut them"):
        to_video_pixels([pil[0], pil[1][:4]])
    with pytest.raises(ValueError, match="No images"):
        to_video_pixels([[]])


@pytest.mark.parametrize("name", VIDEOS)
@torch.no_grad()
def test_latents_as_the_pipelines_have_them(name):
    pipe, size = normalised(family_pipeline(name)), FAMILIES[name].size
    denoiser, video = Denoiser.from_pipe(pipe), drawn(1, size[0], 3, *size[1:])
    raw = pipe.vae.encode(video.transpose(1, 2) * 2 - 1).latent_dist.mode()
    if name == "ltx":
        wanted = pipe._normalize_latents(raw, pipe.vae.latents_mean, pipe.vae.latents_std)
    else:
        mean, std = (torch.tensor(pipe.vae.config[key]).view(1, 4, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        wanted = (raw - mean) / std
    found = denoiser.encode(video, image_size="keep")
    assert torch.equal(found, wanted)
    assert found.shape == (1, 4, *denoiser.latent_size(size))
    image = denoiser.encode(video[:, 0], image_size="keep")
    assert torch.equal(image, denoiser.encode(video[:, :1], image_size="keep"))
    assert image.shape[2] == 1
    assert torch.equal(denoiser.encode_pixels(video[:, 0] * 2 - 1), image)
    assert torch.allclose(image, found[:, :, :1], atol=1e-5)  # the first frame is encoded by itself


@torch.no_grad()
def test_an_autoencoder_of_patches():
    """Wan 2.2's: its channels are those of 2 x 2 pixels."""
    pipe = family_pipeline("wan")
    pipe.vae = changed(
        pipe.vae, decoder_base_dim=4, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=8,
    )  # fmt: skip
    denoiser, video = Denoiser.from_pipe(pipe), drawn(1, 5, 3, 16, 32)
    mean, std = (torch.tensor(pipe.vae.config[key]).view(1, 4, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    found = denoiser.encode(video, image_size="keep")
    assert torch.equal(found, (pipe.vae.encode(video.transpose(1, 2) * 2 - 1).latent_dist.mode() - mean) / std)
    assert found.shape == (1, 4, 2, 2, 4) == (1, 4, *denoiser.latent_size((5, 16, 32)))
    assert denoiser.decode(found).shape == video.shape


@pytest.mark.parametrize("name", [*VIDEOS, "ltx timed"])
@torch.no_grad()
def test_decodes_as_the_pipelines(name):
    """LTX's later autoencoders are told a noise level: none."""
    name, *timed = name.split()
    pipe, size = family_pipeline(name), FAMILIES[name].size
    if timed:
        pipe.vae = changed(pipe.vae, timestep_conditioning=True)
    pipe, (frames, height, width) = normalised(pipe), size
    call = {"prompt": "a cat", "num_inference_steps": 2, "guidance_scale": 1.0, **sides(size), "return_dict": False}
    latents, wanted = (
        pipe(**call, output_type=kind, generator=torch.Generator().manual_seed(0))[0] for kind in ("latent", "pt")
    )
    denoiser = Denoiser.from_pipe(pipe)
    if latents.ndim == 3:
        latents = latents.transpose(1, 2).unflatten(2, denoiser.latent_size(size))
    assert wanted.shape == (1, frames, 3, height, width)
    assert torch.allclose(denoiser.decode(latents), wanted, atol=1e-5)


@pytest.mark.parametrize("name", VIDEOS)
@torch.no_grad()
def test_features_as_by_hand(name):
    """The extractor against the network called as its documentation has it; poolings over all positions."""
    pipe, size, layers = normalised(family_pipeline(name)), FAMILIES[name].size, LAYERS[name]
    denoiser, videos = Denoiser.from_pipe(pipe), drawn(2, size[0], 3, *size[1:])
    extractor = FeatureExtractor(denoiser, layers, 300, "clean", image_size="keep")
    found = extractor(videos, prompt="a cat")
    x0 = denoiser.encode(videos, image_size="keep")
    grid = tuple(x0.shape[2:])
    length = {"wan": 512, "ltx": 128}[name]  # of their calls
    text, mask, *_ = pipe.encode_prompt(["a cat"] * 2, do_classifier_free_guidance=False, max_sequence_length=length)
    inputs = {"hidden_states": x0, "timestep": torch.tensor([300, 300]), "encoder_hidden_states": text}
    if name == "ltx":
        inputs |= {"hidden_states": pipe._pack_latents(x0), "encoder_attention_mask": mask, **dict(zip(
            ("num_frames", "height", "width", "rope_interpolation_scale"), (*grid, (8 / 25, 8, 8)), strict=True
        ))}  # fmt: skip
    else:
        grid = (grid[0], grid[1] // 2, grid[2] // 2)
    kept = full_forward(pipe.transformer, inputs, layers)
    table = {layer.path: layer for layer in list_layers(denoiser, size)}
    pooled = {how: extractor.replace(pooling=how)(videos, prompt="a cat") for how in ("mean", "max", "adaptive:2")}
    for path in layers:
        assert torch.equal(found[path], kept[path])
        value = kept[path]
        as_map = value if value.ndim == 5 else value.transpose(1, 2).unflatten(2, grid)
        assert table[path].grid == grid
        assert found.as_map(path).shape == (2, 24, *grid)
        assert torch.equal(found.as_map(path), as_map)
        assert torch.allclose(pooled["mean"][path], as_map.mean((2, 3, 4)), atol=1e-6)
        assert torch.equal(pooled["max"][path], as_map.amax((2, 3, 4)))
        cells = [part.mean((2, 3, 4)) for row in as_map.chunk(2, 3) for part in row.chunk(2, 4)]
        assert torch.allclose(pooled["adaptive:2"][path], torch.stack(cells, 2).flatten(1), atol=1e-6)
    one = extractor(videos[:, 0], prompt="a cat")
    assert one.as_map(layers[1]).shape == (2, 24, 1, *grid[1:])
    noisy = extractor.replace(timestep=[100, 700], noise="per_image", ensemble_size=2)
    both, alone = (part(videos, prompt="a cat") for part in (noisy, noisy.replace(batch_size=1)))
    assert both.as_map(layers[1]).shape == (2, 2, 24, *grid)
    assert torch.allclose(both[layers[1]], alone[layers[1]], atol=1e-5)


def test_pag_with_a_timestep_a_token():
    """Wan 2.2 5B tells each token its time; without a given frame all are one."""
    call = {"prompt": "a cat", **sides((5, 16, 32)), "num_inference_steps": 3, "output_type": "latent"}
    found = []
    for expand in (False, True):
        pipe = WanPipeline(**family_pipeline("wan").components, expand_timesteps=expand)
        pipe.set_progress_bar_config(disable=True)
        with guide(pipe, PAG(3.0)):
            found.append(pipe(**call, generator=torch.Generator().manual_seed(0)).frames)
    assert torch.allclose(*found, atol=1e-4)


def test_what_is_for_images_alone(tmp_path, monkeypatch):
    denoiser = Denoiser.from_pipe(family_pipeline("wan"))
    monkeypatch.setattr(Denoiser, "from_pretrained", lambda *args, **kwargs: denoiser)
    images = [Image.new("RGB", (32, 16))] * 2
    teacher = Encoder.from_module(torch.nn.Conv2d(3, 5, 2, stride=2), patch_size=2, name="teacher")
    layer, energy = "blocks.1", EnergyGuidance(lambda features, x0, condition: x0.mean((1, 2, 3)), x0=True)
    refused = {
        "SAG": lambda: SAG(0.75).bind(denoiser),
        "EnergyGuidance": lambda: energy.bind(denoiser),
        "AutoGuidance": lambda: AutoGuidance(family_pipeline("wan")).bind(denoiser),
        "Training": lambda: DiffusionObjective(denoiser),
        "Selection": lambda: select_features(denoiser, images, images, [100], [layer]),
        "Alignment": lambda: measure_alignment(denoiser, teacher, images, layers=[layer], timesteps=[100]),
        "Probes": lambda: Probe.fit(denoiser, images, layers=[layer], timestep=100),
        "Stores of features": lambda: extract_to_store(FeatureExtractor(denoiser, layer, 100), images, tmp_path),
        "Attention maps": lambda: attention_maps(denoiser, images, "blocks.1.attn1", 100),
        "Encoders": lambda: DenoiserSource(denoiser, layer, 100),
        "Dense heads": lambda: tap_channels(denoiser, [layer]),
        "Readout heads": lambda: ReadoutObjective(denoiser, (16, 32), None),
        "Classifiers": lambda: ClassifierBase.load("anything"),
    }
    for what, call in refused.items():
        with pytest.raises(ValueError, match=rf"^{what}: for networks of images; WanTransformer3DModel makes videos"):
            call()
    with pytest.raises(ValueError, match="makes videos"):
        read_features(denoiser, torch.zeros(1, 4, 1, 4, 8), 100, None, [layer])
    require_images(Denoiser.from_pipe(build("ddpm")), "Anything")


def test_what_is_refused():
    wan, ltx = (Denoiser.from_pipe(family_pipeline(name)) for name in VIDEOS)
    for denoiser, stride in ((wan, 4), (ltx, 8)):
        message = rf"Videos have 8 frames; \w+ takes {stride} k \+ 1, such as 9: one, and one for each {stride} after"
        with pytest.raises(ValueError, match=message):
            denoiser.encode(torch.zeros(1, 8, 3, 32, 64), image_size="keep")
        with pytest.raises(ValueError, match=message):
            list_layers(denoiser, (8, 32, 64))
        with pytest.raises(ValueError, match=message):
            denoiser.condition("a cat", size=(8, 32, 64))
    with pytest.raises(ValueError, match=r"16 x 30 \(H x W\).*multiples of 8.*image_size=\(16, 32\)"):
        wan.encode(torch.zeros(1, 5, 3, 16, 30), image_size="keep")
    image = Denoiser.from_pipe(build("ddpm"))
    with pytest.raises(ValueError, match=r"takes images of a size \(H, W\); got \(5, 8, 8\)"):
        image.check_size((5, 8, 8))
    given = Denoiser(changed(wan.model, in_channels=9), wan.scheduler)
    with pytest.raises(ValueError, match="takes 9 channels, 4 of them the video's: it goes on from a given image"):
        given.predict(torch.zeros(1, 4, 1, 4, 8), 100, {})
    patched = changed(ltx.model, patch_size=2)
    with pytest.raises(ValueError, match="patch_size=2, patch_size_t=1: LTX's pipeline counts"):
        list_layers(Denoiser(patched, ltx.scheduler))


def test_two_networks():
    """Wan 2.2: one for high noise and one for low; refused as one, read each by itself."""
    pipe = family_pipeline("wan")
    pipe = WanPipeline(**{**pipe.components, "transformer_2": family_pipeline("wan").transformer}, boundary_ratio=0.9)
    for call in (Denoiser.from_pipe, lambda pipe: guide(pipe, PAG(3.0))):
        with pytest.raises(ValueError, match=r"has two networks.*Denoiser\(pipe\.transformer, .* pipe=pipe\)"):
            call(pipe)
    high = Denoiser(pipe.transformer, pipe.scheduler, pipe.vae, pipe=pipe)
    text = high.condition("a cat", size=(5, 16, 32))
    low = FeatureExtractor(Denoiser(pipe.transformer_2, pipe.scheduler, pipe.vae), "blocks.1", 300, image_size="keep")
    found = low(drawn(1, 5, 3, 16, 32), embeddings=text.inputs)
    assert found.as_map("blocks.1").shape == (1, 24, 2, 2, 4)
