"""The pictures of evaluations: what a person looks at beside the numbers."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from diffusers_repr.data.image_pairs import ImagePairs
from diffusers_repr.data.masked import open_masked
from diffusers_repr.metrics.pck import correct_points
from diffusers_repr.pictures.confusion import confusion_picture
from diffusers_repr.pictures.grid import image_grid
from diffusers_repr.pictures.masks import heat, legend, mask_over
from diffusers_repr.pictures.match_lines import stack_pictures
from diffusers_repr.tasks.images import class_data

_SHOWN = 6  # images, in a row
_MISTAKES = 12
_NEAREST = 8
_ROWS = 2000  # images a confusion matrix is made of, the first
_KINDS = 4  # categories of pairs, one pair each
_POINTS = 16  # of a pair
_ALPHA = 0.05


def of_classification(task: Any, data: Any) -> dict[str, Image.Image]:
    """Which class is taken for which, and the mistakes that the probe is surest of.

    Args:
        task: A `Probe`.
        data: Labelled images, of which the first 2,000 are shown.
    """
    found = class_data(data, "test")
    rows = range(min(len(found), _ROWS))
    parts = [task(found.read(rows[at : at + 256])).probabilities.cpu() for at in range(0, len(rows), 256)]
    probabilities, truth = torch.cat(parts), found.targets[: len(rows)]
    said, names = probabilities.argmax(1), list(task.recipe.label_names)
    counts = torch.zeros(len(names), len(names), dtype=torch.int64)
    counts.index_put_((truth, said), torch.ones(len(rows), dtype=torch.int64), accumulate=True)
    drawn = {"confusion": confusion_picture(counts.numpy(), names)}
    wrong = (said != truth).nonzero().flatten()
    sure = wrong[probabilities[wrong].amax(1).argsort(descending=True, stable=True)][:_MISTAKES].tolist()
    if sure:
        images = [one.convert("RGB") for one in found.read(sure)]
        titles = [f"{names[said[at]]} {float(probabilities[at].max()):.2f}\nis {names[truth[at]]}" for at in sure]
        tiles = [_titled(image, title) for image, title in zip(images, titles, strict=True)]
        drawn["mistakes"] = image_grid(tiles, 6, title="Mistakes, the surest first: what is said, what it is")
    return drawn


def of_representation(task: Any, data: Any) -> dict[str, Image.Image]:
    """Which class is taken for which; images, and beside each the training images nearest to it.

    Args:
        task: A `RepresentationProbe`.
        data: Labelled images, of which the first 2,000 are shown.
    """
    found = class_data(data, "test")
    rows = range(min(len(found), _ROWS))
    vectors = task.vectors(found.read(rows))
    said, truth = task.head(vectors).argmax(1), found.targets[: len(rows)]
    count = int(task.head.config["num_classes"])
    counts = torch.zeros(count, count, dtype=torch.int64)
    counts.index_put_((truth, said), torch.ones(len(rows), dtype=torch.int64), accumulate=True)
    names = [str(name) for name in task.recipe["label_names"] or range(count)]
    drawn = {"confusion": confusion_picture(counts.numpy(), names)}
    if task.train is not None:
        bank = task.vectors(task.train)
        queries = _spread(len(rows))
        mean, std = bank.mean(0), bank.std(0).clamp(min=1e-6)
        near = [torch.nn.functional.normalize((one - mean) / std, dim=1) for one in (vectors[queries], bank)]
        nearest = (near[0] @ near[1].T).topk(min(_NEAREST, len(bank)), dim=1).indices
        tiles = []
        for query, places in zip(queries, nearest.tolist(), strict=True):
            tiles += [one.convert("RGB") for one in (*found.read([query]), *task.train.read(places))]
        drawn["neighbours"] = image_grid(
            tiles, 1 + nearest.shape[1], title="Test images, and the training images nearest to each by cosine"
        )
    return drawn


def of_segmentation(task: Any, data: Any) -> dict[str, Image.Image]:
    """Images, their masks, what the segmenter says, and where it is uncertain.

    Args:
        task: A `Segmenter`.
        data: Images with masks, of which six are shown, evenly over the split.
    """
    found, names = open_masked(data, "test", task.recipe.label_names), task.recipe.label_names
    images, truth = found.samples(_spread(len(found)))
    output = task(images)
    highest = max(float(one.max()) for one in output.uncertainty)
    rows: list[Image.Image] = [image.convert("RGB") for image in images]
    for masks in (truth, [mask.numpy() for mask in output.masks]):
        rows += [mask_over(image, mask, len(names)) for image, mask in zip(images, masks, strict=True)]
    rows += [heat(one.numpy(), highest) for one in output.uncertainty]
    titles = ["image", "its mask", "predicted", "uncertain"]
    width = max(image.width for image in images)
    grid = image_grid(rows, len(images), row_titles=titles, side=max(112, min(width, 256)))
    return {"masks": stack_pictures([grid, legend(names)])}


def of_correspondence(task: Any, data: Any) -> dict[str, Image.Image]:
    """Match lines of a pair of each of four categories, green where right; and similarity maps of the first.

    Args:
        task: A `Correspondence`.
        data: Pairs.
    """
    pairs = data if isinstance(data, ImagePairs) else ImagePairs.from_list(data)
    firsts: dict[str | None, Any] = {}
    for pair in sorted(pairs.pairs, key=lambda pair: pair.category != "stereo"):  # the real one first
        if len(pair.source_points):
            firsts.setdefault(pair.category, pair)
    lines: list[Image.Image] = []
    drawn: dict[str, Image.Image] = {}
    for category, pair in list(firsts.items())[:_KINDS]:
        images = pairs.image(pair.source), pairs.image(pair.target)
        points, truth = pair.source_points[:_POINTS], pair.target_points[:_POINTS]
        found = task(*images, points)
        right = correct_points(found.matches, truth, max(found.target_size), _ALPHA)
        title = f"{category or pairs.name}: {int(right.sum())} of {len(right)} within {_ALPHA:g} of the longer side"
        lines.append(found.plot(correct=right, title=title, height=220))
        if not drawn:
            maps = task(*images, points[:4], similarity=True)
            drawn["similarity"] = maps.plot(height=220, title="four points, and where the features see them")
    return {"matches": stack_pictures(lines), **drawn}


def of_panoptic(task: Any, data: Any) -> dict[str, Image.Image]:
    """Segments over images, with their names.

    Args:
        task: An `OpenVocabularySegmenter`.
        data: Images with segments, of which six are shown, evenly over the split.
    """
    images = [data[at]["pixel_values"] for at in _spread(len(data))]
    shown = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    return {"segments": image_grid(task(shown).pictures(shown), 3)}


def _spread(count: int) -> list[int]:
    """Places of the images that are shown."""
    shown = min(_SHOWN, count)
    return [at * count // shown for at in range(shown)]


def _titled(image: Image.Image, text: str, side: int = 84) -> Image.Image:
    """An image under two lines of text."""
    factor = max(1, side // image.width)
    large = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (max(side, large.width), large.height + 32), (255, 255, 255))
    sheet.paste(large, ((sheet.width - large.width) // 2, 32))
    at = (sheet.width // 2, 16)
    ImageDraw.Draw(sheet).multiline_text(at, text, (34, 34, 34), ImageFont.load_default(12), "mm", align="center")
    return sheet


__all__ = ["of_classification", "of_correspondence", "of_panoptic", "of_representation", "of_segmentation"]
