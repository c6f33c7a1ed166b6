"""Generated images: each by its own noise and scale, whatever the batch; strength against a plain loop."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline
from scipy import stats

from diffusers_repr import Denoiser
from diffusers_repr.cli import main
from diffusers_repr.data.image_data import load_images
from diffusers_repr.store.image_store import ImageStore, write_images
from diffusers_repr.synthesis import (
    ClassMaker,
    GenerativeAugmenter,
    GuidanceSampler,
    PerImageScale,
    PromptSampler,
)
from diffusers_repr.synthesis.prompts import DOMAINS, IN_DOMAINS
from diffusers_repr.synthesis.strength import noised_start, own_noise, starting_inside, truncated_steps

CLASSES, PLAIN = "examples/models/digits-class-ddim", "examples/models/digits-ddpm"


@pytest.fixture(scope="module")
def classes():
    found = Denoiser.from_pretrained(CLASSES)
    return Denoiser.from_pipe(
        GuidedUnconditionalPipeline(found.model, DDIMScheduler.from_config(found.scheduler.config))
    )


@pytest.fixture(scope="module")
def plain():
    found = Denoiser.from_pretrained(PLAIN)
    return Denoiser.from_pipe(
        GuidedUnconditionalPipeline(found.model, DDIMScheduler.from_config(found.scheduler.config))
    )


def as_array(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_each_image_has_its_own_scale_and_noise_whatever_the_batch(classes):
    maker = ClassMaker(classes, num_inference_steps=3, scales=GuidanceSampler(1, 5))
    keys = maker.keys([1, 4], 2)
    scales = [json.loads(key.guidance)["guidance_scale"] for key in keys]
    assert len(set(scales)) == 4
    assert len({key.seed for key in keys}) == 4
    together = as_array(maker(keys))
    alone = np.concatenate([as_array(maker([key])) for key in keys])
    assert np.abs(together - alone).max() <= 1
    for key, scale, image in zip(keys, scales, together, strict=True):  # the pipeline's own, called with one scale
        call = {"class_labels": [int(key.condition)], "guidance_scale": scale, "num_inference_steps": 3}
        (own,) = classes.pipe(**call, generator=torch.Generator().manual_seed(key.seed), output_type="np").images
        assert np.abs(np.round(own.clip(0, 1) * 255)[..., 0] - image).max() <= 1
    assert [key.name for key in ClassMaker(classes, num_inference_steps=3, seed=1).keys([1], 1)] != [keys[0].name]


def test_scales_are_uniform_and_the_scale_of_a_batch_is_used_or_refused():
    draws = [GuidanceSampler(1, 5)("cat", variant) for variant in range(1000)]
    assert stats.kstest(draws, stats.uniform(1, 4).cdf).pvalue > 0.01
    with pytest.raises(TypeError, match="one number"):
        PerImageScale([1.0, 2.0]) - 1
    with pytest.raises(ValueError, match="2 guidance scales"):
        PerImageScale([1.0, 2.0]) * torch.zeros(3, 1)
    with pytest.raises(RuntimeError, match="no effect"):
        PerImageScale([1.0, 2.0]).check_used()


def test_a_scale_of_1_beside_others_is_the_conditional_model(classes):
    def images(labels, scale):
        generators = [torch.Generator().manual_seed(label) for label in labels]
        call = {"class_labels": labels, "num_inference_steps": 3, "generator": generators, "output_type": "np"}
        return classes.pipe(**call, guidance_scale=scale).images

    both = images([2, 7], PerImageScale([1.0, 4.0]))
    np.testing.assert_allclose(both[:1], images([2], 1.0), atol=1e-5)
    assert np.abs(both[1:] - images([7], 1.0)).max() > 0.05


@pytest.mark.slow
def test_drawn_scales_make_the_images_of_a_class_differ_more_than_one_scale_does(classes):
    """MA-ZSC's reason to draw them; at one scale of 3 this model's images differ no less than at 1."""
    variance = {}
    for low, high in ((1, 1), (3, 3), (1, 5)):
        maker = ClassMaker(classes, num_inference_steps=12, scales=GuidanceSampler(low, high))
        images = as_array(maker(maker.keys(range(10), 8))).reshape(10, 8, -1) / 127.5
        variance[low, high] = images.var(1).mean()
    assert variance[1, 5] > 1.1 * max(variance[1, 1], variance[3, 3])


def test_prompts_come_equally_often_and_bad_files_name_their_line(tmp_path):
    sampler = PromptSampler.of_templates(["cat", "dog"], IN_DOMAINS, DOMAINS)
    drawn = [sampler("cat", variant) for variant in range(30)]
    assert {drawn.count(prompt) for prompt in drawn} == {3}
    assert len(set(drawn[:10])) == 10
    assert drawn[:10] != drawn[10:20]
    assert all("a cat" in prompt for prompt in drawn)
    file = tmp_path / "prompts.txt"
    for text, message in (
        ("cat: a cat\n\ndog: a dog", "Line 2 .* is empty"), ("cat: a cat\ncat: a cat\ndog: d", "Line 2 .* again"),
        ("cat: a cat", "'dog' has no prompt"), ("cow: a cow", "'cow'"), ("a cat", "CLASS: PROMPT"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            PromptSampler.from_file(file, ["cat", "dog"])
    file.write_bytes("cat: caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match="no text in UTF-8"):
        PromptSampler.from_file(file, ["cat"])
    for classes, templates, domains in (
        (["a", "a"], ["{class}"], []),
        (["a"], ["no place"], []),
        (["a"], ["{class}"], ["x"]),
    ):
        with pytest.raises(ValueError, match="named once|stands|nothing"):
            PromptSampler.of_templates(classes, templates, domains)


def test_strength_is_the_share_of_the_schedule(plain):
    data = load_images("digits", "test").select(range(6))
    pixels, calls = plain.pixels(data.read(range(6))), []
    handle = plain.model.register_forward_hook(lambda *given: calls.append(1))
    distances = []
    for strength in (0, 0.1, 0.3, 0.6):
        calls.clear()
        maker = GenerativeAugmenter(plain, data, strength=strength, num_inference_steps=10)
        made = as_array(maker(maker.keys(1)))
        assert len(calls) == truncated_steps(10, strength) == int(10 * strength)
        distances.append(np.square(made - as_array(data.read(range(6)))).mean())
    handle.remove()
    assert distances[0] == 0
    assert distances == sorted(distances)
    assert distances[1] < distances[3] / 4
    # A plain loop: noise to the level of the first step, then DDIM's formula down to the clean image.
    maker = GenerativeAugmenter(plain, data, strength=0.3, num_inference_steps=10)
    (key,) = maker.keys(1, [2])
    steps = [201, 101, 1][: int(10 * 0.3)]
    scheduler, noise = plain.scheduler, torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(key.seed))
    scheduler.set_timesteps(10)
    steps = scheduler.timesteps.tolist()[-3:]
    levels = [float(scheduler.alphas_cumprod[step]) for step in steps] + [1.0]
    x = levels[0] ** 0.5 * pixels[2:3] + (1 - levels[0]) ** 0.5 * noise
    with torch.no_grad():
        for step, now, after in zip(steps, levels, levels[1:], strict=False):
            eps = plain.model(x, step).sample
            x0 = (x - (1 - now) ** 0.5 * eps) / now**0.5
            if scheduler.config.clip_sample:
                x0 = x0.clamp(-1, 1)
                eps = (x - now**0.5 * x0) / (1 - now) ** 0.5 if scheduler.config.get("use_clipped") else eps
            x = after**0.5 * x0 + (1 - after) ** 0.5 * eps
    expected = np.round(255 * (x[0, 0] / 2 + 0.5).clamp(0, 1).numpy())
    assert np.abs(as_array(maker([key]))[0] - expected).max() <= 1
    with pytest.raises(ValueError, match="strength lies from 0 to 1"):
        GenerativeAugmenter(plain, data, strength=1.5)


@pytest.mark.slow
def test_distances_from_the_image_grow_with_the_strength_as_measured(plain):
    """Squared, in [-1, 1], of the first hundred test digits: measured once; less than a fifth may change."""
    count, measured = 100, {0.05: 0.0011, 0.1: 0.0089, 0.2: 0.0285, 0.4: 0.0837, 0.6: 0.1871}
    data = load_images("digits", "test").select(range(count))
    images, found = as_array(data.read(range(count))), {}
    for strength in measured:
        maker = GenerativeAugmenter(plain, data, strength=strength, num_inference_steps=50)
        found[strength] = float(np.square((as_array(maker(maker.keys(1))) - images) / 127.5).mean())
    assert list(found.values()) == sorted(found.values())
    assert found == pytest.approx(measured, rel=0.2)


def test_of_the_whole_schedule_nothing_is_left_of_the_image_but_the_leftover_signal(plain):
    """sqrt(abar_999) of it: 0.0064 of the linear schedule."""
    pixels = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = own_noise((1, 8, 8), [3, 4])
    kept, plain.pipe.scheduler = plain.pipe.scheduler, DDIMScheduler(timestep_spacing="trailing")
    linear = Denoiser.from_pipe(plain.pipe)
    try:
        with starting_inside(linear, 10, 1.0) as timestep:
            start = noised_start(linear, pixels, timestep, noise)
            assert timestep == 999
    finally:
        plain.pipe.scheduler = kept
    left = float(DDIMScheduler().alphas_cumprod[999])
    assert left**0.5 == pytest.approx(0.0064, abs=5e-5)
    torch.testing.assert_close(start, left**0.5 * pixels + (1 - left) ** 0.5 * noise, rtol=1e-5, atol=1e-6)


def test_variants_have_noise_of_their_own_and_other_images_other_keys(plain):
    data = load_images("digits", "test").select(range(2))
    keys = GenerativeAugmenter(plain, data, num_inference_steps=4).keys(2)
    assert len({key.seed for key in keys}) == 4
    assert len({key.source for key in keys}) == 2
    assert {key.condition for key in keys} <= {str(digit) for digit in range(10)}
    assert GenerativeAugmenter(plain, data, num_inference_steps=4, seed=1).keys(2)[0].seed != keys[0].seed
    with pytest.raises(ValueError, match="made by image_to_image"):
        GenerativeAugmenter(plain, data, "code")
    pipe = plain.pipe
    whole, pipe.scheduler = pipe.scheduler, DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="start inside"), starting_inside(plain, 4, 0.5):
        pass
    pipe.scheduler = whole


def test_a_store_is_the_same_after_it_was_stopped(classes, tmp_path):
    maker = ClassMaker(classes, num_inference_steps=2, scales=GuidanceSampler(1, 5))
    keys, calls = maker.keys([0, 1, 2], 2), []

    def failing(asked):
        calls.append(len(asked))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return maker(asked)

    with pytest.raises(KeyboardInterrupt):
        write_images(tmp_path / "out", keys, failing, batch_size=2, shard_size=2, progress=False)
    done = write_images(tmp_path / "out", keys, maker, batch_size=2, shard_size=2, progress=False)
    once = write_images(tmp_path / "once", keys, maker, batch_size=2, shard_size=2, progress=False)
    assert [image.tobytes() for image in done.pictures()] == [image.tobytes() for image in once.pictures()]
    assert ImageStore.open(tmp_path / "out").load()["condition"] == ["0", "0", "1", "1", "2", "2"]
    data = load_images(str(tmp_path / "out"), "train")  # as every script and command opens it
    assert data.labels() == [0, 0, 1, 1, 2, 2]
    assert data.label_names == ["0", "1", "2"]
    with pytest.raises(FileExistsError):
        write_images(tmp_path / "out", maker.keys([0], 1), maker, progress=False)


RECIPE = {"model": CLASSES, "method": "class", "count": 1, "classes": ["3", "5"], "num_inference_steps": 2}


def test_the_command_makes_what_its_recipe_tells_and_goes_on(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "guidance_scale": [1, 5]}))
    command = ["generate", str(path), "--out", str(tmp_path / "out"), "--quiet"]
    with pytest.warns(UserWarning, match="set `scheduler: DDPMScheduler`"):  # guided, and the saved DDIM clips
        assert main(command) == 0
    first = [image.tobytes() for image in ImageStore.open(tmp_path / "out").pictures()]
    assert main(command) == 0  # nothing is made again
    assert [image.tobytes() for image in ImageStore.open(tmp_path / "out").pictures()] == first
    assert "2 images of digits-class-ddim" in capsys.readouterr().out
    path.write_text(yaml.safe_dump(RECIPE))
    assert main(command) != 0
    told = " ".join(capsys.readouterr().err.split())
    assert "Of the recipe: guidance_scale: [1.0, 5.0] -> []. --overwrite deletes what is there first" in told
    assert [image.tobytes() for image in ImageStore.open(tmp_path / "out").pictures()] == first
    assert main([*command, "--overwrite"]) == 0
    assert [image.tobytes() for image in ImageStore.open(tmp_path / "out").pictures()] != first
    (tmp_path / "photos" / "data").mkdir(parents=True)
    (tmp_path / "photos" / "data" / "mine.png").write_text("kept")
    for manifest in (None, "{}"):  # a folder of the user's, and one that holds something else
        if manifest is not None:
            (tmp_path / "photos" / "manifest.json").write_text(manifest)
        assert main([*command[:3], str(tmp_path / "photos"), "--quiet", "--overwrite"]) != 0
        assert (tmp_path / "photos" / "data" / "mine.png").read_text() == "kept"
    variants = {"model": PLAIN, "method": "image_to_image", "dataset_name": "digits", "limit": 2, "count": 2}
    path.write_text(yaml.safe_dump({**variants, "num_inference_steps": 4, "scheduler": "DDIMScheduler"}))
    assert main([*command[:3], str(tmp_path / "variants"), "--quiet"]) == 0
    assert load_images(str(tmp_path / "variants"), "train").labels() == [3, 3, 3, 3]
    path.write_text(yaml.safe_dump({**variants, "dataset_name": str(tmp_path / "variants"), "count": 1,
                                    "num_inference_steps": 4, "scheduler": "DDIMScheduler"}))  # fmt: skip
    assert main([*command[:3], str(tmp_path / "again"), "--quiet"]) == 0
    assert str(tmp_path) not in (tmp_path / "again" / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": 0.3}, "`strength` would do nothing"),
        ({"strength": 3, "method": "image_to_image", "classes": None}, "from 0 to 1"),
        ({"count": 0}, "`count` must be at least 1"),
        ({"guidance_scale": [5, 1]}, "the lower first"),
        ({"guidance_scale": [0.5]}, "from 1 up"),
        ({"guidance": {"CFG": 3}, "guidance_scale": [3]}, "takes the place of `guidance_scale`"),
        ({"classes": ["10"]}, "ids from 0 to 9"),
        ({"method": "prompt"}, "takes no prompts"),
        ({"method": "image_to_image", "classes": None}, "name them by `dataset_name`"),
        ({"model": PLAIN, "classes": None}, "has no classes"),
        ({"scheduler": "nothing"}, "none of diffusers"),
    ],
)
def test_bad_recipes(tmp_path, changes, message, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**RECIPE, **changes}.items() if v is not None}))
    assert main(["generate", str(path), "--out", str(tmp_path / "out")]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_recipe_needs_of_other_runs_is_told_by_its_first_lines(tmp_path, monkeypatch, capsys):
    recipe = Path("examples/configs/generate/digits_codes.yaml").resolve()
    monkeypatch.chdir(tmp_path)  # where nothing was trained
    assert main(["generate", str(recipe), "--out", str(tmp_path / "out")]) != 0
    told = capsys.readouterr().err
    assert "`model`: there is no 'outputs/digits-diffae' here. The first lines of" in told
    assert "digits_codes.yaml tell how it is made" in " ".join(told.split())
