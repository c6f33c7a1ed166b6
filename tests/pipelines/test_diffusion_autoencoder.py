"""`DiffusionAutoencoderPipeline`: codes and noise both ways, between images and along a direction, files, errors."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers_repr.pipelines.diffusion_autoencoder import DiffusionAutoencoderPipeline
from diffusers_repr.pipelines.rcg import RCGPipeline

from diffusers_repr import Denoiser
from diffusers_repr.assign import IdentityAssigner
from diffusers_repr.denoiser.inversion import ddim_generate, ddim_invert
from diffusers_repr.encoders import load_encoder
from diffusers_repr.heads.fitting.direction import code_direction
from diffusers_repr.models import FiLM, GradientUNet, RepresentationMLPModel, film_blocks
from diffusers_repr.models.convert_representation import SCHEDULER
from diffusers_repr.noise.slerp import slerp
from diffusers_repr.objectives.diffusion_autoencoder.objective import tokens_as_model
from tests.objectives.autoencoder_cases import D, codes, encoder, images, pipeline, text_unet, unet
from tests.objectives.cases import shake
from tests.pipelines.sit_cases import autoencoder
from tests.testers.pipelines import PipelineContract, seeds


class TestContract(PipelineContract):
    pair, one, many, cutoff = {"code": codes(2)}, {"code": codes(2)[1:]}, None, None

    def make(self):
        return pipeline("pdae")

    def test_callbacks_of_diffusers(self, pipe):
        """The last step by `num_timesteps`; there is no guidance to be switched off."""
        steps = []

        def clear_at_the_end(pipe, step, timestep, tensors):
            steps.append(step)
            return {"latents": torch.zeros_like(tensors["latents"])} if step == pipe.num_timesteps - 1 else tensors

        last = self.sample(pipe, output_type="latent", callback_on_step_end=clear_at_the_end)
        assert steps == [0, 1]
        assert not last.any()

    test_every_tensor_can_be_asked_for = None


@pytest.fixture(scope="module")
def pipe():
    return pipeline("pdae")


@pytest.fixture(scope="module")
def pictures():
    return images(2) / 2 + 0.5


# Both ways


def test_decoding_is_stock_ddim_of_the_modulated_network(pipe):
    """`decode` walks as diffusers' own scheduler does, from the same noise."""
    noise, code = torch.randn(2, 1, 8, 8), codes(2)
    found = pipe.decode(code, noise, 4, output_type="latent").images
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(4)
    x, network = noise, pipe.denoiser.model
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t, code)[0], t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_a_new_gradient_network_decodes_as_the_frozen_base(pictures):
    network = unet()
    pipe = pipeline(unet=network, gradient=GradientUNet.of(network).eval(), film=pipeline("pdae").film)
    plain, noise = Denoiser(network, DDIMScheduler()), torch.randn(2, 1, 8, 8)
    assert torch.equal(pipe.decode(codes(2), noise, 3, output_type="latent").images, ddim_generate(plain, noise, 3))
    found = pipe.encode(pictures, 3)
    assert torch.equal(found.x_T, ddim_invert(plain, 2 * pictures - 1, 3))


@pytest.mark.parametrize("kind", ["diffae", "pdae"])
def test_encoder_and_network_run_as_often_as_they_must(kind, pictures):
    pipe, calls = pipeline(kind), {"encoder": 0, "unet": 0}
    for name in calls:

        def count(module, args, output, name=name):
            calls[name] += 1

        getattr(pipe, name).register_forward_hook(count)
    code = pipe.encode(pictures, None)
    assert code.x_T is None
    assert calls == {"encoder": 1, "unet": 0}
    both = pipe.encode(pictures, 4)
    assert calls == {"encoder": 2, "unet": 4}
    assert torch.equal(both.code, code.code)
    pipe.decode(both.code, both.x_T, 4)
    assert calls == {"encoder": 2, "unet": 8}


