"""`GuidedPipelineMixin` and `with_guidance` on pipelines of one's own."""

import inspect

import pytest
import torch
from diffusers import DDPMPipeline, DiTPipeline, StableDiffusionImg2ImgPipeline

from diffusers_repr.guidance import PAG, Guidance, guide
from diffusers_repr.guidance.pipeline import GuidedPipelineMixin, with_guidance
from tests.testers.models import build


def test_the_signature_has_one_more_keyword():
    def call(self, prompt: str, steps: int = 3, **kwargs) -> list:
        """Samples.

        Args:
            prompt: A text.
        """

    guided = with_guidance(call)
    assert list(inspect.signature(guided).parameters) == ["self", "prompt", "steps", "guidance", "kwargs"]
    assert inspect.signature(guided).return_annotation is list
    assert guided.__name__ == "call"
    lines = inspect.getdoc(guided).splitlines()
    assert lines[2] == "Args:"
    assert lines[3].startswith("    guidance (")
    assert lines[-1] == "    prompt: A text."
    assert "guidance" not in inspect.signature(call).parameters
    assert inspect.getdoc(with_guidance(lambda self: None)) == ""


class GuidedImg2Img(GuidedPipelineMixin, StableDiffusionImg2ImgPipeline):
    __call__ = with_guidance(StableDiffusionImg2ImgPipeline.__call__)


def test_another_stock_class():
    """Image-to-image: the same few lines."""
    stock = StableDiffusionImg2ImgPipeline(**build("sd").components, requires_safety_checker=False)
    ours = GuidedImg2Img(**build("sd").components, requires_safety_checker=False)
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))

    def run(pipe, **extra):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat", image, num_inference_steps=4, output_type="pt", generator=generator, **extra).images

    want = run(stock)
    assert torch.equal(run(ours), want)
    with guide(stock, PAG(2.0)):
        guided = run(stock)
    assert not torch.allclose(guided, want, atol=1e-5)
    assert torch.equal(run(ours, guidance=PAG(2.0)), guided)
    assert len(ours.guidance_stats.steps) == 3  # strength 0.8
    assert '"_class_name": "StableDiffusionImg2ImgPipeline"' in ours.to_json_string()


class OwnCall(GuidedPipelineMixin, DDPMPipeline):
    def __call__(self, guidance: Guidance | None = None, **settings):
        with self.guided(guidance):
            return super().__call__(**settings)


def test_a_call_of_ones_own_around_guided():
    pipe = build("ddpm")
    ours = OwnCall(pipe.unet, pipe.scheduler)
    ours.set_progress_bar_config(disable=True)
    assert ours.guidance_stats is None
    settings = {"num_inference_steps": 2, "output_type": "pt"}
    ours(guidance=PAG(1.0), **settings)
    assert ours.guidance_stats.lanes == 4
    with pytest.raises(RuntimeError, match="Nothing was guided"), ours.guided(PAG(1.0)):
        pass
    with pytest.raises(KeyError), ours.guided(PAG(1.0)):
        raise KeyError
    ours(**settings)
    assert ours.guidance_stats is None


def test_subclasses_go_on():
    """A subclass of a guided class keeps the argument; its folders are of the stock class still."""

    class Guided(GuidedPipelineMixin, DiTPipeline):
        __call__ = with_guidance(DiTPipeline.__call__)

    class Further(Guided):
        def __call__(self, class_labels, **settings):
            return super().__call__(class_labels, **settings)

    pipe = Further(**build("dit").components)
    pipe.set_progress_bar_config(disable=True)
    pipe([1], guidance=PAG(1.0), num_inference_steps=2, output_type="np")
    assert pipe.guidance_stats.passes == 2
    assert '"_class_name": "DiTPipeline"' in pipe.to_json_string()
