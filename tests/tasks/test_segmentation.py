"""Segmenters: fitting, predicting, measuring, saving, sharing, and what they refuse."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from huggingface_hub import ModelCard
from PIL import Image
from torch.nn import functional

from diffusers_repr.data.image_data import from_dataset
from diffusers_repr.data.masked import open_masked
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.default_layers import segmentation_default
from diffusers_repr.features import FeatureExtractor, FeatureOutput
from diffusers_repr.features.source import FeatureSource
from diffusers_repr.tasks import Probe, Segmenter
from diffusers_repr.testing import check_task
from tests.metrics.test_miou import by_sets
from tests.tasks.planted import pipeline
from tests.tasks.planted import small as small_probe
from tests.tasks.planted_masks import CLASSES, LAYERS, QUICK, annotated, dataset, fitted, small
from tests.testers.models import build


def numbers(output):
    return torch.cat([torch.stack(output.uncertainty).flatten(), torch.stack(output.masks).flatten().float()])


def test_a_segmenter_is_a_task():
    check_task(fitted(), annotated(2, seed=5)[0], annotated(3, seed=5), numbers)


def test_planted_classes_are_found():
    segmenter = fitted()
    images, masks = annotated(6, seed=2)
    scores = segmenter.evaluate((images, masks), record=False)
    assert scores["mean_iou"] > 0.6  # all ground: 0.25
    assert scores["pixel_accuracy"] > 0.85
    assert scores["rows"] == 6
    output = segmenter(images)
    found, truth = torch.stack(output.masks).flatten().tolist(), np.stack(masks).ravel().tolist()
    each = by_sets(found, truth, 3, 255, masked=True)
    assert [scores[f"iou: {name}"] for name in CLASSES] == pytest.approx(list(each.values()))
    assert scores["mean_iou"] == pytest.approx(sum(each.values()) / 3)
    for doubt, score in zip(output.uncertainty, output.scores, strict=True):
        assert doubt.shape == (16, 16)
        assert 0 <= float(doubt.min()) <= float(doubt.max()) <= np.log(3)
        assert float(score) == pytest.approx(doubt.flatten().sort().values[-25:].mean().item(), rel=1e-5)
    assert [(s.name, s.split, s.rows) for s in segmenter.recipe.scores] == [
        (name, "validation", 3) for name in ("mean_iou", "mean_iou_legacy", "pixel_accuracy")
    ]


def test_it_says_what_the_head_says_of_the_features():
    """Layers and levels in the order of the paper, one noise for all images."""
    segmenter, images = fitted(), annotated(2, seed=3)[0]
    extractor = FeatureExtractor(Denoiser.from_pipe(pipeline()), LAYERS, [10, 100], "shared", image_size=(16, 16))
    features = extractor(images)
    dense = [
        functional.interpolate(one.as_map(layer), (16, 16), mode="bilinear")
        for _, one in features.per_level()
        for layer in LAYERS
    ]
    pixels = torch.cat(dense, 1).permute(0, 2, 3, 1).flatten(0, 2)
    with torch.no_grad():
        logits = segmenter.head.classify(pixels.expand(3, -1, -1))
    votes = logits.argmax(-1).mode(0).values.view(2, 16, 16)
    chances = logits.softmax(-1)
    entropy = torch.distributions.Categorical(chances).entropy().mean(0)
    doubt = torch.distributions.Categorical(chances.mean(0)).entropy() - entropy
    output = segmenter(images)
    assert (torch.stack(output.masks) == votes).float().mean() > 0.99  # but for ties that rounding decides
    torch.testing.assert_close(torch.stack(output.uncertainty), doubt.view(2, 16, 16), atol=1e-5, rtol=1e-4)
    assert torch.equal(numbers(segmenter(images)), numbers(output))
    alone = torch.cat([numbers(segmenter(image)) for image in images])
    torch.testing.assert_close(alone.sort().values, numbers(output).sort().values, atol=1e-5, rtol=1e-4)


def test_one_noise_for_all_images_by_its_seed():
    denoiser, image = Denoiser.from_pipe(pipeline()), annotated(1)[0]
    found = [FeatureExtractor(denoiser, LAYERS, 100, "shared", seed=s)(image)["mid_block"] for s in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert small(train=annotated(2)).recipe.noise == "shared"


def test_every_form_of_data_and_of_mask_gives_the_same():
    images, masks = annotated(3)
    x = annotated(2, seed=4)[0]
    plain = {"protocol": QUICK.replace(max_epochs=1)}
    wanted = numbers(small(train=(images, masks), **plain)(x))
    pictures = [Image.fromarray(mask.astype(np.uint8)) for mask in masks]
    tensors = torch.stack([torch.from_numpy(np.array(image))[None] for image in images])
    data = dataset(3)
    for train in (
        (images, pictures),
        (tensors, torch.from_numpy(np.stack(masks))),
        data,
        from_dataset(data, mask_column="mask", mask_names=CLASSES),
    ):
        assert torch.equal(numbers(small(train=train, **plain)(x)), wanted)
    named = small(train=data.rename_column("mask", "regions"), mask_column="regions", **plain)
    assert torch.equal(numbers(named(x)), wanted)
    half = small(train=(images, masks), store_dtype="float16", **plain)
    torch.testing.assert_close(torch.stack(half(x).uncertainty), torch.stack(named(x).uncertainty), atol=0.1, rtol=0)


def test_masks_come_back_at_the_size_of_their_images():
    segmenter, (images, _) = fitted(), annotated(2, seed=6)
    large = [images[0].resize((40, 24), Image.Resampling.NEAREST), images[1]]
    output = segmenter(large)
    assert [tuple(m.shape) for m in output.masks] == [(24, 40), (16, 16)]
    assert [tuple(m.shape) for m in output.uncertainty] == [(24, 40), (16, 16)]
    seen = segmenter(large[0].resize((16, 16), Image.Resampling.BICUBIC)).masks[0]
    rows, columns = (np.arange(24) * 16 + 8) // 24, (np.arange(40) * 16 + 8) // 40
    assert torch.equal(output.masks[0], seen[rows][:, columns])
    drawn = output.pictures(large)
    assert len(drawn) == 2
    assert all(picture.mode == "RGB" for picture in drawn)
    arrays = output.pictures([np.array(large[0]), torch.from_numpy(np.array(images[1]))[None]])
    assert [picture.tobytes() for picture in arrays] == [picture.tobytes() for picture in drawn]


def test_the_smallest_class_of_an_image_is_not_learned():
    """19 pixels are too few, 20 are enough; what is measured on stays as it is."""
    images, masks = annotated(2)
    for mask, count in zip(masks, (19, 20), strict=True):
        mask[mask == 2] = 0
        mask.flat[:count] = 2
    with pytest.warns(UserWarning, match="grey: 1 of 3 classes are on no training mask.*fewer than 20 pixels"):
        small(train=(images[:1], masks[:1]))
    segmenter = small(train=(images[1:], masks[1:]))
    assert "iou: grey" in segmenter.evaluate((images[:1], masks[:1]), record=False)
    assert segmenter.recipe.protocol["min_pixels"] == 20


def test_layers_levels_and_presets_by_default():
    segmenter = small(layers=None, timestep=None, train=annotated(2))
    assert segmenter.recipe.layers == ("up_blocks.0.resnets.1", "up_blocks.1.resnets.1")
    assert [round(level.nsr, 3) for level in segmenter.recipe.levels] == [0.176, 0.522, 0.958]
    assert [round(level.timestep) for level in segmenter.recipe.levels] == [50, 150, 250]
    twelve = segmentation_default([], [f"blocks.{at}" for at in range(12)])
    assert twelve.layers == ("blocks.6", "blocks.8", "blocks.10")
    given = FeatureExtractor(Denoiser.from_pipe(pipeline()), "up_blocks.1", 10, "per_image")
    assert small(given, train=annotated(2)).recipe.noise == "per_image"
    with pytest.raises(ValueError, match="preset='ddpm-seg' makes a source of a model"):
        small(given, preset="ddpm-seg")
    with pytest.raises(ValueError, match=r"No layer 'up_blocks.2.attentions.0'"):
        Segmenter.fit(pipeline(), annotated(2), preset="ddpm-seg")
    with pytest.raises(ValueError, match="leaves no place for pixels"):
        small(pooling="mean")


def test_a_transformer_and_a_text_model():
    colours = [image.resize((32, 32)).convert("RGB") for image in annotated(2)[0]]
    masks = [np.kron(mask, np.ones((2, 2), np.int64)) for mask in annotated(2)[1]]
    quick = QUICK.replace(max_epochs=1)
    for name, changes in {"sd": {"prompt": "a cat"}, "dit": {"class_labels": 1}}.items():
        segmenter = small(build(name), (colours, masks), layers=None, timestep=100, protocol=quick, **changes)
        assert segmenter(colours[0]).masks[0].shape == (32, 32)
        assert (segmenter.recipe.prompt, segmenter.recipe.class_labels) == (
            changes.get("prompt"), changes.get("class_labels")
        )  # fmt: skip


class Doubled:
    """A source of features that is no `FeatureExtractor`: one map, made of two."""

    layers = ["both"]

    def __init__(self, denoiser):
        self.denoiser, self.image_size = denoiser, (16, 16)
        self.inner = FeatureExtractor(denoiser, LAYERS[1:], 10, image_size=(16, 16))

    def __call__(self, images, *, prompt=None, class_labels=None, embeddings=None, ids=None):
        found = self.inner(images, ids=ids)
        both = torch.cat([found[LAYERS[1]], found[LAYERS[1]].square()], 1)
        return FeatureOutput({"both": both}, found.level, {}, None, found.image_size, images)


def test_another_source_of_features(tmp_path):
    source = Doubled(Denoiser.from_pipe(pipeline()))
    assert isinstance(source, FeatureSource)
    segmenter, x = small(source), annotated(2, seed=4)[0]
    assert segmenter.recipe.source == "Doubled"
    assert segmenter.recipe.base.features == {"both": 16}
    segmenter.save_pretrained(tmp_path / "s")
    assert "of a `Doubled`, which is passed as source=..." in (tmp_path / "s" / "README.md").read_text()
    again = Segmenter.from_pretrained(tmp_path / "s", source=Doubled(Denoiser.from_pipe(pipeline())))
    assert torch.equal(numbers(again(x)), numbers(segmenter(x)))
    with pytest.raises(ValueError, match="features of a Doubled, which its recipe does not hold: pass it"):
        Segmenter.from_pretrained(tmp_path / "s", base=pipeline())
    with pytest.raises(ValueError, match=r"reads \['both'\] of a Doubled; the source \(FeatureExtractor\) gives"):
        Segmenter.from_pretrained(tmp_path / "s", source=source.inner)
    with pytest.raises(ValueError, match="timestep are settings of a model; Doubled has its own"):
        small(source, timestep=3)


# Saving and sharing


def test_saved_with_its_recipe_and_base(tmp_path):
    pipeline().save_pretrained(tmp_path / "base")
    segmenter = small(Denoiser.from_pretrained(tmp_path / "base"), train=annotated(3))
    segmenter.evaluate(annotated(2, seed=8))
    segmenter.save_pretrained(tmp_path / "pixels")
    assert sorted(p.name for p in (tmp_path / "pixels").iterdir()) == [
        "README.md", "config.json", "diffusers_repr_pixel_ensemble.py", "diffusion_pytorch_model.safetensors",
        "segmentation.json",
    ]  # fmt: skip
    data = json.loads((tmp_path / "pixels" / "segmentation.json").read_text())
    assert data["base"]["name"] == "../base"
    assert data["format"] == "diffusers_repr.segmentation/1"
    again = Segmenter.from_pretrained(tmp_path / "pixels")
    x = annotated(2, seed=4)[0]
    assert torch.equal(numbers(again(x)), numbers(segmenter(x)))
    assert again.recipe == dataclasses.replace(segmenter.recipe, base=again.recipe.base)
    card = ModelCard((tmp_path / "pixels" / "README.md").read_text())
    assert card.data.pipeline_tag == "image-segmentation"
    assert {r.metric_type for r in card.data.eval_results} == {"mean_iou", "mean_iou_legacy", "pixel_accuracy"}
    assert {r.task_type for r in card.data.eval_results} == {"image-segmentation"}
    assert "up_blocks.1" in repr(again)


def test_probes_and_segmenters_are_told_apart(tmp_path):
    fitted().save_pretrained(tmp_path / "pixels")
    small_probe().save_pretrained(tmp_path / "probe")
    with pytest.raises(FileNotFoundError, match="is no probe: it has no probe.json; it is a segmenter"):
        Probe.from_pretrained(tmp_path / "pixels", base=pipeline())
    with pytest.raises(FileNotFoundError, match="is no segmenter: it has no segmentation.json; it is a probe"):
        Segmenter.from_pretrained(tmp_path / "probe", base=pipeline())
    with pytest.raises(FileExistsError, match="holds no segmenter"):
        fitted().save_pretrained(tmp_path / "probe")


def test_another_base_is_refused(tmp_path):
    fitted().save_pretrained(tmp_path / "s")
    with pytest.raises(ValueError, match="is a UNet2DConditionModel; the segmenter was fitted on a UNet2DModel"):
        Segmenter.from_pretrained(tmp_path / "s", base=build("sd"))
    with pytest.raises(ValueError, match="gives 32 values at layer 'mid_block'; the segmenter was fitted on 16"):
        Segmenter.from_pretrained(tmp_path / "s", base=pipeline(block_out_channels=(16, 32)))
    other = pipeline()
    other.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    with pytest.raises(ValueError, match="the noise schedules differ"):
        Segmenter.from_pretrained(tmp_path / "s", base=other)
    with pytest.warns(UserWarning, match="other weights than the segmenter's base"):
        Segmenter.from_pretrained(tmp_path / "s", base=pipeline(seed=1))
    with pytest.raises(ValueError, match="UNet2DModel that has no name"):
        Segmenter.from_pretrained(tmp_path / "s")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ignore_index": "x"}, "segmentation.json: ignore_index is 'x'"),
        ({"source": "os.system()"}, "segmentation.json: source is 'os.system"),
        ({"label_names": CLASSES[:2]}, "and 2 classes. The files are of two segmenters"),
        ({"layers": LAYERS[::-1]}, "The files are of two segmenters"),
        ({"pooling": "mean"}, "has 'pooling', which this version does not know"),
        ({"format": "diffusers_repr.segmentation/2"}, "Upgrade"),
        ({"format": "diffusers_repr.probe/1"}, "is no segmenter's recipe"),
    ],
)
def test_damaged_recipes(tmp_path, changes, message):
    fitted().save_pretrained(tmp_path / "s")
    path = tmp_path / "s" / "segmentation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        Segmenter.from_pretrained(tmp_path / "s", base=pipeline())


# Bad input


def test_masks_that_do_not_fit():
    images, masks = annotated(2)
    with pytest.raises(ValueError, match=r"Mask 1 is \(8, 8\) \(H, W\), its image \(16, 16\)"):
        small(train=(images, [masks[0], masks[1][:8, :8]]))
    wrong = masks[0].copy()
    wrong[2, 3] = 7
    with pytest.raises(ValueError, match="Mask 0 has the class 7 at x=3, y=2; classes are 0 to 2, and ignore_index"):
        small(train=(images, [wrong, masks[1]]))
    with pytest.raises(ValueError, match="2 images and 1 masks"):
        small(train=(images, masks[:1]))
    with pytest.raises(ValueError, match="Mask 0 is no rectangle of whole numbers"):
        small(train=(images, [mask / 2 for mask in masks]))
    truth = open_masked((images, [mask > 0 for mask in masks]), "train").samples([0, 1])[1]
    assert all((ids == (mask > 0)).all() for ids, mask in zip(truth, masks, strict=True))
    with pytest.raises(ValueError, match="mode 'RGB', which shows colours"):
        small(train=(images[:1], [Image.new("RGB", (16, 16))]))
    with pytest.raises(ValueError, match="show 'ground' of 3 classes; a segmenter needs two"):
        small(train=(images, [mask * 0 for mask in masks]))
    with pytest.raises(ValueError, match="no pixel of a class; all are ignore_index=255"):
        small(train=(images, [mask * 0 + 255 for mask in masks]))
    white = [(mask > 0).astype(np.uint8) * 255 for mask in masks]
    with pytest.raises(ValueError, match="a segmenter needs two. Are they black and white. Then their pixels of 255"):
        small(train=(images, white))
    with pytest.raises(ValueError, match=r"has the class 255 .*Are they black and white.*store ids 0 and 1"):
        small(train=(images, white), ignore_index=None)
    once = {"members": 1, "protocol": QUICK.replace(max_epochs=1), "label_names": ["ground", "thing"]}
    two = small(train=(images, [mask // 255 for mask in white]), **once)
    with pytest.raises(ValueError, match="show one class alone, or none. Are they black and white"):
        two.evaluate((images, white), record=False)
    with pytest.raises(ValueError, match="no column named mask or masks"):
        small(train=dataset(2).rename_column("mask", "regions"))
    with pytest.raises(ValueError, match="was opened without masks"):
        open_masked(from_dataset(dataset(2).remove_columns("mask")), "train")
    with pytest.raises(TypeError, match="or a tuple"):
        small(train=images)
    named = from_dataset(dataset(2), mask_column="mask", mask_names=["a", "b", "c"])
    with pytest.raises(ValueError, match="the classes .*; given are"):
        small(train=named)
    far = [np.where(mask == 2, 3_000_000, mask) for mask in masks]
    with pytest.raises(ValueError, match="3000001 classes, of which"):
        small(train=(images, far), label_names=None)


def test_one_image_and_names_that_are_ids():
    segmenter = small(train=tuple(part[:1] for part in annotated(1)), label_names=None)
    assert segmenter.recipe.label_names == ("0", "1", "2")
    with pytest.warns(UserWarning, match="cat: 1 of 4 classes are on no training mask and will not be predicted."):
        small(train=annotated(2), label_names=[*CLASSES, "cat"])


def test_what_is_asked_of_a_fitted_one():
    segmenter, (images, masks) = fitted(), annotated(2, seed=3)
    with pytest.raises(ValueError, match="list is empty"):
        segmenter([])
    with pytest.raises(ValueError, match="3 prompts for 2 images"):
        segmenter(images, prompt=["a"] * 3)
    with pytest.raises(ValueError, match="classes are 0 to 2"):
        segmenter.evaluate((images, [mask + 1 for mask in masks]))
    with pytest.raises(ValueError, match="all were ignored"):
        segmenter.evaluate((images, [mask * 0 + 255 for mask in masks]), record=False)
    with pytest.raises(ValueError, match="All 2 images of images"):
        small(train=(images, masks), validation=(images, masks))
    with pytest.raises(ValueError, match="is given; leave one out|No preset"):
        small(preset="nothing")
    broken = Segmenter(small(train=annotated(2)).head, segmenter.recipe, segmenter.denoiser)
    with torch.no_grad():
        broken.head.last.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="are not finite"):
        broken(images)
