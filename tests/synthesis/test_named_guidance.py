"""Every guidance of the library by its name in a recipe: the images of `guide` with the same settings."""

import inspect
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from PIL import Image as Picture

from diffusers_repr import Denoiser, NoisyClassifier, guidance
from diffusers_repr.guidance import (
    CFG,
    PAG,
    SAG,
    AutoGuidance,
    ClassifierGuidance,
    DepthGuidance,
    EnergyGuidance,
    Guidance,
    ReadoutGuidance,
    SummedReadoutGuidance,
    guide,
)
from diffusers_repr.heads import DepthHead, ReadoutHead
from diffusers_repr.store.image_store import ImageKey
from diffusers_repr.synthesis import ClassMaker, GenerationRecipe, PromptMaker, PromptSampler
from diffusers_repr.synthesis.named_guidance import FROM_PYTHON, GUIDANCES, described, for_keys, open_named
from diffusers_repr.synthesis.recipe import open_maker
from tests.objectives.cases import shake
from tests.testers.models import build, saved

MODELS = "examples/models"
CARS, EDGES, DEPTH = f"{MODELS}/cars-ddpm", f"{MODELS}/cars-edges", f"{MODELS}/cars-depth-standin"
DIGITS, OF_CLASSES = f"{MODELS}/digits-ddpm", f"{MODELS}/digits-class-ddim"
CLASSIFIER = f"{MODELS}/digits-classifier"
VARIANTS = {"method": "image_to_image", "strength": 0.5, "num_inference_steps": 4, "scheduler": "DDIMScheduler"}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A weaker model, a picture of edges, and images to make variants of."""
    folder = tmp_path_factory.mktemp("guided")
    weaker = Denoiser.from_pretrained(DIGITS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in weaker.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    weaker.pipe.save_pretrained(folder / "weaker")
    rng = np.random.default_rng(0)
    Picture.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(folder / "edges.png")
    shape = (32, 32, 3) if Denoiser.from_pretrained(CARS).image_channels == 3 else (32, 32)
    pictures = [Picture.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(2)]
    rows = Dataset.from_dict({"image": pictures}, features=Features({"image": Image()}))
    rows.to_parquet(folder / "images.parquet")
    return folder


def target(folder):
    """The picture of edges in the range of the labels of the head."""
    low, high = ReadoutHead.from_pretrained(EDGES).range
    return low + (high - low) * torch.from_numpy(np.array(Picture.open(folder / "edges.png"))).double() / 255


def as_array(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def rounded(images):
    """As `as_array` of the pictures."""
    whole = np.round(255 * images.clip(0, 1))
    return whole[..., 0] if whole.shape[-1] == 1 else whole


def by_class(**changes):
    return {"model": OF_CLASSES, "method": "class", "classes": ["1", "7"], "num_inference_steps": 3, **changes}


def of_images(folder, name, model):
    data = "digits" if name == "digits" else str(folder / "images.parquet")
    return {**VARIANTS, "model": model, "dataset_name": data, "limit": 2}


# The recipe without its guidance, what it says of it, and the same from Python.
CASES = {
    "CFG": lambda at: (
        by_class(scheduler="DDPMScheduler"), {"scale": 3, "interval": [100, 900]}, CFG(3.0, interval=(100, 900))
    ),
    "PAG": lambda at: (
        {**VARIANTS, "model": str(saved("short_sd")), "dataset_name": str(at / "images.parquet")}, 2, PAG(2.0)
    ),
    "SAG": lambda at: (
        by_class(guidance_scale=[1, 4], scheduler="DDPMScheduler"), {"scale": 1, "layers": "mid_block.*"},
        SAG(1.0, layers="mid_block.*"),
    ),
    "AutoGuidance": lambda at: (
        of_images(at, "digits", DIGITS), {"weaker_model": str(at / "weaker"), "scale": 2},
        AutoGuidance(Denoiser.from_pretrained(str(at / "weaker")), scale=2.0),
    ),
    "ClassifierGuidance": lambda at: (
        by_class(model=DIGITS), {"classifier": CLASSIFIER, "scale": 3},
        ClassifierGuidance(NoisyClassifier.from_pretrained(CLASSIFIER), [1, 7], scale=3.0),
    ),
    "ReadoutGuidance": lambda at: (
        of_images(at, "cars", CARS), {"head": EDGES, "target": str(at / "edges.png"), "update": "eps", "scale": 500},
        ReadoutGuidance(ReadoutHead.from_pretrained(EDGES), target(at).float(), update="eps", scale=500.0),
    ),
    "SummedReadoutGuidance": lambda at: (
        of_images(at, "cars", CARS),
        {"parts": [{"head": EDGES, "target": str(at / "edges.png"), "weight": 2}], "update": "eps", "scale": 500},
        SummedReadoutGuidance(
            [ReadoutGuidance(ReadoutHead.from_pretrained(EDGES), target(at).float(), weight=2)],
            update="eps", scale=500.0,
        ),
    ),
    "DepthGuidance": lambda at: (
        of_images(at, "cars", CARS), {"strong": DEPTH, "weak": f"{DEPTH}/weak", "scale": 200.0},
        DepthGuidance(DepthHead.from_pretrained(DEPTH), DepthHead.from_pretrained(f"{DEPTH}/weak"), scale=200.0),
    ),
}  # fmt: skip


def test_every_guidance_of_the_library_has_a_name_or_a_reason():
    known = {name for name, one in vars(guidance).items() if inspect.isclass(one) and issubclass(one, Guidance)}
    assert known - {"Guidance"} == set(GUIDANCES) | set(FROM_PYTHON)
    assert set(CASES) == set(GUIDANCES)
    for name in FROM_PYTHON:
        with pytest.raises(ValueError, match=f"{name}` cannot be named"):
            GenerationRecipe(OF_CLASSES, "class", 1, guidance={name: 1.0})


@pytest.mark.parametrize("name", CASES)
def test_by_name_as_by_guide(places, name):
    recipe, given, same = CASES[name](places)
    maker, keys = open_maker(GenerationRecipe(count=1, guidance={name: given}, **recipe))
    asked = keys()
    made, alone = as_array(maker(asked)), as_array(maker(asked[1:]))
    assert np.abs(made[1:] - alone).max() <= 1
    assert str(places) not in repr(asked)
    maker.guidance = []
    with guide(maker.pipe, same):
        expected = rounded(maker.make(asked))
    assert np.abs(expected - made).max() <= 1
    assert np.abs(rounded(maker.make(asked)) - made).max() > 3  # without it, or with the pipeline's own scale


def test_keys_tell_what_guides(places):
    """Two networks of one class, and two pictures, are two keys; without any the settings stand as they are."""
    assert described([PAG(2.0)]) == {"guidance": [repr(PAG(2.0))]}
    head, other = ReadoutHead.from_pretrained(EDGES), ReadoutHead.from_pretrained(EDGES)
    shake(other)
    blank = torch.zeros(32, 32)
    given = [ReadoutGuidance(head, blank), ReadoutGuidance(other, blank), ReadoutGuidance(head, blank + 1)]
    marks = [described([SummedReadoutGuidance([one])])["guided_by"] for one in given]
    assert len(set(marks)) == 3
    assert described([SummedReadoutGuidance([ReadoutGuidance(head, blank.clone())])])["guided_by"] == marks[0]
    weaker = Denoiser.from_pretrained(str(places / "weaker"))
    assert described([AutoGuidance(weaker)]) == described([AutoGuidance(weaker.pipe)]) == described(
        [AutoGuidance(weaker.model)]
    )  # fmt: skip
    assert described([EnergyGuidance(torch.mean)]) != described([EnergyGuidance(torch.sum)])
    many = described([SAG(scale) for scale in range(20)])
    assert len(json.dumps(many)) < 1000
    assert many != described([SAG(scale) for scale in range(1, 21)])


def test_what_the_manifest_and_the_model_say(places):
    maker = ClassMaker(Denoiser.from_pretrained(OF_CLASSES), guidance=[CFG(2.0)])
    assert json.loads(maker.key(0, condition="1").guidance)["guidance"] == [repr(CFG(2.0))]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"PGA": 1}, "'PGA'; it takes CFG, PAG"),
        ({"PAG": "much"}, "is a scale"),
        ({"PAG": {"scale": True}}, "is a scale"),
        ({"PAG": {"layer": "x"}}, "no setting 'layer'.*Did you mean layers"),
        ({"PAG": {"perturbation": "none"}}, "identity"),
        ({"SAG": {"kernel_size": 2}}, "odd"),
        ({"CFG": {"interval": 3}}, r"\[low, high\]"),
        ({"CFG": {"interval": [900, 100]}}, "wrong way round"),
        ({"AutoGuidance": 1.1}, "name weaker_model"),
        ({"ReadoutGuidance": {"head": EDGES, "reference_row": 0}}, "no setting 'reference_row'"),
    ],
)
def test_settings_that_are_refused_before_anything_is_opened(given, message):
    with pytest.raises(ValueError, match=message):
        GenerationRecipe("nowhere", "class", 1, guidance=given)


def test_what_is_refused_when_it_is_opened(places):
    cars, digits = Denoiser.from_pretrained(CARS), Denoiser.from_pretrained(DIGITS)
    for denoiser, given, message in (
        (digits, {"ClassifierGuidance": {"classifier": EDGES}}, "holds a 'ReadoutHead'; a NoisyClassifier"),
        (digits, {"AutoGuidance": {"weaker_model": EDGES}}, "model_index.json"),
        (digits, {"AutoGuidance": {"weaker_model": "nothing/here/at/all"}}, "nothing/here"),
        (digits, {"AutoGuidance": {"weaker_model": 3}}, "names a folder"),
        (cars, {"ReadoutGuidance": {"head": EDGES}}, "target"),
        (cars, {"ReadoutGuidance": {"head": EDGES, "target": "none.png"}}, "no picture 'none.png'"),
        (cars, {"ReadoutGuidance": {"head": EDGES, "target": f"{EDGES}/config.json"}}, "no picture that can be read"),
        (cars, {"SummedReadoutGuidance": {"parts": EDGES}}, "is a list of settings"),
        (cars, {"SummedReadoutGuidance": {"parts": [{"target": "x"}]}}, "name head"),
        (cars, {"DepthGuidance": {"strong": DEPTH}}, "nothing to do"),
    ):  # fmt: skip
        with pytest.raises((ValueError, OSError), match=message):
            open_named(given, denoiser)
    with pytest.raises(ValueError, match="takes the place of `guidance_scale`"):
        GenerationRecipe(count=1, guidance={"CFG": 2}, guidance_scale=[2], **by_class())
    classifier = ClassifierGuidance(NoisyClassifier.from_pretrained(CLASSIFIER))
    with pytest.raises(ValueError, match="towards its class id.*None"):  # images without labels
        for_keys([classifier], [ImageKey("m", 8, 8, 1, 0)])
    prompts = PromptMaker(Denoiser.from_pipe(build("short_sd")), PromptSampler.of_templates(["cat"]),
                          guidance=[classifier])  # fmt: skip
    with pytest.raises(ValueError, match="towards its class id.*'cat'"):  # before the first image
        prompts.keys(1)
