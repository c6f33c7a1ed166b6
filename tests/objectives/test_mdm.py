"""MDM: losses by formula, errors of masked pixels by loops, what it refuses, features in the segmentation task."""

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler
from diffusers_repr.schedulers_ext.scheduling_patch_mask import PatchMaskScheduler

from diffusers_repr import Denoiser
from diffusers_repr.heads.fitting.pixels import DDPM_SEG
from diffusers_repr.metrics import ssim
from diffusers_repr.noise import NoiseSchedule
from diffusers_repr.objectives import MDMConfig, MDMObjective
from diffusers_repr.objectives.mdm import structural_dissimilarity
from diffusers_repr.tasks import Segmenter
from tests.objectives.cases import batch, shake
from tests.tasks.planted_masks import CLASSES, annotated
from tests.test_patch_mask import by_loops
from tests.testers.models import unet2d


def mdm(size=8, channels=3, patch=2, **settings):
    torch.manual_seed(0)
    unet = shake(unet2d(channels, sample_size=size), std=0.05)
    return MDMObjective(Denoiser.from_pipe(DDPMPipeline(unet, PatchMaskScheduler(patch_size=patch))), **settings)


@pytest.mark.parametrize("loss", ["ssim", "l1", "l2"])
def test_losses(loss):
    objective, data = mdm(reconstruction=loss), batch()
    x0, noise, time = data["pixel_values"], torch.randn(3, 3, 8, 8), torch.tensor([0, 400, 999])
    out = objective({**data, "noise": noise, "time": time})
    masked = by_loops(x0, noise, time.tolist(), 2, 1000)
    with torch.no_grad():
        painted = objective.network(masked, time).sample
    expected = {
        "l1": lambda: (painted - x0).abs().mean(),
        "l2": lambda: (painted - x0).square().mean(),
        "ssim": lambda: ((1 - ssim(painted.clamp(-1, 1) / 2 + 0.5, x0 / 2 + 0.5, 5, edges="reflect")) / 2).mean(),
    }[loss]()
    assert painted.abs().max() < 1
    assert float(out["loss"].detach()) == pytest.approx(float(expected), rel=1e-4)
    assert set(out) == {"loss", loss, "mse_masked", "mse_visible"}
    assert torch.equal(out["loss"].detach(), out[loss])
    hidden, squared = masked == 0, (painted - x0).square()
    assert float(out["mse_masked"]) == pytest.approx(float(squared[hidden].mean()), rel=1e-4)
    assert float(out["mse_visible"]) == pytest.approx(float(squared[~hidden].mean()), rel=1e-4)
    clean = objective({**data, "noise": noise, "time": torch.zeros(3)})
    assert float(clean["mse_masked"]) == 0


def test_a_negative_is_far_from_the_image():
    """In [-1, 1], as the paper's code takes it, SSIM calls them all but equal."""
    x0 = batch()["pixel_values"]
    assert float(structural_dissimilarity(x0, x0)) == 0
    assert float(structural_dissimilarity(-x0, x0)) > 0.5
    flat = torch.zeros(1, 1, 8, 8, requires_grad=True)
    structural_dissimilarity(flat, torch.zeros(1, 1, 8, 8)).backward()
    assert bool(flat.grad.isfinite().all())


def test_the_folder_keeps_its_masks_and_samples(tmp_path):
    objective = mdm()
    objective.save_pretrained(tmp_path, objective.state_dict(), torch.float32)
    again = Denoiser.from_pretrained(tmp_path)
    assert again.schedule.same_process(NoiseSchedule("patch_mask", "sample", patch_size=2))
    generator = torch.Generator().manual_seed(0)
    shown = objective.preview(objective.result(objective.state_dict()), 3, generator, 4)
    assert [image.size for image in shown] == [(8, 8)] * 3
    assert objective.identity()["mdm"]["mask_patch_size"] == 2


def test_segmentation_reads_its_decoder():
    """As the paper: layers of the decoder at t = 50, masks by the image, an ensemble of networks of pixels."""
    denoiser = mdm(16, 1, 4).denoiser
    layers = ["up_blocks.0", "up_blocks.1"]
    segmenter = Segmenter.fit(
        denoiser, annotated(4), layers=layers, timestep=50, noise="per_image", members=2, label_names=CLASSES,
        protocol=DDPM_SEG.replace(max_epochs=1, learning_rate=1e-2),
    )  # fmt: skip
    images = annotated(3, seed=2)[0]
    alone = [segmenter(image).masks[0] for image in images]
    assert all(torch.equal(a, b) for a, b in zip(alone, segmenter(images).masks, strict=True))
    other = mdm(16, 1, 2).denoiser
    with pytest.warns(UserWarning, match="mask_patch_size is 2, was 4"):
        segmenter.on(other)


def test_what_is_refused():
    unet, vae = unet2d(3, sample_size=8), AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    with pytest.raises(ValueError, match=r"MDM masks patches of pixels; this denoiser has a vp process\. Make it by"):
        MDMObjective(Denoiser.from_pipe(DDPMPipeline(unet, DDPMScheduler())))
    with pytest.raises(ValueError, match="a patch_mask process and a VAE"):
        MDMObjective(Denoiser(unet, PatchMaskScheduler(), vae))
    with pytest.raises(ValueError, match="Patches of 3 x 3 do not divide images of 8 x 8, and images are not padded"):
        mdm(patch=3)
    with pytest.raises(ValueError, match="do not divide images of 8 x 12"):
        mdm(patch=8).check_batch({"pixel_values": torch.zeros(1, 3, 8, 12)})
    with pytest.raises(ValueError, match="window of 17 pixels does not fit images of 8 x 8"):
        mdm(ssim_window=17)
    for wrong, told in (
        ({"reconstruction": "huber"}, "ssim, l1, l2"),
        ({"ssim_window": 4}, "odd"),
        ({"mask_patch_size": 0}, "from 1"),
        ({"num_train_timesteps": 1}, "from 2"),
        ({"model": {"blocks": 3}}, "Unknown key 'blocks'"),
    ):
        with pytest.raises(ValueError, match=told):
            MDMConfig(**wrong)


@pytest.mark.slow
def test_digits_are_painted():
    """400 steps at t = 500: masked pixels to an error below 0.2, of zeros 0.7; seen ones are copied."""
    from diffusers_repr.data import DataConfig, load_train_data

    rows = load_train_data(DataConfig("digits", dataset_split="train", label_column="none"), 1, 8)
    x = rows.on_device({"pixel_values": torch.stack([rows[n]["pixel_values"] for n in range(len(rows))])})
    x = x["pixel_values"]
    errors = {}
    for loss in ("l2", "ssim"):
        torch.manual_seed(0)
        model = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 8,
                 "block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                 "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 16}  # fmt: skip
        objective = MDMObjective(MDMConfig(model=model, mask_patch_size=2).build(), loss)
        optimizer = torch.optim.AdamW(objective.parameters(), 1e-3)
        for _ in range(400):
            optimizer.zero_grad()
            objective({"pixel_values": x[torch.randint(len(x) - 200, (128,))]})["loss"].backward()
            optimizer.step()
        with torch.no_grad():
            out = objective({"pixel_values": x[-200:], "time": torch.full((200,), 500)})
        errors[loss] = (float(out["mse_masked"]), float(out["mse_visible"]))
    assert all(masked < 0.2 and visible < 0.05 for masked, visible in errors.values()), errors
