"""`FewShotSegmentationPipeline` as any diffusers pipeline: one call, fitted ones of other bases, offload, folders."""

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from diffusers_repr.pipelines.few_shot_segmentation import FewShotSegmentationPipeline

from diffusers_repr.tasks import Segmenter
from tests.tasks.planted import pipeline
from tests.tasks.planted_masks import CLASSES, LAYERS, QUICK, annotated, fitted
from tests.testers.models import saved

SETTINGS = {"layers": LAYERS, "timestep": [10, 100], "members": 3, "protocol": QUICK, "label_names": CLASSES}


def numbers(output):
    return torch.cat([torch.stack(output.uncertainty).flatten(), torch.stack(output.masks).flatten().float()])


def test_one_call_is_what_fitting_and_calling_give():
    pipe, x = FewShotSegmentationPipeline.from_pipe(pipeline()), annotated(2, seed=4)[0]
    output = pipe(x, examples=annotated(6), **SETTINGS)
    assert torch.equal(numbers(output), numbers(fitted()(x)))
    segmenter = pipe.fit(*annotated(6), **SETTINGS)
    assert isinstance(segmenter, Segmenter)
    assert segmenter.denoiser is pipe.denoiser
    assert torch.equal(numbers(pipe(x, segmenter=segmenter)), numbers(output))
    assert torch.equal(numbers(pipe(x, segmenter=fitted())), numbers(output))  # of an equal base


def test_a_saved_segmenter_and_one_of_another_base(tmp_path):
    fitted().save_pretrained(tmp_path / "s")
    pipe, x = FewShotSegmentationPipeline.from_pipe(pipeline()), annotated(2, seed=4)[0]
    assert torch.equal(numbers(pipe(x, segmenter=tmp_path / "s")), numbers(fitted()(x)))
    wide = FewShotSegmentationPipeline.from_pipe(pipeline(block_out_channels=(16, 32)))
    for segmenter in (fitted(), tmp_path / "s"):
        with pytest.raises(ValueError, match="gives 32 values at layer 'mid_block'; the segmenter was fitted on 16"):
            wide(x, segmenter=segmenter)
    with pytest.raises(ValueError, match="one of the two"):
        pipe(x)
    with pytest.raises(ValueError, match="one of the two"):
        pipe(x, annotated(1), fitted())
    with pytest.raises(ValueError, match="With examples pass one prompt"):
        pipe(x, annotated(1), prompt=["a horse", "a cat"])
    with pytest.raises(ValueError, match="members: settings of `fit`"):
        pipe(x, segmenter=fitted(), members=3)


def test_components_offload_and_what_stays_as_it_was():
    stock = pipeline()
    pipe, x = FewShotSegmentationPipeline.from_pipe(stock), annotated(2, seed=4)[0]
    assert pipe.unet is stock.unet
    assert pipe.config.class_name == DDPMPipeline.__name__
    pipe.unet.train()
    pipe.enable_model_cpu_offload(device="cpu")
    output = pipe(x, examples=annotated(6), **SETTINGS)
    torch.testing.assert_close(numbers(output), numbers(fitted()(x)), atol=1e-5, rtol=1e-5)
    assert pipe.unet.training
    assert torch.is_grad_enabled()
    assert not any(p.grad is not None for p in pipe.unet.parameters())


def test_the_class_loads_folders_of_stock_pipelines():
    pipe = FewShotSegmentationPipeline.from_pretrained(saved("ddpm"))
    pipe.set_progress_bar_config(disable=True)
    quick = {"members": 2, "protocol": QUICK.replace(max_epochs=1)}
    output = pipe(annotated(1)[0], examples=annotated(2), **quick)
    assert np.asarray(output.masks[0]).shape == (16, 16)
