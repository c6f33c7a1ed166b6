"""Run by `test_loading.py`, and by `test_custom_pipeline.py` for all families: the folder `feature_extraction`.

In a process of its own: every local custom pipeline is one and the same module there.

Loads a folder of each family that it is told with `custom_pipeline=`, compares with the plain extractor, saves, loads
again.
"""

import json
import sys
import tempfile
import traceback
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features import FeatureExtractor
from tests.testers.models import CONDITIONS, SIZES, saved

FOLDER = Path(__file__).parents[2] / "pipelines" / "feature_extraction"
LAYERS = {
    "ddpm": "mid_block",
    "ddim": "up_blocks.0",
    "class_unet": "mid_block",
    "sd": "up_blocks.1",
    "sdxl": "mid_block",
}
SETTINGS = {
    "sd": {"requires_safety_checker": False},
    "sdxl": {"force_zeros_for_empty_prompt": False},
    "dit": {"id2label": {"0": "tench", "1": "goldfish"}},
}
CONSENT = {"custom_pipeline": str(FOLDER), "trust_remote_code": True}


def copy_with(name: str, root: str) -> Path:
    """The saved folder, with settings and a scheduler config that stock pipelines would rewrite."""
    folder = Path(root) / name
    DiffusionPipeline.from_pretrained(saved(name)).save_pretrained(folder)
    for file, changes in (("model_index.json", SETTINGS.get(name, {})), ("scheduler/scheduler_config.json", {})):
        config = json.loads((folder / file).read_text()) | changes
        if name == "sd" and "scheduler" in file:
            config |= {"steps_offset": 0, "clip_sample": True}
        (folder / file).write_text(json.dumps(config))
    return folder


@torch.no_grad()
def check(name: str, root: str) -> None:
    folder = copy_with(name, root)
    pipe = DiffusionPipeline.from_pretrained(folder, **CONSENT)
    assert type(pipe).__name__ == "FeatureExtractionPipeline"
    assert pipe.config.class_name == json.loads((folder / "model_index.json").read_text())["_class_name"]
    for key, value in SETTINGS.get(name, {}).items():
        assert pipe.config[key] == value, key
    if name == "sd":
        assert pipe.scheduler.config.steps_offset == 0
        assert pipe.scheduler.config.clip_sample is True

    h, w = SIZES[name]
    images = torch.rand(2, pipe.denoiser.image_channels, h, w, generator=torch.Generator().manual_seed(0))
    layer = LAYERS.get(name, "transformer_blocks.1")
    call = {"layers": [layer], "timestep": 261, "ensemble_size": 2, "seed": 3, "image_size": "keep"}
    got = pipe(images, **call, **CONDITIONS[name])
    stock = DiffusionPipeline.from_pretrained(folder)
    assert type(stock) is getattr(diffusers, pipe.config.class_name)
    assert {k for k, v in stock.components.items() if v is not None} == {
        k for k, v in pipe.components.items() if v is not None
    }
    want = FeatureExtractor(Denoiser.from_pipe(stock), [layer], 261, ensemble_size=2, seed=3, image_size="keep")(
        images, **CONDITIONS[name]
    )
    assert torch.equal(got.features[layer], want.features[layer])
    assert got.as_map(layer).shape == want.as_map(layer).shape
    assert got.level.timestep == 261
    if name == "sd":
        assert pipe.scheduler.config.steps_offset == 0

    pipe.save_pretrained(folder / "again")
    again = DiffusionPipeline.from_pretrained(folder / "again", **CONSENT)
    assert again.config.class_name == pipe.config.class_name
    for key, value in SETTINGS.get(name, {}).items():
        assert again.config[key] == value, key
    assert torch.equal(again(images, **call, **CONDITIONS[name]).features[layer], want.features[layer])

    # the loaded class as a converter of another pipeline: every component comes along, nothing is cast
    stock.to(dtype=torch.bfloat16)
    new = type(pipe).from_pipe(stock)
    for key, component in stock.components.items():
        assert new.components[key] is component, key
    assert {p.dtype for p in new.denoiser.model.parameters()} == {torch.bfloat16}
    assert new.config.class_name == type(stock).__name__


def check_all(names: list[str]) -> dict[str, str | None]:
    """What went wrong with each; under "no consent" what is told where nobody trusts the folder."""
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()
    errors: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as root:
        try:
            DiffusionPipeline.from_pretrained(saved("ddpm"), custom_pipeline=str(FOLDER))
        except ValueError as error:
            errors["no consent"] = str(error)
        for name in names:
            errors[name] = None
            try:
                check(name, root)
            except Exception:
                errors[name] = traceback.format_exc()
    return errors


if __name__ == "__main__":
    print(json.dumps({"errors": check_all(sys.argv[1:])}), flush=True)
