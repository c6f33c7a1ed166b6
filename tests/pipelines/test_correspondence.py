"""`CorrespondencePipeline` as any diffusers pipeline: arguments arrive, other sources, offload, dtype, errors."""

import numpy as np
import pytest
import torch
from diffusers_repr.pipelines.correspondence import CorrespondencePipeline
from diffusers_repr.pipelines.feature_extraction import FeatureExtractionPipeline
from PIL import Image

from diffusers_repr import Denoiser, FeatureExtractor
from diffusers_repr.features.presets import presets
from diffusers_repr.heads.hyperfeature_source import Hyperfeatures
from diffusers_repr.heads.hyperfeatures import HyperfeaturesHead
from diffusers_repr.hub.push import check_pipeline_file
from diffusers_repr.tasks.correspondence import Correspondence
from tests.pipelines import sit_cases
from tests.testers.models import CONDITIONS, build, saved

A, B = (
    Image.fromarray(np.random.default_rng(at).integers(0, 255, size, dtype=np.uint8))
    for at, size in enumerate([(32, 48, 3), (40, 32, 3)])
)
POINTS = [[3, 4], [40, 20]]
CALL = {"layer": "up_blocks.1", "timestep": 261, "ensemble_size": 2, "image_size": 32}


def test_every_argument_reaches_the_task():
    pipe = build("short_sd")
    settings = {
        "image_size": (16, 32),
        "noise": "shared",
        "seed": 7,
        "batch_size": 2,
        "sample_posterior": "per_member",
    }
    source = FeatureExtractor(Denoiser.from_pipe(pipe), "up_blocks.1", 100, ensemble_size=3, **settings)
    among = [[1, 2], [20, 30], [9, 9]]
    want = Correspondence(source)(
        A, B, POINTS, among, prompt=["a cat", "a dog"], likeness="l2", cycle=True
    )  # fmt: skip
    ours = CorrespondencePipeline.from_pipe(pipe)
    got = ours(
        A, B, POINTS, among, "up_blocks.1", 100, prompt=["a cat", "a dog"], likeness="l2", cycle=True,
        ensemble_size=3, **settings,
    )  # fmt: skip
    for name in ("points", "matches", "scores", "cycle"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    by_source = ours(A, B, POINTS, features=source, prompt="a cat", similarity=True)
    assert torch.equal(
        by_source.similarity, Correspondence(source)(A, B, POINTS, prompt="a cat", similarity=True).similarity
    )
    with pytest.raises(ValueError, match="features= has a layer"):
        ours(A, B, POINTS, features=source, timestep=3)
    with pytest.raises(TypeError, match="pool_size"):
        ours(A, B, POINTS, **CALL, pool_size=2)


def test_learned_and_clean_features_serve_as_well():
    ours = CorrespondencePipeline.from_pipe(build("ddim"))
    head = HyperfeaturesHead.for_base(ours.denoiser, steps=10, reads=[0, 5], width=8, bottleneck=4)
    image, points = A.resize((32, 32)), [[5, 6], [20, 9]]
    clean = FeatureExtractor(ours.denoiser, "up_blocks.0", 100, noise="clean", image_size=16)  # as CleanDIFT is read
    for source in (Hyperfeatures(ours.denoiser, head, image_size=16), clean):
        found = ours(image, image, points, features=source)
        assert torch.equal(found.matches, torch.tensor(points, dtype=torch.float32))
        assert (found.scores - 1).abs().max() < 1e-5


def test_a_preset_and_its_prompt():
    ours = CorrespondencePipeline.from_pipe(build("sd"))
    preset = presets("dift", "sd")
    got = ours(A, B, POINTS, preset=preset, category="cat", image_size=32, ensemble_size=2)
    want = ours(A, B, POINTS, preset=preset, prompt="a photo of a cat", image_size=32, ensemble_size=2)
    plain = ours(A, B, POINTS, preset=preset, image_size=32, ensemble_size=2)
    assert torch.equal(got.scores, want.scores)
    assert not torch.equal(got.scores, plain.scores)
    own = ours(A, B, POINTS, prompt=["a photo of a {category}", "a dog"], category="cat", **CALL)
    assert torch.equal(own.scores, ours(A, B, POINTS, prompt=["a photo of a cat", "a dog"], **CALL).scores)
    for without in (None, "a photo"):
        with pytest.raises(ValueError, match="category='cat' has no place in the prompt"):
            ours(A, B, POINTS, prompt=without, category="cat", **CALL)
    with pytest.raises(ValueError, match="choices for sd, adm-256, and this UNet2DConditionModel has another"):
        ours(A, B, POINTS, preset="dift")  # the tiny one is no Stable Diffusion


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "sd3", "flux_guidance")]


