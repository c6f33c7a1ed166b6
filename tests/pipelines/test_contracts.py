"""diffusers' contracts of a pipeline, for each of ours that samples."""

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback
from diffusers_repr.pipelines.guided_dit import GuidedDiTPipeline
from diffusers_repr.pipelines.guided_stable_diffusion import GuidedStableDiffusionPipeline
from diffusers_repr.pipelines.guided_stable_diffusion_xl import GuidedStableDiffusionXLPipeline
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline
from diffusers_repr.pipelines.joint_diffusion import JointDiffusionPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler

from diffusers_repr.heads import JointHead
from diffusers_repr.models import JointViTModel
from diffusers_repr.models.class_token import ClassTokenHead
from tests.pipelines import rcg_cases, retrieval_cases, sit_cases
from tests.testers.models import build, unet2d
from tests.testers.pipelines import ClassCutoff, PipelineContract

CLASSES = {
    "pair": {"class_labels": [1, 2], "guidance_scale": 4.0},
    "one": {"class_labels": [2], "guidance_scale": 4.0},
    "repeated": {"class_labels": [1, 1, 2, 2], "guidance_scale": 4.0},
}


class ByClass(PipelineContract):
    pair, one, repeated = CLASSES["pair"], CLASSES["one"], CLASSES["repeated"]


class TestSiT(ByClass):
    def make(self):
        return sit_cases.pipeline(FlowMatchODEScheduler(shift=2.0), vae=sit_cases.autoencoder())


class TestSiTWithClassToken(ByClass):
    state = ("latents", "class_token")

    def make(self):
        pipe, token = sit_cases.pipeline(), ClassTokenHead(16, 6).eval()
        torch.nn.init.normal_(token.read.weight, generator=torch.Generator().manual_seed(0))
        return type(pipe)(pipe.transformer, pipe.scheduler, class_token=token)


class TestGuidedUnconditional(ByClass):
    def make(self):
        return GuidedUnconditionalPipeline(build("class_unet").unet, DDIMScheduler())


class TestJointUNet(ByClass):
    off = {"guidance_scale": 0.0}

    def make(self):
        torch.manual_seed(0)
        unet = unet2d(1).eval()
        head = JointHead.for_unet(unet, 3).eval()
        return JointDiffusionPipeline(unet, DDIMScheduler(), head)


class TestJointViT(ByClass):
    off = {"guidance_scale": 0.0}

    def make(self):
        torch.manual_seed(0)
        vit = JointViTModel((8, 8), 4, 1, 2, 16, 2, num_classes=3).eval()
        return JointDiffusionPipeline(vit, DDIMScheduler())


class ByVector(ByClass):
    pair, one, repeated = ({**call, "prior_num_inference_steps": 2} for call in CLASSES.values())


class TestRCGWithSiT(ByVector):
    def make(self):
        return rcg_cases.make("sit", num_classes=3)


class TestRCGWithUNet(ByVector):
    def make(self):
        return rcg_cases.make("latent", num_classes=3)


class TokensCutoff(ClassCutoff):
    tensor_inputs = ["tokens"]


class TestRetrieval(PipelineContract):
    cutoff, many = TokensCutoff, "num_images_per_query"
    pair = {"query": retrieval_cases.vectors(2, 9), "index": retrieval_cases.index(), "guidance_scale": 4.0}
    one = {**pair, "query": pair["query"][1:]}
    repeated = {**pair, "query": pair["query"].repeat_interleave(2, 0)}

    def make(self):
        return retrieval_cases.pipeline(k=4)  # the default, which components alone do not tell


class ByPrompt(PipelineContract):
    test_variants = None  # the stock class saves and loads
    many = "num_images_per_prompt"
    size = {"height": 32, "width": 32, "guidance_scale": 4.0}
    pair = {"prompt": ["a cat", "owls"], **size}
    one = cut = {"prompt": ["owls"], **size}  # diffusers' cutoff callbacks are for one prompt
    repeated = {"prompt": ["a cat", "a cat", "owls", "owls"], **size}


@pytest.mark.slow  # as that of SDXL, in three times its time
class TestGuidedStableDiffusion(ByPrompt):
    cutoff = SDCFGCutoffCallback

    def make(self):
        scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)  # the pipeline warns of others
        parts = build("sd").components | {"scheduler": scheduler}
        return GuidedStableDiffusionPipeline(**parts, requires_safety_checker=False)


class TestGuidedStableDiffusionXL(ByPrompt):
    cutoff = SDXLCFGCutoffCallback

    def make(self):
        return GuidedStableDiffusionXLPipeline(**build("sdxl").components | {"scheduler": DDIMScheduler()})


class TestGuidedDiT(ByClass):
    test_variants = None
    cutoff, many = None, None
    output_types = ("pil", "np", "pt")

    def make(self):
        return GuidedDiTPipeline(**build("dit").components)