def test_reconstructions_come_nearer_with_more_steps(pictures):
    pipe = pipeline("diffae")
    back = [pipe.reconstruct(pictures, steps, output_type="pt").images for steps in (10, 40)]
    coarse, fine = (float((one - pictures).square().mean()) for one in back)
    assert fine < coarse / 2


def test_the_coefficient_of_the_papers_code(pipe):
    other = pipeline("pdae", coefficient="score")
    noise = torch.randn(1, 1, 8, 8)
    one, two = (p.decode(codes(1), noise, 3, output_type="latent").images for p in (pipe, other))
    assert not torch.equal(one, two)
    with pytest.raises(ValueError, match="coefficient is one of posterior, score"):
        pipeline("pdae", coefficient="none")


def test_the_frozen_base_alone_at_the_end(pipe):
    """Above the share of timesteps the code acts, below it does not."""
    noise, call = torch.randn(2, 1, 8, 8), {"num_inference_steps": 4, "output_type": "latent"}
    alone = pipe(code=codes(2), latents=noise, gradient_stop=1.0, **call).images
    plain = Denoiser(pipe.unet, pipe.scheduler)
    torch.testing.assert_close(alone, ddim_generate(plain, noise, 4), rtol=1e-4, atol=1e-4)
    told = pipe(code=codes(2), latents=noise, gradient_stop=0.3, **call).images
    whole = pipe(code=codes(2), latents=noise, **call).images
    assert not torch.allclose(told, alone)
    assert not torch.allclose(told, whole)
    with pytest.raises(ValueError, match="no gradient network"):
        pipeline("diffae")(code=codes(1), gradient_stop=0.3)


def test_latents_and_the_empty_prompt(tmp_path):
    network = text_unet()
    gradient = shake(GradientUNet.of(network), 4, 0.1).eval()
    film = shake(FiLM(D, film_blocks(gradient.unet)), 3, 0.1)
    tokens = torch.randn(1, 5, 12)
    pipe = pipeline(
        "pdae", unet=network, gradient=gradient, film=film, encoder=encoder(3, 16).eval(), vae=autoencoder(),
        null_tokens=tokens_as_model(tokens),
    )  # fmt: skip
    assert torch.equal(pipe.condition(None, 2)["encoder_hidden_states"], tokens.expand(2, -1, -1))
    pictures = images(2, 3, 16) / 2 + 0.5
    found = pipe.encode(pictures, 2)
    assert found.x_T.shape == (2, 4, 8, 8)
    wanted = pipe.decode(found.code, found.x_T, 2, output_type="np").images
    assert wanted.shape == (2, 16, 16, 3)
    pipe.save_pretrained(tmp_path)
    again = DiffusionAutoencoderPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert np.abs(again.decode(found.code, found.x_T, 2, output_type="np").images - wanted).max() < 1e-4


# Between images and along directions


def test_interpolation_ends_at_the_images(pipe, pictures):
    first, second = pictures[:1], pictures[1:]
    one, two = (pipe.encode(image, 3) for image in (first, second))
    found = pipe.interpolate(first, second, (0.0, 0.5, 1.0), 3, output_type="pt")
    for end, code in ((found[0], one), (found[2], two)):
        assert torch.equal(end.code, code.code)
        torch.testing.assert_close(end.x_T, code.x_T)
        torch.testing.assert_close(end.images, pipe.decode(code.code, code.x_T, 3, output_type="pt").images)
    torch.testing.assert_close(found[1].code, (one.code + two.code) / 2)
    with pytest.raises(ValueError, match="1 images to interpolate to 2"):
        pipe.interpolate(first, pictures)


