"""A ControlNet on scribbles: its training, guidance over the hint, and the images that `method: hint` makes."""

import dataclasses
import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline
from PIL import Image

from diffusers_repr import PAG, Denoiser, guide
from diffusers_repr.data.image_data import from_dataset
from diffusers_repr.data.masked import placed
from diffusers_repr.guidance import CFG, HintGuidance
from diffusers_repr.models import HintEncoder
from diffusers_repr.objectives import ControlNetConfig, ControlNetObjective
from diffusers_repr.objectives.controlnet import widths
from diffusers_repr.synthesis import GenerationRecipe, GuidanceSampler, HintMaker, load_controlnet
from diffusers_repr.testing import check_guidance, check_objective
from tests.objectives.cases import shake
from tests.testers.models import build

NAMES = ["ground", "coin", "hole"]
COLOURS = ["#000000", "#ff0000", "#0000ff", "#808080"]
SIDE = 32
COUNT = 3


def base():
    pipe = build("short_sd")
    pipe.scheduler = DDIMScheduler(num_train_timesteps=1000, steps_offset=1, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return Denoiser.from_pipe(pipe)


def scribbles(count=COUNT, side=SIDE):
    rng = np.random.default_rng(0)
    return rng.choice([0, 1, 2, 255], (count, side, side), p=[0.1, 0.1, 0.1, 0.7]).astype(np.uint8)


def objective(**changes):
    torch.manual_seed(0)
    made = ControlNetObjective(base(), HintEncoder(NAMES), **changes)
    control = made.controlnet
    zeros = (*control.controlnet_down_blocks, control.controlnet_mid_block, control.controlnet_cond_embedding.conv_out)
    for layer in zeros:  # of a new one
        shake(layer)
    return made


def batch(**changes):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(COUNT, 3, SIDE, SIDE, generator=generator) * 2 - 1
    masks = torch.from_numpy(scribbles()).long()
    return {"pixel_values": pixels, "masks": masks, "caption": ["a cat", "a photo", "a dog"], **changes}


@pytest.fixture(scope="module")
def trained():
    return objective(hint_dropout=0.4)


def test_hints_are_channels_or_colours_and_the_null_one_is_learned():
    masks = torch.tensor([[[0, 2], [255, 1]]])
    one_hot = HintEncoder(NAMES)(masks)
    assert one_hot.shape == (1, 4, 2, 2)
    assert one_hot.argmax(1).tolist() == [[[0, 2], [3, 1]]]
    config = ControlNetConfig("base", hint="colours", colours=["#000000", "#ff0000", "#0000ff", "#33cc99"])
    coloured = config.encoder(NAMES, 255)(masks)
    assert (255 * coloured[0]).round().permute(1, 2, 0).tolist() == [
        [[0, 0, 0], [0, 0, 255]], [[51, 204, 153], [255, 0, 0]]
    ]  # fmt: skip
    encoder = HintEncoder(NAMES)
    dropped = encoder(masks.repeat(2, 1, 1), torch.tensor([True, False]))
    assert torch.equal(dropped[0], encoder.null.view(-1, 1, 1).expand(4, 2, 2))
    assert torch.equal(dropped[1], one_hot[0])
    for given, message in (
        (dict(class_names=[]), "classes of different names"), (dict(class_names=NAMES, ignore_index=1), "'coin'"),
        (dict(class_names=NAMES, colours=[[0, 0, 0]]), "3 classes and 1 colours"),
        (dict(class_names=NAMES, colours=[[0, 0, 0]] * 3), "another for each class"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            HintEncoder(**given)
    with pytest.raises(ValueError, match="class 3; classes are 0 to 2"):
        encoder(torch.full((1, 2, 2), 3))
    with pytest.raises(ValueError, match="B, H, W"):
        encoder(torch.zeros(2, 2))


def test_contract_and_the_loss_written_out(trained):
    check_objective(trained, batch())
    assert trained.hints.null.grad is not None
    assert sorted(part.folder for part in trained.artifacts()) == ["", "hint_encoder"]
    copied, fresh = objective(new_lr_scale=5.0).param_groups()
    assert fresh["lr_scale"] == 5
    assert {p.shape for p in fresh["params"]} >= {(len(NAMES) + 1,)}  # the null hint is in the optimizer
    assert len(copied["params"]) + len(fresh["params"]) == len(list(trained.parameters()))
    trained.zero_grad()
    given = batch(time=torch.tensor([100, 500, 900]), hint_dropped=torch.tensor([False, True, False]))
    x0 = trained.clean({**given, "generator": torch.Generator().manual_seed(3)})
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(4))
    noisy = trained.noised({**given, "noise": noise}, x0, drop=False)
    loss = (trained.predict(noisy) - noisy.target).square().mean()
    loss.backward()
    unet, control = trained.denoiser.model, trained.controlnet
    table = trained.denoiser.scheduler.alphas_cumprod[[100, 500, 900]].view(-1, 1, 1, 1)
    x_t = table.sqrt() * x0 + (1 - table).sqrt() * noise
    text = torch.cat([trained.denoiser.condition(prompt).kwargs()["encoder_hidden_states"]
                      for prompt in given["caption"]])  # fmt: skip
    hint = torch.nn.functional.one_hot(torch.where(given["masks"] == 255, 3, given["masks"]), 4)
    hint = hint.permute(0, 3, 1, 2).float()
    hint[1] = trained.hints.null.detach().view(-1, 1, 1)
    with torch.no_grad():
        down, mid = control(x_t, given["time"], text, hint, return_dict=False)
        found = unet(x_t, given["time"], text, down_block_additional_residuals=down,
                     mid_block_additional_residual=mid).sample  # fmt: skip
    assert float(loss) == pytest.approx(float((found - noise).square().mean()), rel=1e-4)
    assert float(trained.hints.null.grad.abs().min()) > 0  # of the dropped sample
    assert all(parameter.grad is None for parameter in unet.parameters())
    trained.zero_grad()
    kept = trained.noised({**given, "noise": noise, "hint_dropped": torch.zeros(3, dtype=torch.bool)}, x0, drop=False)
    (trained.predict(kept) - kept.target).square().mean().backward()
    assert float(trained.hints.null.grad.abs().max()) == 0


def test_hints_are_dropped_as_often_as_asked(trained):
    masks = torch.zeros(2000, 1, 1, dtype=torch.long)
    hints = trained.hint({"masks": masks, "generator": torch.Generator().manual_seed(0)})
    share = float((hints[:, 0, 0, 0] == trained.hints.null[0]).double().mean())
    assert abs(share - 0.4) < 3 * (0.4 * 0.6 / 2000) ** 0.5


def test_training_goes_on_from_a_saved_controlnet(trained, tmp_path):
    for part in trained.artifacts():
        part.module.save_pretrained(tmp_path / "ours" / part.folder)
    ours = ControlNetConfig("base", controlnet_name_or_path=str(tmp_path / "ours"))
    controlnet, hints = ours.parts(NAMES, 255)
    again = ControlNetObjective(base(), hints, controlnet=controlnet)
    assert all(torch.equal(a, b) for a, b in zip(again.controlnet.parameters(), trained.controlnet.parameters(),
                                                 strict=True))  # fmt: skip
    assert torch.equal(again.hints.null, trained.hints.null)
    for names, changes, message in (
        (["ground", "coin", "ring"], {}, "trained on hints with class_names"),
        (NAMES, {"hint": "colours", "colours": COLOURS}, "hints with colours=null"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(ours, **changes).parts(names, 255)
    # One of others has no encoder of hints: the recipe tells what hints are.
    stock = ControlNetModel.from_unet(base().model, conditioning_channels=3,
                                      conditioning_embedding_out_channels=widths(base().stride))  # fmt: skip
    stock.save_pretrained(tmp_path / "stock")
    colours = ControlNetConfig("base", hint="colours", colours=COLOURS,
                               controlnet_name_or_path=str(tmp_path / "stock"))  # fmt: skip
    controlnet, hints = colours.parts(NAMES, 255)
    assert ControlNetObjective(base(), hints, controlnet=controlnet).controlnet.config.conditioning_channels == 3
    with pytest.raises(ValueError, match="3 channels, these have 4.*`hint: colours`"):
        ControlNetObjective(base(), HintEncoder(NAMES), controlnet=controlnet)
    with pytest.raises(ValueError, match="no hint_encoder/.*--controlnet_name_or_path"):
        load_controlnet(tmp_path / "stock")
    for changes, message in (
        ({"layers_per_block": 2}, "of another base: it has layers_per_block=2"),
        ({"conditioning_embedding_out_channels": (16, 32, 96, 96, 96)}, "16 times smaller, this base has a stride of"),
    ):
        other = ControlNetModel.from_config({**stock.config, **changes})
        with pytest.raises(ValueError, match=message):
            ControlNetObjective(base(), hints, controlnet=other)
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    for name, changes, message in (
        ("kind", {"_class_name": "UNet2DConditionModel"}, "'UNet2DConditionModel', no ControlNetModel"),
        ("sizes", {"conditioning_channels": 5}, "the tensor .* is .*ControlNetModel with this config has"),
    ):
        shutil.copytree(tmp_path / "stock", tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            load_controlnet(tmp_path / name)
    with pytest.raises(ValueError, match="give both or neither"):
        ControlNetConfig("base", controlnet_revision="v1")


def test_bad_batches_and_bases_are_refused(trained):
    with pytest.raises(ValueError, match="--mask_column"):
        trained.check_batch({k: v for k, v in batch().items() if k != "masks"})
    with pytest.raises(ValueError, match=r"hints are \(16, 16\).*nearest pixel"):
        trained.check_batch(batch(masks=torch.zeros(3, 16, 16, dtype=torch.long)))
    with pytest.raises(ValueError, match="class 7"):
        trained.check_batch(batch(masks=torch.full((3, SIDE, SIDE), 7)))
    with pytest.raises(ValueError, match="UNet2DModel"):
        ControlNetObjective(Denoiser.from_pretrained("examples/models/digits-ddpm"), HintEncoder(NAMES))
    for given, message in (
        ({"hint": "boxes"}, "one_hot or colours"), ({"hint": "colours"}, "both or neither"),
        ({"hint_dropout": 2}, "probability"), ({"new_lr_scale": 0}, "positive"), ({"eval_images": 0}, "positive"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ControlNetConfig("base", **given)


def control_pipe(trained):
    components = trained.denoiser.pipe.components
    pipe = StableDiffusionControlNetPipeline(
        **components, controlnet=trained.controlnet, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_guidance_over_the_hint_is_the_formula_and_keeps_the_text(trained):
    """A plain DDIM loop of `eps(null) + w (eps(hint) - eps(null))`, w another in each sample, against the pipeline."""
    trained.eval()
    pipe, prompts, ws = control_pipe(trained), ["a cat", "a photo", "a dog"], [0.0, 1.0, 3.0]
    hint = trained.hints(batch()["masks"]).detach()
    start = torch.randn(COUNT, 4, SIDE // trained.denoiser.stride, SIDE // trained.denoiser.stride,
                        generator=torch.Generator().manual_seed(5))  # fmt: skip
    call = {"prompt": prompts, "image": hint, "guidance_scale": 1.0, "num_inference_steps": 3, "latents": start,
            "output_type": "latent", "controlnet_conditioning_scale": 0.7}  # fmt: skip
    calls = []
    handle = trained.denoiser.model.register_forward_hook(lambda *given: calls.append(1))
    with guide(pipe, HintGuidance(trained.hints.null.detach(), scales=[w - 1 for w in ws])) as guided:
        found = pipe(**call).images
    handle.remove()
    assert [(step.lanes, step.passes) for step in guided.stats.steps] == [(2, 2)] * 3
    assert len(calls) == 3  # those of the null hint are the guidance's own
    text = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
    null = trained.hints.null.detach().view(1, -1, 1, 1).expand_as(hint)
    w, x, scheduler = torch.tensor(ws).view(-1, 1, 1, 1), start.clone(), pipe.scheduler
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            both = []
            for shown in (null, hint):
                down, mid = trained.controlnet(x, t, text, shown, conditioning_scale=0.7, return_dict=False)
                both.append(trained.denoiser.model(x, t, text, down_block_additional_residuals=down,
                                                   mid_block_additional_residual=mid).sample)  # fmt: skip
            eps = both[0] + w * (both[1] - both[0])
            x = scheduler.step(eps, t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    plain = pipe(**call).images
    torch.testing.assert_close(found[1], plain[1], rtol=1e-5, atol=1e-5)  # w = 1
    without = pipe(**{**call, "image": null}).images
    torch.testing.assert_close(found[0], without[0], rtol=1e-5, atol=1e-5)  # w = 0
    assert float((found[2] - plain[2]).abs().max()) > 1e-3
    with guide(pipe, [HintGuidance(trained.hints.null.detach(), scale=0)]):
        assert torch.equal(pipe(**call).images, plain)
    with guide(pipe, [HintGuidance(trained.hints.null.detach(), scale=1), PAG(1.0)]) as both_terms:
        pipe(**call)
    assert set(both_terms.stats.steps[0].acted) == {"HintGuidance", "PAG"}


def test_hint_guidance_keeps_the_contract_of_guidances(trained):
    hint = trained.hints(batch()["masks"][:1]).detach()
    guidance = HintGuidance(trained.hints.null.detach(), scale=0.5)
    call = {"image": hint, "guidance_scale": 2.0, "num_inference_steps": 2, "output_type": "latent"}
    check_guidance(control_pipe(trained), guidance, prompt="a cat", **call)


def test_hint_guidance_says_what_it_cannot_guide(trained):
    null, pipe = trained.hints.null.detach(), control_pipe(trained)
    with pytest.raises(ValueError, match="one ControlNet, and this pipeline has none"):
        guide(trained.denoiser.pipe, HintGuidance(null))
    with pytest.raises(ValueError, match="4 channels; the null hint has 3"):
        guide(pipe, HintGuidance(null[:3]))
    for given, message in (
        (dict(null=null[None]), "value a channel"), (dict(null=null, scales=[], scale=1.0), "one number a sample"),
        (dict(null=null, scales=[1.0], scale=2.0), "stays 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            HintGuidance(**given)
    call = {"image": trained.hints(batch()["masks"][:1]).detach(), "num_inference_steps": 1, "output_type": "latent"}
    with pytest.raises(ValueError, match="2 scales of the hint for 1"), guide(pipe, HintGuidance(null, scales=[1, 2])):
        pipe("a cat", guidance_scale=1.0, **call)
    with pytest.raises(ValueError, match="guess_mode"), guide(pipe, HintGuidance(null)):
        pipe("a cat", guidance_scale=2.0, guess_mode=True, **call)


@pytest.fixture(scope="module")
def data():
    images = np.random.default_rng(1).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
    return open_rows({"image": images, "scribble": scribbles()})


def open_rows(rows, **changes):
    features = datasets.Features({"image": datasets.Image(), "scribble": datasets.Image()})
    pictures = {k: [Image.fromarray(np.array(v, np.uint8)) for v in rows[k]] for k in ("image", "scribble")}
    made = datasets.Dataset.from_dict(pictures, features=features)
    return from_dataset(made, "image", name="scenes", split="train", mask_column="scribble",
                        **{"mask_names": NAMES, **changes})  # fmt: skip


def maker(trained, data, **settings):
    return HintMaker(trained.denoiser, data, trained.controlnet, trained.hints,
                     **{"num_inference_steps": 5, "name": "base", **settings})  # fmt: skip


def as_array(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_encode_ratio_is_the_share_of_the_schedule(trained, data):
    calls, steps = [], 5
    handle = trained.controlnet.register_forward_hook(lambda *given: calls.append(1))
    pixels = trained.denoiser.pixels(data.read(range(COUNT)))
    for strength in (0, 0.5, 1):
        calls.clear()
        made = maker(trained, data, strength=strength)
        images = made(made.keys(1))
        assert len(calls) == 2 * int(strength * steps)  # with the hint and with the null one
        if not strength:  # the image back, through the VAE
            back = trained.denoiser.decode(trained.denoiser.encode_pixels(pixels)).permute(0, 2, 3, 1).numpy()
            assert np.abs(as_array(images) - np.round(255 * back)).max() <= 1
    calls.clear()
    made = maker(trained, data, strength=1, scales=GuidanceSampler(1, 1))
    made(made.keys(1))
    assert len(calls) == steps  # w = 1 needs the hint alone
    handle.remove()
    with pytest.raises(ValueError, match="strength lies from 0 to 1"):
        maker(trained, data, strength=1.5)


def test_images_are_their_own_whatever_the_batch_and_another_scribble_is_another_key(trained, data):
    made = maker(trained, data, strength=0.6, prompt="a photo of {classes}", scales=GuidanceSampler(1, 4))
    keys = made.keys(2)
    assert len({key.seed for key in keys}) == len({key.name for key in keys}) == 2 * COUNT
    assert {key.prompt for key in keys} == {"a photo of ground, coin, hole"}
    told = [json.loads(key.guidance) for key in keys]
    assert len({one["guidance_scale"] for one in told}) == 2 * COUNT
    assert len({one["hint"] for one in told}) == COUNT
    together, alone = as_array(made(keys[:3])), np.concatenate([as_array(made([key])) for key in keys[:3]])
    assert np.abs(together - alone).max() <= 1
    other = scribbles()
    other[0, :4] = 1
    moved = open_rows({"image": [np.asarray(one) for one in data.read(range(COUNT))], "scribble": other})
    changed = maker(trained, moved, strength=0.6, prompt="a photo of {classes}", scales=GuidanceSampler(1, 4)).keys(2)
    assert [a.name == b.name for a, b in zip(keys, changed, strict=True)] == [False] * 2 + [True] * (2 * COUNT - 2)
    assert [a.seed for a in keys] == [b.seed for b in changed]


def test_guidance_over_the_prompt_and_of_attention_go_beside_that_of_the_hint(trained, data):
    given = {"strength": 0.4, "prompt": "a photo", "scales": GuidanceSampler(1, 4)}
    both = maker(trained, data, **given, guidance=[CFG(3.0), PAG(2.0)])
    keys, calls = both.keys(1), []
    handle = trained.controlnet.register_forward_hook(lambda module, args, out: calls.append(len(out[1])))
    made, alone = as_array(both(keys[:2])), as_array(both(keys[1:2]))
    handle.remove()
    assert np.abs(made[1:] - alone).max() <= 1
    assert calls == [4, 2] * 2 + [2, 1] * 2  # null and conditional rows with the hint, conditional ones without
    for left in ([CFG(3.0)], [PAG(2.0)]):
        both.guidance = left
        assert np.abs(as_array(both(keys[:2])) - made).max() > 1


def test_masks_are_brought_to_size_by_the_nearest_pixel(trained):
    larger = np.kron(scribbles(1), np.ones((2, 3), np.uint8))
    assert np.array_equal(placed(larger[0], (SIDE, SIDE)), scribbles(1)[0])
    images = np.random.default_rng(1).integers(0, 256, (1, 2 * SIDE, 3 * SIDE, 3), dtype=np.uint8)
    seen = []
    handle = trained.controlnet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["controlnet_cond"]), with_kwargs=True
    )
    made = maker(trained, open_rows({"image": images, "scribble": larger}), strength=0.2, scales=GuidanceSampler(1, 1))
    made(made.keys(1))
    handle.remove()
    assert torch.equal(seen[0], trained.hints(torch.from_numpy(scribbles(1)).long()))


def test_what_the_maker_refuses(trained, data):
    rows = {"image": [np.zeros((SIDE, SIDE, 3), np.uint8)], "scribble": [np.zeros((4, 4), np.uint8)]}
    with pytest.raises(ValueError, match=r"mask of row 0.*\(4, 4\).*size of its image"):
        maker(trained, open_rows(rows)).keys(1)
    rows["scribble"] = [np.full((SIDE, SIDE), 9, np.uint8)]
    with pytest.raises(ValueError, match="has the class 9"):
        maker(trained, open_rows(rows)).keys(1)
    with pytest.raises(ValueError, match="the ControlNet's hints"):
        maker(trained, open_rows(rows, mask_names=["a", "b", "c"]))
    colours = ControlNetConfig("b", hint="colours", colours=["#000000", "#ff0000", "#0000ff", "#808080"])
    with pytest.raises(ValueError, match="hints of 4 channels, these have 3"):
        HintMaker(trained.denoiser, data, trained.controlnet, colours.encoder(NAMES, 255))
    with pytest.raises(ValueError, match="without masks"):
        maker(trained, from_dataset(data.dataset, "image"))
    for given, message in (
        ({}, "controlnet and mask_column"), ({"controlnet": "c"}, "name mask_column"),
        ({"method": "image_to_image", "mask_column": "m"}, "`mask_column` would do nothing"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            GenerationRecipe(**{"model": "m", "method": "hint", "count": 1, "dataset_name": "d", **given})
