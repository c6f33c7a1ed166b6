"""U-ViT: the numbers of its papers' network, from its checkpoints; what it refuses."""

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers_repr.pipelines.sit import SiTPipeline

from diffusers_repr.cli import main
from diffusers_repr.models import UViTTransformer2DModel
from diffusers_repr.models.convert_uvit import convert_uvit, is_uvit, scheduler_arguments
from tests.models.official_uvit import drawn_weights, run

TWO = {"num_attention_heads": 2}
FORMS = {
    "pixels": {"channels": 3},
    "classes": {"classes": 11, "time_mlp": True, "bias": True, "conv": False},
    "text": {"text": (77, 5), "half": 1},
}


@pytest.mark.parametrize("form", FORMS)
def test_converted_is_the_papers_network(form):
    settings = FORMS[form]
    weights = drawn_weights(**settings)
    assert is_uvit(weights)
    converted = convert_uvit(weights, overrides=TWO)
    model = UViTTransformer2DModel(**converted.config).eval()
    model.load_state_dict(converted.transformer)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, settings.get("channels", 4), 8, 8, generator=generator)
    label = torch.tensor([3, 10]) if "classes" in settings else None
    text = torch.randn(2, 77, 5, generator=generator) if "text" in settings else None
    # text was trained with steps counted from 1
    told = torch.tensor([3.5, 800.0])
    with torch.no_grad():
        got = model(x, told - float(text is not None), label, encoder_hidden_states=text).sample
    wanted = run(weights, 2, x, told, label, text)
    assert wanted.std() > 0.1
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    if label is not None:
        assert model.config.num_classes == 10
        with torch.no_grad():
            null = model(x, told, label, drop_mask=torch.tensor([True, False])).sample
            assert torch.equal(null[1], got[1])
            torch.testing.assert_close(null[0].double(), run(weights, 2, x, told, torch.tensor([10, 10]))[0])


def test_a_table_without_a_null_class_is_told():
    converted = convert_uvit(drawn_weights(classes=11), overrides={**TWO, "num_classes": 11})
    assert converted.transformer["label_embed.weight"].shape == (12, 16)
    assert any("without a null class" in note for note in converted.notes)
    with pytest.raises(ValueError, match="label_emb has 11 rows; 20 classes"):
        convert_uvit(drawn_weights(classes=11), overrides={**TWO, "num_classes": 20})
    broken = drawn_weights()
    del broken["out_blocks.1.skip_linear.weight"]
    with pytest.raises(ValueError, match=r"out_blocks\.1\.skip_linear\.weight"):
        convert_uvit(broken, overrides=TWO)


def test_schedulers_have_the_papers_processes():
    """Continuous: alpha_bar = exp(-int beta), beta from 0.1 to 20, at t = i / 999."""
    ours = DDIMScheduler(**scheduler_arguments("continuous")).alphas_cumprod.double()
    time = torch.arange(1, 1000) / 999
    beta = 0.1 + 19.9 * torch.linspace(0, 1, 200_001, dtype=torch.float64)
    integral = torch.cat([torch.zeros(1), ((beta[1:] + beta[:-1]) / 2).cumsum(0) / 200_000])
    wanted = (-integral[(time * 200_000).round().long()]).exp()
    torch.testing.assert_close(ours[1:], wanted, rtol=2e-4, atol=0)  # the grid's rounding of t
    assert 0.9999 < ours[0] < 1


def test_convert_command_and_pipeline(tmp_path, capsys):
    torch.save(drawn_weights(classes=11, channels=3), tmp_path / "uvit.pth")
    words = [
        "convert",
        tmp_path / "uvit.pth",
        "--out",
        tmp_path / "out",
        "--model_config",
        '{"num_attention_heads": 2}',
    ]
    assert main([*map(str, words)]) == 0
    assert "Taken for continuous time" in capsys.readouterr().out
    pipe = SiTPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipe.transformer, UViTTransformer2DModel)
    pipe.set_progress_bar_config(disable=True)
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    got = pipe([3, 7], latents=start, num_inference_steps=3, guidance_scale=2.0, output_type="latent").images
    x, scheduler, labels = start, DDIMScheduler(**scheduler_arguments("continuous")), torch.tensor([3, 7])
    scheduler.set_timesteps(3)
    for t in scheduler.timesteps:
        with torch.no_grad():
            cond, null = (pipe.transformer(x, t, y).sample for y in (labels, None))
        x = scheduler.step(null + 2.0 * (cond - null), t, x).prev_sample
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)
    assert main([*map(str, [*words, "--overwrite", "--sampler", "ode"])]) == 2
    assert "A U-ViT gets DDIM" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"num_layers": 4}, None, "num_layers is odd"),
        ({}, {"class_labels": torch.tensor([1, 2])}, "has no classes"),
        ({}, {"condition": torch.ones(2, 3)}, "takes no vector"),
        ({}, {"encoder_hidden_states": torch.ones(2, 3, 4)}, "takes no text"),
        ({"text_dim": 4, "text_tokens": 2}, {"encoder_hidden_states": torch.ones(2, 3, 4)}, r"\(2, 2, 4\); got"),
        ({"text_dim": 4, "text_tokens": 2}, {}, "got None"),
    ],
)
def test_refuses(settings, given, message):
    def call():
        model = UViTTransformer2DModel(
            **{"sample_size": 8, "num_layers": 3, "hidden_size": 8, "num_attention_heads": 2, **settings}
        )
        model(torch.ones(2, 4, 8, 8), 1, **given)

    with pytest.raises(ValueError, match=message):
        call()