@pytest.mark.filterwarnings("ignore:No paper names a layer")
@pytest.mark.parametrize("name", ["ddim", "dit", *OTHERS])
def test_any_family_without_a_choice(name):
    ours = CorrespondencePipeline.from_pipe(build(name))
    image = A.resize((32, 32))
    found = ours(image, image, [[5, 6], [20, 9]], image_size=32, ensemble_size=1, **CONDITIONS[name])
    assert torch.equal(found.matches, torch.tensor([[5.0, 6.0], [20.0, 9.0]]))
    assert ours.denoiser is ours.denoiser


def test_offload_dtype_and_errors_leave_it_usable():
    ours = CorrespondencePipeline.from_pipe(build("short_sd"))
    want = ours(A, B, POINTS, **CALL)
    ours.enable_model_cpu_offload(device="cpu")
    assert torch.equal(ours(A, B, POINTS, **CALL).scores, want.scores)
    with pytest.raises(ValueError, match=r"points: number 0 is .*inside as \(y, x\)"):
        ours(A, B, [[4, 40]], **CALL)
    with pytest.raises(ValueError, match="No layer 'mid'"):
        ours(A, B, POINTS, **{**CALL, "layer": "mid"})
    assert torch.equal(ours(A, B, POINTS, **CALL).scores, want.scores)
    ours.remove_all_hooks()
    ours.to(torch.bfloat16)
    half = ours(A, B, POINTS, **CALL)
    assert half.scores.dtype == torch.float32
    assert (half.scores - want.scores).abs().max() < 0.1
    assert torch.is_grad_enabled()


def test_progress_bar(capfd):
    ours = CorrespondencePipeline.from_pipe(build("short_sd"))
    ours.set_progress_bar_config(disable=False, desc="reading")
    ours(A, B, POINTS, **CALL)
    assert capfd.readouterr().err.count("reading: 100%") >= 2


def test_folders_load_without_remote_code(tmp_path):
    ours = CorrespondencePipeline.from_pretrained(saved("short_sd"))
    assert ours.config.class_name == "StableDiffusionPipeline"
    want = ours(A, B, POINTS, **CALL)
    ours.save_pretrained(tmp_path)
    again = CorrespondencePipeline.from_pretrained(tmp_path)
    assert (again(A, B, POINTS, **CALL).scores - want.scores).abs().max() < 1e-4
    FeatureExtractionPipeline.from_pretrained(tmp_path).save_pretrained(tmp_path / "other")  # of the same kind
    other = CorrespondencePipeline.from_pretrained(tmp_path / "other")
    assert other.config.class_name == "StableDiffusionPipeline"
    assert (other(A, B, POINTS, **CALL).scores - want.scores).abs().max() < 1e-4


def test_pipelines_of_this_package_too(tmp_path):
    sit = sit_cases.pipeline(vae=sit_cases.autoencoder(), id2label={1: "goldfish"})
    call = {"layer": "blocks.1", "timestep": 300, "ensemble_size": 1, "class_labels": 1, "similarity": True}
    ours = CorrespondencePipeline.from_pipe(sit)
    image = torch.rand(3, *ours.denoiser.image_size, generator=torch.Generator().manual_seed(0))
    want = ours(image, image.flip(2), [[1, 2]], **call).similarity
    sit.save_pretrained(tmp_path)
    again = CorrespondencePipeline.from_pretrained(tmp_path)
    assert again.config.class_name == "SiTPipeline"
    assert (again(image, image.flip(2), [[1, 2]], **call).similarity - want).abs().max() < 1e-4


def test_the_file_is_one_pipeline():
    from diffusers_repr.pipelines import correspondence

    file = correspondence.__path__[0] + "/pipeline.py"
    assert check_pipeline_file(file) == "CorrespondencePipeline"
