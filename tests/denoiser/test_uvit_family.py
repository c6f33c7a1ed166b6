"""The library on a U-ViT: layers, features before and behind the skips, guidance, training."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers_repr.pipelines.sit import SiTPipeline

from diffusers_repr import CFG, PAG, SAG, Denoiser, Encoder, FeatureExtractor, guide, list_layers
from diffusers_repr.capture import capture
from diffusers_repr.models import UViTTransformer2DModel
from diffusers_repr.objectives import REPAObjective
from diffusers_repr.testing import check_family
from tests.testers.families import own_image_token_alone

FORMS = {
    "classes": {"num_classes": 10},
    "all tokens": {"num_classes": 3, "condition_dim": 6, "class_token": True},
}


def pipeline(**changes):
    settings = {"sample_size": 8, "in_channels": 3, "num_layers": 5, "hidden_size": 16, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = UViTTransformer2DModel(**{**settings, **changes}).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    pipe = SiTPipeline(model, DDPMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("form", FORMS)
def test_the_family_holds(form):
    report = check_family(Denoiser.from_pipe(pipeline(**FORMS[form])), image_size=(8, 12))
    assert {finding.part: finding.state for finding in report.findings} == dict.fromkeys(
        ("call", "rows", "features", "guidance", "PAG", "CFG", "EnergyGuidance", "training", "REPA"), "ok"
    )


def test_layers_and_early_exit():
    """Every block's features are those of a whole pass, whichever skips come later."""
    pipe = pipeline(num_classes=10, class_token=True)
    denoiser = Denoiser.from_pipe(pipe)
    layers = {layer.path: layer for layer in list_layers(denoiser, (8, 12))}
    blocks = [f"blocks.{at}" for at in range(5)]
    assert list(layers) == ["patch_embed", *blocks, "norm_out", "proj_out", "conv_out"]
    assert {(layers[path].grid, layers[path].text_tokens) for path in blocks} == {((4, 6), 3)}
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), capture(pipe.transformer, blocks) as tape:
        pipe.transformer(2 * images - 1, 200, torch.tensor([10, 10]))
    for path in blocks:
        seen = FeatureExtractor(denoiser, [path], timestep=200, noise="clean", image_size=(8, 12))(images)[path]
        torch.testing.assert_close(seen, tape[path], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_pag_before_in_and_behind_the_middle(at):
    """Lanes join at the block; tokens of earlier blocks that come back by skips join there too."""
    pipe, labels, layer = pipeline(num_classes=10), torch.tensor([1, 7]), f"blocks.{at}.attn"
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": 3, "output_type": "latent", "latents": start}
    with guide(pipe, [CFG(2.5), PAG(1.5, layers=layer)]) as handle:
        got = pipe(labels, guidance_scale=4.0, generator=torch.Generator().manual_seed(1), **call).images
    assert {step.joined for step in handle.stats.steps} == {f"blocks.{at}"}
    plain = pipe.transformer.forward

    def forward(x, t, class_labels, **more):
        half = len(x) // 2
        null, cond = plain(x, t, class_labels, **more)[0].chunk(2)
        with own_image_token_alone(pipe.transformer, [layer], 16, last=True):
            other = plain(x[half:], t[half:], class_labels[half:], return_dict=False)[0]
        out = null + 2.5 * (cond - null) + 1.5 * (cond - other)
        return (torch.cat([out, out]),)

    pipe.transformer.forward = forward
    wanted = pipe(labels, guidance_scale=4.0, generator=torch.Generator().manual_seed(1), **call).images
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_sag_says_why_not():
    with pytest.raises(ValueError, match="text|tokens"), guide(pipeline(num_classes=10), SAG(0.5)):
        pass


def test_repa_reads_the_images_tokens():
    """They are the last of the sequence, as many as the teacher's."""
    pipe = pipeline(num_classes=10, class_token=True)
    denoiser = Denoiser.from_pipe(pipe)
    teacher = Encoder.from_module(torch.nn.Conv2d(3, 5, 2, stride=2), patch_size=2, name="teacher")
    objective = REPAObjective(denoiser, [teacher], layer="blocks.1", projector_dim=8)
    batch = {
        "pixel_values": torch.rand(2, 3, 8, 8) * 2 - 1,
        "class_labels": torch.tensor([3, 4]),
        "time": torch.tensor([100, 600]),
        "noise": torch.randn(2, 3, 8, 8),
    }
    noisy = objective.noised(batch, drop=False)
    with torch.no_grad(), capture(pipe.transformer, "blocks.1") as tape:
        pipe.transformer(noisy.x_t, batch["time"], batch["class_labels"])
    seen = objective.layer_tokens("blocks.1", tape["blocks.1"], (8, 8)).tokens()
    assert torch.equal(seen, tape["blocks.1"][:, 3:])
    objective(batch)["loss"].backward()
    grads = [block.attn.to_q.weight.grad for block in pipe.transformer.blocks]
    assert all(grad.abs().sum() > 0 for grad in grads)