def test_slerp_stays_on_the_sphere():
    x, y = (torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(slerp(x, y, 0.0), x)
    torch.testing.assert_close(slerp(x, y, 1.0), y)
    x, y = (value / value.flatten(1).norm(dim=1)[:, None, None, None] for value in (x, y))
    half = slerp(x, y, 0.3)
    torch.testing.assert_close(half.flatten(1).norm(dim=1), torch.ones(3))
    angles = [torch.acos((a * b).flatten(1).sum(1)) for a, b in ((x, half), (x, y))]
    torch.testing.assert_close(angles[0], 0.3 * angles[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slerp(x, -x, 0.25), 0.5 * x)


def test_a_planted_direction_is_found(pipe):
    """Codes of unequal spread whose attribute is one of their numbers."""
    drawn = torch.Generator().manual_seed(0)
    std = torch.tensor([0.1, 1.0, 5.0, 1.0, 2.0, 1.0])
    code = std * torch.randn(400, D, generator=drawn) + 3
    direction = code_direction(code, code[:, 2] > 3)
    assert int(direction.abs().argmax()) == 2
    assert float(direction[2]) == pytest.approx(D**0.5 * 5, rel=0.1)
    assert (direction[[0, 1, 3, 4, 5]] / std[[0, 1, 3, 4, 5]]).abs().max() < 0.25 * D**0.5
    assert torch.equal(pipe.fit_direction(code, code[:, 2] > 3), direction)
    with pytest.raises(ValueError, match=r"got labels \[0\]"):
        code_direction(code, torch.zeros(400))
    with pytest.raises(ValueError, match="with a label each"):
        code_direction(code, torch.zeros(3))


def test_an_edit_moves_the_code_and_keeps_the_noise(pipe, pictures):
    direction = torch.arange(1.0, D + 1)
    found, still = pipe.encode(pictures, 3), pipe.edit(pictures, direction, 0.0, 3, output_type="pt")
    moved = pipe.edit(pictures, direction, 0.5, 3, output_type="pt")
    torch.testing.assert_close(moved.code, found.code + 0.5 * direction)
    assert torch.equal(moved.x_T, found.x_T)
    assert torch.equal(still.images, pipe.decode(found.code, found.x_T, 3, output_type="pt").images)
    assert not torch.allclose(moved.images, still.images)
    with pytest.raises(ValueError, match=r"direction is \(6,\); got \(5,\)"):
        pipe.edit(pictures, torch.ones(5))


# Codes out of nothing


def trained_prior(folder, width=D, over="column"):
    network = shake(RepresentationMLPModel(width, 16, 1, time_embed_dim=8))
    RCGPipeline(network, DDIMScheduler(**SCHEDULER)).save_pretrained(folder)
    assigner = IdentityAssigner(width, over=over)
    assigner.fit(5 + 3 * torch.randn(50, width)).save_pretrained(folder / "assigner")
    return assigner


def test_codes_of_a_prior_are_brought_back(tmp_path):
    pipe = pipeline("diffae")
    with pytest.raises(ValueError, match="no prior to draw codes from"):
        pipe(batch_size=2, num_inference_steps=1)
    assigner = trained_prior(tmp_path / "prior")
    pipe.load_prior(tmp_path / "prior")
    vectors = RCGPipeline.from_pretrained(tmp_path / "prior")
    vectors.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}
    drawn = vectors.sample_representations(2, **call)
    found = pipe.sample_codes(2, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, assigner.mean + assigner.std * drawn)
    torch.testing.assert_close(assigner.assign(found), drawn, rtol=1e-4, atol=1e-4)
    call = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "output_type": "np"}
    images = pipe(generator=seeds(1, 2), **call).images
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionAutoencoderPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert np.abs(again(generator=seeds(1, 2), **call).images - images).max() < 1e-4
    trained_prior(tmp_path / "other", 4)
    with pytest.raises(ValueError, match="no codes of 6 values"):
        pipe.load_prior(tmp_path / "other")
    trained_prior(tmp_path / "rows", over="vector")
    with pytest.raises(ValueError, match="over: column"):
        pipe.load_prior(tmp_path / "rows")


