"""DiT with a `guidance=[...]` argument. Needs `pip install diffusers-repr`.

`DiffusionPipeline.from_pretrained(X, custom_pipeline=<this folder or its Hub id>, trust_remote_code=True)`, where X is
a folder or Hub id of a `DiTPipeline`.
"""

from __future__ import annotations

from diffusers import DiTPipeline

from diffusers_repr.guidance.pipeline import GuidedPipelineMixin, with_guidance


class GuidedDiTPipeline(GuidedPipelineMixin, DiTPipeline):
    """`DiTPipeline` whose call takes `guidance`: a config such as `PAG(3.0)`, or a list of them.

    All else is the stock pipeline; without guidance its call is bit-equal. `guidance_stats` tells what the newest
    guided call cost.
    """

    _output_types = ("pil", "np", "pt")  # what it gives for any other is an array
    __call__ = with_guidance(DiTPipeline.__call__)
