"""train_conditional.py with layouts: masks and boxes are found once, trained on, and drawn to sample."""

import numpy as np
import pytest
import torch
import yaml
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline
from train_conditional import main

from diffusers_repr.data.splits import open_split
from diffusers_repr.hub.files import read_json
from tests.examples.scripts import EXAMPLES, run_script

RECIPE = yaml.safe_load((EXAMPLES / "configs" / "self_guided_masks_digits.yaml").read_text())
SMALL = {
    "encoder": f"{EXAMPLES / 'models' / 'digits-ddpm'}:up_blocks.1@100",
    "k": 3,
    "max_train_steps": 2,
    "lr_warmup_steps": 0,
    "train_batch_size": 4,
    "eval_batch_size": 8,
    "num_inference_steps": 2,
    "checkpointing_steps": 2,
}


def run(folder, **changes):
    data = folder / "photos" / "data"
    if not data.exists():
        data.mkdir(parents=True)
        open_split("digits", "train").select(range(24)).to_parquet(data / "train-00000-of-00001.parquet")
    recipe = RECIPE | SMALL | {"dataset_name": str(folder / "photos"), "output_dir": str(folder / "out")} | changes
    recipe["model"] = RECIPE["model"] | {"block_out_channels": [16, 16]}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in recipe.items() if value is not None}))
    run_script(main, "train_conditional", "--config", str(path))
    pipe = GuidedUnconditionalPipeline.from_pretrained(recipe["output_dir"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **settings):
    seed = torch.Generator().manual_seed(0)
    return pipe(**settings, generator=seed, num_inference_steps=2, output_type="pt").images


def test_masks(tmp_path):
    pipe = run(tmp_path)
    assert pipe.unet.config.in_channels == 1 + 3
    masks = pipe.stored_prior.values
    assert masks.shape == (24, 8, 8)
    assert set(masks.unique().tolist()) == {0, 1, 2}
    record = read_json(tmp_path / "out-segments" / "segments.json")
    assert record["recipe"]["segments"]["num_clusters"] == 3
    drawn = sample(pipe, batch_size=2, guidance_scale=2.0)
    first = sample(pipe, layout=masks[:2], guidance_scale=2.0)
    assert drawn.shape == first.shape == (2, 1, 8, 8)
    assert (tmp_path / "out" / "samples.png").is_file()
    # The same recipe takes the masks that are there; another is refused before anything is trained.
    with pytest.raises(FileExistsError, match="num_clusters: 3 -> 4"):
        run(tmp_path, k=4, output_dir=str(tmp_path / "out"))


def test_boxes_and_masks_of_ones_own(tmp_path):
    pipe = run(tmp_path, level="box", box_classes=4)
    assert (pipe.unet.config.in_channels, pipe.unet.config.num_class_embeds) == (2, 5)
    boxes = pipe.stored_prior.values
    there = set(boxes.unique().tolist()) - {255}
    assert there
    assert max(there) < 4
    assert sample(pipe, layout=boxes[:1], guidance_scale=2.0).isfinite().all()
    found = str(tmp_path / "out-segments")
    given = {"assigner": None, "encoder": None, "dataset_name": found, "image_column": "image"}
    own = run(tmp_path, **given, mask_column="segments", output_dir=str(tmp_path / "own"))
    want = np.stack([np.asarray(image) for image in open_split(found, "train")["segments"]])
    assert np.array_equal(own.stored_prior.values.numpy(), want)
    with pytest.raises(ValueError, match="need no assigner"):
        run(tmp_path, **given | {"assigner": "kmeans"}, mask_column="segments", output_dir=str(tmp_path / "no"))
    with pytest.raises(ValueError, match="clusters of patches"):
        run(tmp_path, assigner="labels", encoder=None, output_dir=str(tmp_path / "no"))
