import functools
import json
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline
from diffusers_repr.pipelines.sit import SiTPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_repr.schedulers_ext.scheduling_flow_match_sde import FlowMatchSDEScheduler
from sample_for_fid import main

from diffusers_repr.models import SiTTransformer2DModel
from tests.testers.models import saved
from tests.training.loop_cases import forget_accelerate, in_a_fork

MODEL = str(Path(__file__).parents[2] / "examples" / "models" / "digits-class-ddim")
COUNT, SEED = 7, 5
FLAGS = ["--num_samples", str(COUNT), "--seed", str(SEED), "--batch_size", "2", "--shard_size", "3",
         "--num_inference_steps", "2", "--guidance_scale", "2.5", "--quiet"]  # fmt: skip


def sample(folder, *flags, model=MODEL):
    main([model, "--out", str(folder), *FLAGS, *flags])
    return folder / "samples.npz"


def read(path):
    """As the evaluator of ADM does, which knows the first two versions of the header and streams."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        assert not fortran
        return np.frombuffer(file.read(), dtype).reshape(shape)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fid")
    sample(folder)
    forget_accelerate()
    return folder


def test_each_image_is_that_of_its_seed_and_class_alone(whole):
    pipe = GuidedUnconditionalPipeline.from_pretrained(MODEL)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    images = read(whole / "samples.npz")
    assert (images.shape, images.dtype) == ((COUNT, 8, 8, 3), np.uint8)
    labels = torch.randint(10, (COUNT,), generator=torch.Generator().manual_seed(SEED)).tolist()
    for at, label in enumerate(labels):
        alone = {"generator": torch.Generator().manual_seed(SEED + at), "class_labels": [label]}
        wanted = np.asarray(pipe(**alone, guidance_scale=2.5, num_inference_steps=2).images[0].convert("RGB"))
        assert np.abs(images[at].astype(int) - wanted).max() <= 1  # rows of a batch may round otherwise


def test_two_processes_write_the_same(whole, together):
    assert read(together[0] / "samples" / "samples.npz").tobytes() == read(whole / "samples.npz").tobytes()


def test_a_killed_run_goes_on(whole, tmp_path):
    def second_shard():
        until = time.monotonic() + 120
        while not list((tmp_path / "images" / "data").glob("train-*")) and time.monotonic() < until:
            time.sleep(0.002)

    in_a_fork(lambda: sample(tmp_path), until=second_shard)
    assert not (tmp_path / "samples.npz").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "images" / "data").glob("train-*")}
    assert 0 < len(kept) < 3
    assert (sample(tmp_path)).read_bytes() == (whole / "samples.npz").read_bytes()
    assert all((tmp_path / "images" / "data" / name).stat().st_mtime_ns == when for name, when in kept.items())
    with pytest.raises(FileExistsError, match="of another recipe"):
        sample(tmp_path, "--seed", "6")


def test_balanced_classes_pixels_rounded_down_and_another_sampler(tmp_path, monkeypatch):
    asked = []
    call = GuidedUnconditionalPipeline.__call__

    @functools.wraps(call)
    def spy(self, **given):
        asked.append((type(self.scheduler).__name__, self.scheduler.config.timestep_spacing, given["class_labels"]))
        out = call(self, **given)
        out.images[:] = 0.9999
        return out

    monkeypatch.setattr(GuidedUnconditionalPipeline, "__call__", spy)
    flags = [
        "--classes",
        "balanced",
        "--rounding",
        "down",
        "--num_samples",
        "12",
        "--batch_size",
        "12",
        "--shard_size",
    ]
    flags += ["12", "--scheduler", "EulerDiscreteScheduler", "--scheduler_args", '{"timestep_spacing": "trailing"}']
    assert set(read(sample(tmp_path, *flags)).reshape(-1)) == {254}
    assert asked == [("EulerDiscreteScheduler", "trailing", [*range(10), 0, 1])]


def test_a_sit_by_the_sde_with_guidance_in_an_interval(tmp_path):
    torch.manual_seed(0)
    shape = {"sample_size": 8, "in_channels": 3, "patch_size": 2, "num_layers": 2, "hidden_size": 16}
    network = SiTTransformer2DModel(**shape, num_attention_heads=2, num_classes=5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    pipe = SiTPipeline(network, FlowMatchODEScheduler())
    pipe.save_pretrained(tmp_path / "sit")
    flags = ["--scheduler", "FlowMatchSDEScheduler", "--guidance_interval", "0", "0.7", "--classes", "balanced"]
    file = sample(
        tmp_path / "out", *flags, "--num_samples", "2", "--num_inference_steps", "4", model=str(tmp_path / "sit")
    )
    pipe.scheduler = FlowMatchSDEScheduler()
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(SEED + at) for at in range(2)]
    given = {"guidance_scale": 2.5, "guidance_interval": (0, 0.7), "num_inference_steps": 4}
    wanted = pipe(class_labels=[0, 1], generator=generators, **given).images
    assert np.array_equal(read(file), np.stack([np.asarray(image) for image in wanted]))


def test_a_stock_pipeline_without_classes(tmp_path):
    model = str(saved("ddpm"))
    flags = [flag for flag in FLAGS if flag not in ("--guidance_scale", "2.5")]
    main([model, "--out", str(tmp_path), *flags, "--num_samples", "2"])
    pipe = DDPMPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(SEED + at) for at in range(2)]
    wanted = pipe(batch_size=2, generator=generators, num_inference_steps=2).images
    assert np.array_equal(read(tmp_path / "samples.npz"), np.stack([image.convert("RGB") for image in wanted]))
    with pytest.raises(ValueError, match="DDPMPipeline takes no guidance_scale; leave --guidance_scale out"):
        sample(tmp_path / "more", model=model)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scheduler", "DDIMPipeline"], "'DDIMPipeline' is none of diffusers"),
        (["--scheduler_args", '{"spacing": 1}'], "Unknown key 'spacing' in --scheduler_args"),
        (["--guidance_interval", "0.1"], "--guidance_interval takes low and high"),
        (["--num_samples", "0"], "--num_samples must be at least 1"),
    ],
)
def test_what_does_not_fit(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        sample(tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_keys_tell_everything_and_no_place(whole):
    manifest = json.loads((whole / "images" / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["layout"]["rows"] == COUNT
    assert next(iter(manifest["recipe"]["models"])).startswith("digits-class-ddim@weights ")
