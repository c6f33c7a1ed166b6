"""Probes on another base than theirs: refused where it cannot be, a warning where it should not."""

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.tasks import Probe
from tests.tasks.planted import LAYERS, fitted, images, pipeline, small
from tests.testers.models import build

SETTINGS = {"layers": LAYERS, "timestep": 50, "pooling": "adaptive:2"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes") / "probe"
    fitted().save_pretrained(folder)
    return folder


def test_another_class_is_refused(saved):
    with pytest.raises(ValueError, match="is a UNet2DConditionModel; the probe was fitted on a UNet2DModel"):
        Probe.from_pretrained(saved, base=build("sd"))


def test_a_missing_layer_is_refused(tmp_path):
    probe = small(pipeline(layers_per_block=2), layers=["up_blocks.0.resnets.2"])
    probe.save_pretrained(tmp_path / "deep")
    with pytest.raises(ValueError, match=r"has no layer 'up_blocks.0.resnets.2' \(closest: \['up_blocks.0.resnets"):
        Probe.from_pretrained(tmp_path / "deep", base=pipeline())


def test_other_channels_are_refused(saved):
    with pytest.raises(ValueError, match="gives 128 values at layer 'mid_block'; the probe was fitted on 64"):
        Probe.from_pretrained(saved, base=pipeline(block_out_channels=(16, 32)))


def test_another_config_with_the_same_features_warns(saved):
    with pytest.warns(UserWarning, match="other weights"), pytest.warns(UserWarning, match="in_channels is 3, was 1"):
        Probe.from_pretrained(saved, base=pipeline(in_channels=3, out_channels=3))


def test_other_weights_warn(saved, recwarn):
    with pytest.warns(UserWarning, match="has other weights than the probe's base"):
        Probe.from_pretrained(saved, base=pipeline(seed=1))
    recwarn.clear()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        Probe.from_pretrained(saved, base=pipeline().to(dtype))
    assert not [w for w in recwarn if "weights" in str(w.message)]


def test_another_noise_schedule_is_refused_and_another_sampler_is_not(saved):
    pipe = pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    Probe.from_pretrained(saved, base=pipe)
    pipe.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    with pytest.raises(ValueError, match="the noise schedules differ"):
        Probe.from_pretrained(saved, base=pipe)


def test_a_base_without_a_name_must_be_given(saved):
    with pytest.raises(ValueError, match="UNet2DModel that has no name.*base="):
        Probe.from_pretrained(saved)


def test_a_base_swapped_behind_the_probe_is_noticed():
    probe = small()
    probe.source = probe.recipe.extractor(Denoiser.from_pipe(pipeline(block_out_channels=(16, 32))))
    with pytest.raises(ValueError, match="gives 32 values at layer 'mid_block'; the probe was fitted on 16"):
        probe(images(2)[0])