def test_normal_codes_need_no_prior():
    pipe = pipeline("diffae", normal_codes=True)
    drawn = pipe.sample_codes(500, generator=torch.Generator().manual_seed(0))
    assert abs(float(drawn.mean())) < 0.1
    assert abs(float(drawn.std()) - 1) < 0.1
    assert len(pipe(batch_size=2, num_inference_steps=1).images) == 2


# Files


def test_the_encoder_of_a_folder_is_an_encoder_as_all(pipe, pictures, tmp_path):
    """Without the U-Net: the half that is needed is loaded alone."""
    pipe.save_pretrained(tmp_path)
    for part in ("unet", "gradient", "film"):
        shutil.rmtree(tmp_path / part)
    wanted = pipe.encode(pictures, None).code
    for place in (tmp_path, tmp_path / "encoder"):
        found = load_encoder(place)
        output = found(pictures)
        torch.testing.assert_close(output["global"], wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output["tokens"].mean(1), wanted, rtol=1e-5, atol=1e-5)
        assert output.grid == found.grid_for((8, 8)) == (4, 4)
        assert (found.dim, found.channels) == (D, 1)
    large = torch.nn.functional.interpolate(pictures, size=(16, 16), mode="nearest")
    assert load_encoder(tmp_path)(large).grid == (4, 4)  # brought to the size of training
    assert load_encoder(tmp_path, image_size=16)(large).grid == (8, 8)
    assert found.untrained(0).dim == D
    assert not torch.equal(found.untrained(0)(pictures)["global"], wanted)
    with pytest.raises(ValueError, match="has no layer; leave it out"):
        load_encoder(tmp_path, layer=1)


def test_a_missing_or_another_base_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "unet")
    index = json.loads((tmp_path / "bare" / "model_index.json").read_text())
    (tmp_path / "bare" / "model_index.json").write_text(json.dumps({**index, "unet": [None, None]}))
    with pytest.raises(ValueError, match="frozen base of this autoencoder is missing"):
        DiffusionAutoencoderPipeline.from_pretrained(tmp_path / "bare")
    given = DiffusionAutoencoderPipeline.from_pretrained(tmp_path / "bare", unet=pipe.unet)
    assert given.unet is pipe.unet
    with pytest.raises(ValueError, match="has other weights"):
        DiffusionAutoencoderPipeline.from_pretrained(tmp_path / "bare", unet=shake(unet(), 9))
    with pytest.raises(ValueError, match="has another config"):
        DiffusionAutoencoderPipeline.from_pretrained(tmp_path / "bare", unet=unet("default"))
    with pytest.raises(ValueError, match="different widths"):
        pipeline(
            "pdae", encoder=type(pipe.encoder)(1, 4, block_out_channels=(8,), norm_num_groups=4, attention_head_dim=8)
        )


@pytest.mark.parametrize(("call", "message"), [
    ({"code": codes(2)[:, :4]}, r"floats \(B, 6\); got \(2, 4\)"),
    ({"code": codes(2) * float("nan")}, "NaN"),
    ({"code": codes(3), "latents": torch.zeros(2, 1, 8, 8)}, "How many samples"),
    ({"code": codes(1), "latents": torch.zeros(2, 3, 8, 8)}, r"\(B, 1, H, W\)"),
    ({"code": codes(1), "output_type": "jpg"}, "output_type"),
    ({"code": codes(1), "num_inference_steps": 0}, "num_inference_steps"),
    ({"code": codes(1), "gradient_stop": 2.0}, "gradient_stop"),
])  # fmt: skip
def test_bad_calls(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(**call)


def test_bad_codes_and_noise(pipe):
    with pytest.raises(ValueError, match="3 codes for 2 samples of noise"):
        pipe.decode(codes(3), torch.zeros(2, 1, 8, 8), 1)
    with pytest.raises(ValueError, match=r"floats \(B, 6\)"):
        pipe.decode(codes(2).long())
    assert pipe.decode(codes(1), torch.zeros(2, 1, 8, 8), 1, output_type="pt").images.shape == (2, 1, 8, 8)
