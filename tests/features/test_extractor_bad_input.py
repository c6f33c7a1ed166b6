"""What a user may get wrong about an extractor: what came, what is allowed."""

import pytest
import torch

from diffusers_repr import Denoiser, FeatureExtractor, NoiseLevel
from tests.features.extractor_cases import images_for, make
from tests.testers.models import build


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"layers": "up_blocks.9"}, ValueError, "No layer 'up_blocks.9'.*Closest"),
        ({"layers": "midblock"}, ValueError, "Closest.*mid_block"),
        ({"layers": 3}, TypeError, "full module paths"),
        ({"layers": [1]}, TypeError, "never by an index"),
        ({"layers": []}, ValueError, "list is empty"),
        ({"layers": ["mid_block", "mid_block"]}, ValueError, "given twice"),
        ({"timestep": 1000}, ValueError, "outside"),
        ({"timestep": -1}, ValueError, "outside"),
        ({"timestep": [10, 5000]}, ValueError, "outside"),
        ({"timestep": "261"}, TypeError, "must be a number"),
        ({"timestep": True}, TypeError, "must be a number"),
        ({"timestep": float("nan")}, ValueError, "finite"),
        ({"timestep": []}, ValueError, "No timesteps"),
        ({"timestep": [[1]]}, TypeError, "must be a number"),
        ({"timestep": NoiseLevel(timestep=torch.tensor([1.0, 2.0]))}, ValueError, "per sample"),
        ({"noise": "random"}, ValueError, "per_image, shared, fresh, clean"),
        ({"noise": "clean", "ensemble_size": 2}, ValueError, "average equal features"),
        ({"pooling": "adaptive:0"}, ValueError, "adaptive:P"),
        ({"ensemble_size": 0}, ValueError, "whole number from 1"),
        ({"ensemble_size": 1.5}, ValueError, "whole number from 1"),
        ({"batch_size": True}, ValueError, "whole number from 1"),
        ({"seed": 0.5}, TypeError, "seed must be a whole number"),
        ({"where": "middle"}, ValueError, "output, input, residual"),
        ({"image_size": (32, 33)}, ValueError, "multiples of"),
        ({"image_size": (32, 32, 3)}, ValueError, "one side, or"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        make("ddpm", **{"layers": "mid_block", "timestep": 100, **settings})


@pytest.mark.parametrize(
    ("images", "call", "error", "message"),
    [
        ([], {}, ValueError, "list is empty"),
        (torch.rand(0, 3, 32, 32), {}, ValueError, "list is empty"),
        ([torch.rand(3, 32, 32), torch.rand(3, 32, 48)], {}, ValueError, "mixed sizes"),
        (torch.full((1, 3, 32, 32), torch.nan), {}, ValueError, "NaN"),
        (torch.full((1, 3, 32, 32), 2.0), {}, ValueError, r"\[0, 1\]"),
        (torch.rand(1, 3, 33, 32), {}, ValueError, "multiples of"),
        ("cat.png", {}, TypeError, "Cannot read images from str"),
        (torch.rand(2, 3, 32, 32), {"ids": ["a"]}, ValueError, "1 ids for 2 images"),
        (torch.rand(2, 3, 32, 32), {"ids": "ab"}, TypeError, "one text"),
        (torch.rand(2, 3, 32, 32), {"ids": [0.5, None]}, TypeError, "text or a whole number"),
        (torch.rand(2, 3, 32, 32), {"prompt": ["a", "b", "c"]}, ValueError, "3 prompts for 2 images"),
        (torch.rand(2, 3, 32, 32), {"class_labels": 1}, ValueError, "takes a prompt"),
    ],
)
def test_bad_calls(images, call, error, message):
    with pytest.raises(error, match=message):
        make("sd", "mid_block")(images, **call)


def test_wrong_number_of_labels():
    with pytest.raises(ValueError, match="3 class_labels for 2 images"):
        make("class_unet")(images_for("class_unet"), class_labels=[1, 2, 3])


def test_a_layer_that_never_runs_or_holds_no_image():
    with pytest.raises(ValueError, match="Never called"):
        make("ddpm", "time_proj", where="output", timestep=5).replace(layers=["mid_block", "down_blocks"])(
            images_for("ddpm")
        )
    extractor = make("flux", "pos_embed")
    with pytest.raises((TypeError, ValueError), match="pos_embed"):
        extractor(images_for("flux"), prompt="a")


def test_nan_features_name_their_layer():
    pipe = build("ddpm")
    with torch.no_grad():
        pipe.unet.mid_block.resnets[0].conv1.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="'mid_block'.*float32"):
        FeatureExtractor(Denoiser.from_pipe(pipe), ["conv_in", "mid_block"], 5, image_size="keep")(images_for("ddpm"))


def test_as_map_refuses_what_is_no_map():
    pooled = make("ddpm", "mid_block", pooling="mean")(images_for("ddpm"))
    with pytest.raises(ValueError, match="pooled"):
        pooled.as_map("mid_block")
    with pytest.raises(KeyError, match="not extracted"):
        pooled.as_map("up_blocks.0")
    vectors = make("ddpm", "time_embedding")(images_for("ddpm"))
    with pytest.raises(ValueError, match="neither a map nor tokens"):
        vectors.as_map("time_embedding")
